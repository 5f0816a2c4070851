"""The mean of checkpoints, and what cannot be averaged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_bipe.checkpoint.find import find_checkpoint, read_data_record, step_folder
from megatron_bipe.checkpoint.manifest import fingerprint_of, load_index
from megatron_bipe.checkpoint.shard_files import KINDS, WEIGHT, StateReader
from megatron_bipe.config import RunConfig, load_run_config
from megatron_bipe.data.dataset import TokenDataset, open_tokenizer
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.eval.eval_model import load_eval_model
from megatron_bipe.eval.training_facts import recipe, training_facts
from megatron_bipe.model import build_model
from megatron_bipe.run_files import read_events
from megatron_bipe.train import average
from megatron_bipe.train.average import write_average
from megatron_bipe.train.metrics_file import Events
from megatron_bipe.train.run_folder import write_run_folder
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.errors import raises
from tests.helpers.tools import assert_refuses, call_tool

Weights = dict[str, dict[str, Tensor]]  # by name of the checkpoint and of the parameter
MODEL = "{num_layers: 1, hidden_size: 16, num_heads: 2, ffn_size: 24, vocab_size: 400, intra_size: 16}"


def configured(run_dir: Path, *settings: str) -> RunConfig:
    base = [f"run_dir={run_dir}", f"model={MODEL}", "train.precision=fp32", "train.init_from=some/model"]
    return load_run_config(None, [*base, *settings])


def write_run(data: Path, run_dir: Path, *settings: str, steps: tuple[int, ...] = (10,)) -> Weights:
    """Write a run folder with random weights in each checkpoint; return them by `RUN_DIR@STEP`."""
    run, dataset = configured(run_dir, *settings), TokenDataset(data)
    write_run_folder(run, dataset.manifest.record, open_tokenizer(dataset))
    written = {}
    for step in steps:
        weights = {name: weight.detach() for name, weight in build_model(run.model, seed=step).named_parameters()}
        write_checkpoint(run_dir, step, weights)
        written[f"{run_dir}@{step}"] = weights
    return written


@pytest.fixture
def weights(tmp_path: Path, text_dataset: Path) -> Weights:
    """Return the weights of the checkpoints of two runs, a@10, a@20 and b@30."""
    return write_run(text_dataset, tmp_path / "a", steps=(10, 20)) | write_run(
        text_dataset, tmp_path / "b", "train.seed=7", steps=(30,)
    )


def test_average_is_the_mean_of_the_weights_without_moments(tmp_path: Path, weights: Weights) -> None:
    output = tmp_path / "mean"
    written = call_tool("average", f"{tmp_path}/a@10,20", f"{tmp_path}/b@30", "--output", output).output
    assert all(spec in written for spec in weights)
    checkpoint = find_checkpoint(output)
    reader = StateReader(checkpoint.folder)
    assert checkpoint.step == reader.index.step == reader.index.optimizer_steps == 0
    assert set(reader.index.parameters) == set(weights[f"{tmp_path}/a@10"])
    for name in reader.index.parameters:
        mean = torch.stack([of_one[name].double() for of_one in weights.values()]).mean(0)
        torch.testing.assert_close(reader.full(WEIGHT, name), mean.float(), rtol=1e-7, atol=0)
        assert not any(reader.full(kind, name).any() for kind in KINDS if kind != WEIGHT)


def test_average_is_a_run_folder_with_its_sources(tmp_path: Path, weights: Weights) -> None:
    output = tmp_path / "mean"
    write_average([find_checkpoint(spec) for spec in weights], output, overwrite=False)
    run = load_run_config(output / "config.yaml")
    assert run.run_dir == output and run.model == configured(output).model and run.train.init_from is None
    (event,) = read_events(output)
    assert [(source["run"], source["step"]) for source in event["sources"]] == [
        (str(tmp_path / name), step) for name, step in (("a", 10), ("a", 20), ("b", 30))
    ]
    assert event["sources"][2]["fingerprint"] == fingerprint_of(step_folder(tmp_path / "b", 30))
    model = load_eval_model(str(output))
    assert model.rule == load_eval_model(f"{tmp_path}/a@10").rule
    record = load_index(find_checkpoint(output).folder).data
    assert record is not None
    facts = training_facts(find_checkpoint(output), run, record)
    assert facts["Mean of"] == "`a` step 10, `a` step 20, `b` step 30" and "Step" not in facts
    assert training_facts(find_checkpoint(f"{tmp_path}/a@10"), run, record)["Step"] == "10"


def test_model_card_names_the_trunk_of_a_branch_without_its_folder(tmp_path: Path, text_dataset: Path) -> None:
    settings = "train.init_from=null", f"train.branch_from={tmp_path}/secret-disk/trunk@1000"
    [spec] = write_run(text_dataset, tmp_path / "branch", *settings, steps=(1200,))
    run, checkpoint = load_run_config(tmp_path / "branch" / "config.yaml"), find_checkpoint(spec)
    assert training_facts(checkpoint, run, read_data_record(checkpoint.run_dir))["Branch of"] == "`trunk` step 1,000"
    assert "secret-disk" not in str(recipe(run))


def test_average_sends_nothing_to_trackers_or_a_webhook_of_its_sources(tmp_path: Path, text_dataset: Path) -> None:
    settings = "alerts.webhook=http://host/SECRET", "tracking={trackio: {}}"
    weights = write_run(text_dataset, tmp_path / "a", *settings, steps=(10, 20))
    write_average([find_checkpoint(spec) for spec in weights], tmp_path / "mean", overwrite=False)
    run = load_run_config(tmp_path / "mean" / "config.yaml")
    assert run.alerts.webhook is None and run.tracking.trackio is None


def test_average_that_was_interrupted_can_be_repeated(
    tmp_path: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, output = [find_checkpoint(spec) for spec in weights], tmp_path / "mean"

    def interrupted(*arguments: Any) -> None:
        write_run_folder(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(average, "write_run_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_average(checkpoints, output, overwrite=False)
    monkeypatch.undo()
    write_average(checkpoints, output, overwrite=True)
    assert find_checkpoint(output).step == 0


@pytest.mark.parametrize("named", [["a@10"], ["a"], ["a@10", "a@10"], ["a@10,20", "a@20"], ["a@10,20", "./a@10"]])
def test_average_of_one_checkpoint_or_of_one_twice_is_refused(
    tmp_path: Path, weights: Weights, named: list[str]
) -> None:
    arguments = [f"{tmp_path}/{spec}" for spec in named]
    assert_refuses("average", [*arguments, "--output", tmp_path / "mean"], ConfigError)
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize(
    ("named", "kind"),
    [("a@10,15", CheckpointError), ("a@{10,20}", ConfigError), ("a@10,,20", ConfigError), ("c@10", CheckpointError)],
)
def test_average_of_what_is_not_there_is_refused(
    tmp_path: Path, weights: Weights, named: str, kind: type[CheckpointError]
) -> None:
    assert_refuses("average", [f"{tmp_path}/{named}", f"{tmp_path}/b", "--output", tmp_path / "mean"], kind, "steps")
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize(
    ("settings", "observed"),
    [
        (["model.hidden_size=32"], ["model.hidden_size", 16, 32]),
        (["model.encoding=rope"], ["model.encoding", "bipe_rope", "rope"]),
    ],
)
def test_average_of_different_models_is_refused(
    tmp_path: Path,
    text_dataset: Path,
    weights: Weights,
    settings: list[str],
    observed: list[object],
) -> None:
    write_run(text_dataset, tmp_path / "c", *settings)
    checkpoints = [find_checkpoint(tmp_path / name) for name in ("a", "c")]
    with raises(CheckpointError, *observed, location=checkpoints[1].folder):
        write_average(checkpoints, tmp_path / "mean", overwrite=False)
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize("what", ["tokenizer", "rule"])
def test_average_of_other_rules_or_tokenizers_is_refused(tmp_path: Path, weights: Weights, what: str) -> None:
    record = read_data_record(tmp_path / "b")
    tokenizer = record.tokenizer.model_copy(update={"fingerprint": "e" * 64})
    other = {"tokenizer": tokenizer, "rule": SegmentRule(spec="[6]", token_ids=(6,))}[what]
    changed = record.model_copy(update={what: other})
    (tmp_path / "b" / "data.json").write_text(changed.model_dump_json(exclude_defaults=True))
    with raises(CheckpointError, what, location=step_folder(tmp_path / "b", 30)):
        write_average([find_checkpoint(spec) for spec in weights], tmp_path / "mean", overwrite=False)


def test_average_of_a_damaged_checkpoint_writes_nothing(tmp_path: Path, weights: Weights) -> None:
    damaged = step_folder(tmp_path / "b", 30) / "rank-00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with raises(CheckpointError, damaged.name, location=damaged.parent):
        write_average([find_checkpoint(spec) for spec in weights], tmp_path / "mean", overwrite=False)
    assert not (tmp_path / "mean").exists()


def test_average_replaces_only_its_own_output_and_only_if_asked(tmp_path: Path, weights: Weights) -> None:
    first, second, third = (find_checkpoint(spec) for spec in weights)
    output, other = tmp_path / "mean", tmp_path / "other"
    output.mkdir()  # an empty folder is not in the way
    write_average([first, second], output, overwrite=False)
    with raises(CheckpointError, "exists", location=output, remedy="--overwrite"):
        write_average([first, third], output, overwrite=False)
    write_average([first, third], output, overwrite=True)
    assert [source["step"] for source in read_events(output)[-1]["sources"]] == [10, 30]
    other.mkdir()
    (other / "notes.txt").touch()
    Events(output, is_main=True).add("start", step=0, ranks=1)  # it is being trained now
    for refused in (other, tmp_path / "a", output):
        with raises(CheckpointError, location=refused) as error:
            write_average([first, third], refused, overwrite=True)
        assert "--overwrite" not in str(error.value)
    assert (other / "notes.txt").exists() and find_checkpoint(tmp_path / "a").step == 20
