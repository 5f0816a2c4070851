"""The plan of the study of encodings, and its table; the commands themselves are tested elsewhere."""

from pathlib import Path

import pytest

from megatron_bipe.config.encodings import ENCODINGS
from megatron_bipe.errors import ConfigError
from tests.helpers.errors import raises
from tests.helpers.paths import ROOT
from tests.helpers.tools import script


@pytest.fixture(scope="module")
def study():
    with script("study") as module:
        yield module


def test_reaches_end_where_an_encoding_does(study):
    reach = study.supported_lengths(list(ENCODINGS), [])
    assert reach["rope"] == (256, 512, 768, 1024, 1536, 2048)
    assert reach["learned"] == (256,)
    assert reach["randomized_rope"] == (256, 512, 768, 1024)
    assert study.supported_lengths(["learned"], ["model.train_len_tokens=600"])["learned"] == (256, 512)


def test_reaches_of_an_encoding_that_ends_before_the_first_length_is_one_error(study):
    with raises(ConfigError, "learned", 128, 256, location="--set"):
        study.supported_lengths(["rope", "learned"], ["model.train_len_tokens=128"])


def test_reaches_of_wrong_names_is_one_error(study):
    with raises(ConfigError, "ropes"):
        study.supported_lengths(["ropes"], [])
    with raises(ConfigError, location="--encodings"):
        study.supported_lengths(["rope", "rope"], [])


def test_plan_trains_each_and_evaluates_each_up_to_its_reach(study):
    reach = study.supported_lengths(["rope", "learned", "bipe_rope"], [])
    steps = [step for stage in study.plan(Path("some where"), reach, ["train.steps=7"]) for step in stage]
    assert [step.title for step in steps[4:]] == [
        "Train rope",
        "Train learned",
        "Train bipe_rope",
        "Evaluate rope",
        "Evaluate learned",
        "Evaluate bipe_rope",
    ]
    commands = [step.command for step in steps[7:]]
    assert [words[words.index("--model") + 1] for words in commands] == [
        f"some where/runs/{name}" for name in ("rope", "learned", "bipe_rope")
    ]
    lengths = [words[words.index("--lengths") + 1] for words in commands]
    assert lengths == ["256,512,768,1024,1536,2048", "256", "256,512,768,1024,1536,2048"]
    assert steps[4].result == Path("some where/runs/rope/checkpoints/step-00000007")
    for step in steps:
        assert (ROOT / next(word for word in step.command if word.endswith(".py"))).is_file()
        assert not any("{" in word for word in step.command)


def test_table_has_a_line_for_each_and_leaves_out_what_is_beyond_reach(study, tmp_path):
    for folder, rows in {
        "evaluation/rope": ["rope,256,9.04", "rope,512,20.5"],
        "evaluation/learned": ["learned,256,9.5"],
    }.items():
        (tmp_path / folder).mkdir(parents=True)
        text = "\n".join(["encoding,length_tokens,perplexity", *rows])
        (tmp_path / folder / "perplexity.csv").write_text(text)
    found = study.perplexities(tmp_path, {"learned": (256,), "rope": (256, 512)})
    assert list(found.items()) == [("learned", {256: 9.5}), ("rope", {256: 9.04, 512: 20.5})]
    assert study.table(found).splitlines() == [
        "| encoding | 256 | 512 |",
        "| --- | --- | --- |",
        "| `learned` | 9.5 |  |",
        "| `rope` | 9.0 | 20.5 |",
    ]
