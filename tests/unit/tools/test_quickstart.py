"""The quickstart's plan; the commands themselves are tested elsewhere."""

from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.tools import script


@pytest.fixture(scope="module")
def quickstart():
    with script("quickstart") as module:
        yield module


def test_plan_is_commands_of_the_project_with_values_filled_in(quickstart):
    stages = quickstart.plan(Path("some where"), ["train.steps=7", "optimizer.warmup_steps=1"])
    steps = [step for stage in stages for step in stage]
    assert len(steps) == 4 + 3 + 1 + 3 + 1
    for step in steps:
        script = next(word for word in step.command if word.endswith(".py"))
        assert (ROOT / script).is_file()
        assert not any("{" in word or "}" in word for word in step.command)
        assert step.result.is_relative_to("some where")
    train = next(step for step in steps if step.title == "Train rope")
    assert train.result.name == "step-00000007"
    assert train.command[-4:] == ["--set", "train.steps=7", "--set", "optimizer.warmup_steps=1"]
    assert "data.path=some where/data/train" in train.command


def test_plan_trains_all_models_at_once_one_of_them_on_two_ranks(quickstart):
    stages = quickstart.plan(Path("out"), [])
    [trainings] = [stage for stage in stages if any("pretrain.py" in step.command for step in stage)]
    assert [step.name for step in trainings] == list(quickstart.ENCODINGS)
    first, *others = (" ".join(step.command) for step in trainings)
    assert "--num_accelerators 2" in first and "zero2.json" in first
    assert all("deepspeed" not in command and "OMP_NUM_THREADS=1" in command for command in others)
