"""The mean of several checkpoints, written as checkpoint 0 of a run folder, so that every tool accepts it.

Only one tensor of the mean is in memory at a time, besides one layer of the checkpoint that is written.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_bipe.checkpoint.find import Checkpoint, list_steps
from megatron_bipe.checkpoint.manifest import fingerprint_of
from megatron_bipe.checkpoint.verify import CheckpointWeights, read_run
from megatron_bipe.config import AlertsConfig, RunConfig, TrackingConfig
from megatron_bipe.data.dataset import check_recorded_tokenizer
from megatron_bipe.data.manifest import TOKENIZER_FOLDER, DataRecord
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.run_files import AVERAGE, read_events
from megatron_bipe.train.metrics_file import Events
from megatron_bipe.train.run_folder import write_run_folder
from megatron_bipe.train.warm_start import write_step_zero


class _Source(NamedTuple):
    """A checkpoint with the description of its run."""

    checkpoint: Checkpoint
    run: RunConfig
    record: DataRecord

    @property
    def name(self) -> str:
        return f"{self.checkpoint.run_dir}@{self.checkpoint.step}"


class MeanWeights(Mapping[str, Tensor]):
    """The mean of the fp32 master weights of checkpoints with the same parameters, added up in fp64 on access.

    All files of all checkpoints are verified before the first weight is read.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._weights = [CheckpointWeights(checkpoint, torch.float32) for checkpoint in checkpoints]

    def __getitem__(self, name: str) -> Tensor:
        total = self._weights[0][name].double()
        for weights in self._weights[1:]:
            total += weights[name]
        return (total / len(self._weights)).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights[0])

    def __len__(self) -> int:
        return len(self._weights[0])


def write_average(checkpoints: Sequence[Checkpoint], output: Path, overwrite: bool) -> Path:
    """Write the mean of checkpoints as checkpoint 0 of the run folder `output`, and return the checkpoint's folder.

    The configuration and the data record are those of the first checkpoint's run, without the model or the run that
    it began from, trackers and alerts.

    Raises:
        ConfigError: fewer than two checkpoints are given, or one of them twice.
        CheckpointError: they are of different models, tokenizers or segment rules; one is damaged; or the output exists
            and may not be replaced.
        DataError: the tokenizer in the folder of the first run is not that of its data.
    """
    _check_distinct(checkpoints)
    _check_output(checkpoints, output, overwrite)
    sources = [_Source(checkpoint, *read_run(checkpoint)) for checkpoint in checkpoints]
    _check_equal_models(sources)
    first, record = sources[0].checkpoint.run_dir, sources[0].record
    tokenizer = load_tokenizer(first / TOKENIZER_FOLDER, bool(record.special_in_text))
    check_recorded_tokenizer(tokenizer, record.tokenizer, first / "data.json")
    weights = MeanWeights(checkpoints)
    _ = next(iter(weights.values()))  # verifies all files before anything is written
    train = sources[0].run.train.model_copy(update={"init_from": None, "branch_from": None})
    silent = {"alerts": AlertsConfig(), "tracking": TrackingConfig()}
    run = sources[0].run.model_copy(update={"run_dir": output, "train": train} | silent)
    facts = [
        {"run": str(run_dir), "step": step, "fingerprint": fingerprint_of(folder)}
        for folder, run_dir, step in checkpoints
    ]
    output.mkdir(parents=True, exist_ok=True)
    Events(output, is_main=True).add(AVERAGE, sources=facts)  # first: it marks an output that is incomplete, too
    write_run_folder(run, record, tokenizer)
    return write_step_zero(run, record, weights)


def _check_distinct(checkpoints: Sequence[Checkpoint]) -> None:
    if len(checkpoints) < 2:
        raise ConfigError(
            f"{len(checkpoints)} checkpoint is given, and a mean needs at least two",
            remedy="Name several steps, as RUN_DIR@1000,2000,3000, or several runs",
            location="tools/average.py",
        )
    folders = [checkpoint.folder.resolve() for checkpoint in checkpoints]
    if repeated := [c for c, folder in zip(checkpoints, folders, strict=True) if folders.count(folder) > 1]:
        raise ConfigError(
            f"{repeated[0].run_dir}@{repeated[0].step} is given {len(repeated)} times",
            remedy="Name each checkpoint once",
            location="tools/average.py",
        )


def _check_output(checkpoints: Sequence[Checkpoint], output: Path, overwrite: bool) -> None:
    """Refuse an output that exists; `overwrite` permits that of an earlier call alone."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    is_source = output.resolve() in {checkpoint.run_dir.resolve() for checkpoint in checkpoints}
    is_average = list_steps(output) in ([], [0]) and {event["event"] for event in read_events(output)} == {AVERAGE}
    if is_source or not is_average:
        raise CheckpointError(
            f"the output {'is one of the runs' if is_source else 'exists, and was not made by tools/average.py'}",
            remedy="Name another --output",
            location=output,
        )
    if not overwrite:
        raise CheckpointError(
            "the output exists", remedy="Name another --output, or add --overwrite to replace it", location=output
        )


def _check_equal_models(sources: Sequence[_Source]) -> None:
    first = sources[0]
    for other in sources[1:]:
        problems = [
            f"{what} is {one} in {first.name} and {another} in {other.name}"
            for (what, one), another in zip(_meaning(first).items(), _meaning(other).values(), strict=True)
            if one != another
        ]
        if problems:
            raise CheckpointError(
                f"the checkpoints are not of one model: {'; '.join(problems)}",
                remedy="Name checkpoints with the same model, tokenizer and segment rule",
                location=other.checkpoint.folder,
            )


def _meaning(source: _Source) -> dict[str, object]:
    """Return by name the settings and facts that give the weights their meaning."""
    record = source.record
    return {f"model.{key}": value for key, value in source.run.model.model_dump(mode="json").items()} | {
        "the tokenizer": record.tokenizer.fingerprint,
        "the segment rule": record.rule.model_dump(mode="json"),
        "special_in_text": bool(record.special_in_text),
    }
