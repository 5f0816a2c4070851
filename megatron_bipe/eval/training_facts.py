"""Facts about the training of a checkpoint, for the model card: tokens, losses, data and recipe."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_bipe.checkpoint.find import Checkpoint, branch_step, split_step
from megatron_bipe.config import RunConfig, flatten
from megatron_bipe.data.blend import PATTERN_SLOTS
from megatron_bipe.data.manifest import DataRecord
from megatron_bipe.run_files import AVERAGE, METRICS, parse_line, read_events


def training_facts(checkpoint: Checkpoint, run: RunConfig, record: DataRecord) -> dict[str, str]:
    """Return rows for the model card; a loss is missing if the run's metrics do not have it."""
    step, metrics = checkpoint.step, _metrics_of(checkpoint)
    tokens = metrics.get("tokens", step * run.train.global_batch * run.train.seq_len_tokens)
    facts = {"Step": f"{step:,}", "Tokens seen in training": f"{tokens:,}"}
    if sources := _averaged(checkpoint):
        facts = {"Mean of": ", ".join(sources)}
    if run.train.init_from is not None:
        facts["Initialized from"] = f"`{Path(run.train.init_from).name}`"
    if run.train.branch_from is not None:
        trunk, _ = split_step(run.train.branch_from)
        facts["Branch of"] = f"`{trunk.name}` step {branch_step(run):,}"
    for name, key in (("Training", "loss/train_nats"), ("Validation", "loss/valid_nats")):
        if isinstance(loss := metrics.get(key), float):
            facts[f"{name} loss at this step"] = f"{loss:.4f} nats per token"
    return facts | {
        "Training data": "; ".join(_data(run, record)),
        "Training data fingerprint": f"`{record.fingerprint}`",
    }


def recipe(run: RunConfig) -> dict[str, str]:
    """Return the settings of the run by their dotted names, without those of folders, trackers and messages."""
    hidden: dict[str, Any] = {"run_dir": True, "data": True, "tracking": True, "alerts": True}
    hidden |= {"checkpoint": {"after_save"}, "train": {"init_from", "branch_from"}}  # the facts have their names
    return {key: json.dumps(value) for key, value in flatten(run.model_dump(mode="json", exclude=hidden)).items()}


def _metrics_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return all metrics of the checkpoint's step; empty if they are not there."""
    found: dict[str, Any] = {}
    try:
        with (checkpoint.run_dir / METRICS).open("rb") as file:
            for line in file:
                values = parse_line(line)
                if values.get("step") == checkpoint.step:
                    found |= values
    except OSError:
        return {}
    return found


def _averaged(checkpoint: Checkpoint) -> list[str]:
    """Return the checkpoints that tools/average.py made checkpoint 0 of; empty for a checkpoint of training."""
    if checkpoint.step:
        return []
    averages = [event for event in read_events(checkpoint.run_dir) if event["event"] == AVERAGE]
    sources = averages[-1]["sources"] if averages else []
    return [f"`{Path(source['run']).name}` step {source['step']:,}" for source in sources]


def _data(run: RunConfig, record: DataRecord) -> Iterator[str]:
    if not record.blend:
        yield f"`{run.data.folders[0].name}`"
    for member in record.blend:
        yield f"{member.slots / PATTERN_SLOTS:.2%} `{Path(member.path).name}`"
