"""The quickstart's plan and its honesty; the commands themselves are tested where they belong."""

from pathlib import Path

import pytest

from tests.scripts import ROOT, script


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


BASE = {64: 20.0, 128: 19.0, 256: 20.9, 512: 25.0}


@pytest.mark.parametrize(("changes", "length"), [({}, 256), ({128: 21.1}, 64), ({256: 21.1}, 128), ({512: 21.0}, 512)])
def test_reach_ends_where_perplexity_first_leaves_the_band(quickstart, changes, length):
    assert quickstart.reach(BASE | changes) == length


@pytest.mark.parametrize(("rope_at_128", "shows"), [(30.0, True), (20.0, False)])
def test_verdict_says_whether_every_bilevel_model_reaches_further(quickstart, rope_at_128, shows):
    rope = BASE | {128: rope_at_128}
    text = quickstart.verdict({"rope": rope, "bipe_rope": BASE, "bipe_alibi": BASE | {512: 20.0}})
    assert ("NOT" not in text) is shows
    assert "bipe_rope up to 256 tokens" in text and "bipe_alibi up to 512 tokens" in text
