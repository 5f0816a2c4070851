"""The mean of a run's checkpoints as a user needs it: evaluated, exported, and trained further."""

import csv
from pathlib import Path

import pytest
import torch

from megatron_bipe.checkpoint.find import find_checkpoint, list_steps
from megatron_bipe.checkpoint.verify import CheckpointWeights
from tests.helpers.commands import options
from tests.helpers.docs import assert_events_are_documented
from tests.helpers.small_runs import losses
from tests.helpers.tools import call_tool, run_pretrain


@pytest.mark.slow
def test_average_is_evaluated_exported_and_trained_further(tmp_path: Path, train_and_valid: Path) -> None:
    data, run_dir, mean, exported = (
        train_and_valid / "train",
        tmp_path / "run",
        tmp_path / "mean",
        tmp_path / "exported",
    )
    run_pretrain(options(data, run_dir, "train.save_every=2", "optimizer.lr=3e-3", steps=6), tmp_path / "first")
    call_tool("average", f"{run_dir}@2,4", f"{run_dir}@6", "--output", mean)
    assert_events_are_documented(mean)

    call_tool("export_hf", "--checkpoint", mean, "--output", exported)
    card = (exported / "README.md").read_text()
    assert "`run` step 2, `run` step 4, `run` step 6" in card
    lengths = ("--data", train_and_valid / "valid", "--lengths", 32, "--max-tokens", 2000, "--output", tmp_path / "out")
    call_tool("evaluate", "perplexity", "--model", mean, exported, run_dir, *lengths)
    with (tmp_path / "out" / "perplexity.csv").open() as file:
        of_mean, of_export, of_last = (float(row["perplexity"]) for row in csv.DictReader(file))
    assert of_mean == pytest.approx(of_export, rel=1e-6) and of_mean != pytest.approx(of_last, rel=1e-4)

    further = options(data, tmp_path / "next", f"train.init_from={mean}", "optimizer.warmup_steps=1", steps=1)
    run_pretrain(further, tmp_path / "second")  # its only update has a rate of 0
    weights, kept = (CheckpointWeights(find_checkpoint(folder), torch.float32) for folder in (mean, tmp_path / "next"))
    assert list_steps(tmp_path / "next") == [0, 1] and len(losses(tmp_path / "next")) == 1
    assert [name for name in weights if not torch.equal(weights[name], kept[name])] == []
