"""Datasets of examples are written completely or not at all."""

from unittest import mock

import numpy as np
import pytest

from megatron_bipe.data.dataset import open_tokenizer
from megatron_bipe.data.inspection.verify import find_problems
from megatron_bipe.data.manifest import Manifest, PromptAnswerRecord
from megatron_bipe.data.prompt_answer import open_dataset
from megatron_bipe.data.segments import resolve_rule
from megatron_bipe.errors import DataError
from megatron_bipe.tasks.scrolls.tasks import TASKS, Prompter, read_rows
from preprocessing import task_examples
from preprocessing.commit import Contents
from preprocessing.task_examples import Example, ScrollsOptions, prepare_scrolls, write_examples
from preprocessing.work_dir import WorkFolder
from tests.helpers.errors import raises
from tests.helpers.scrolls import write_benchmark
from tests.helpers.tools import assert_refuses, call_tool

LENGTH = 8


@pytest.fixture
def contents(letters):
    rule = resolve_rule("newline", letters)
    return Contents(letters, rule, {"by": "test"}, PromptAnswerRecord(task="letters", seq_len_tokens=LENGTH))


def example(prompt, answer, location="somewhere"):
    return Example(np.array(prompt), np.array(answer), len(prompt) + len(answer), location)


GOOD = [example([1, 5, 13], [7, 2]), example([1], [4, 4, 4, 4, 4, 4, 2])]  # the second fills the sequence


def test_write_examples_makes_a_dataset_that_verifies(tmp_path, contents):
    made = write_examples(tmp_path / "out", contents, GOOD, overwrite=False)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.manifest == made and dataset.num_sequences(LENGTH) == 2
    assert not list(find_problems([dataset]))
    assert open_tokenizer(dataset).eos_id == 2
    tokens, _ = dataset.sequences(np.array([1]), LENGTH)
    assert tokens[0].tolist() == [1, 4, 4, 4, 4, 4, 4, 2, 0]
    assert made.text_bytes == 13
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "tokenizer",
        "tokens-00000.bin",
        "tokens-00000.idx",
        "tokens-00000.seg",
    ]


@pytest.mark.parametrize(
    ("bad", "observed", "remedy"),
    [
        (example([], [3]), ["prompt"], ""),
        (example([1], []), ["answer"], ""),
        (example([1, 2, 3, 4], [5, 6, 7, 8, 2]), [4, 5, 8], "--length 9"),
    ],
)
def test_bad_example_is_named_and_nothing_is_left_or_lost(tmp_path, contents, bad, observed, remedy):
    bad = bad._replace(location="file, line 7")
    with raises(DataError, *observed, location="file, line 7", remedy=remedy):
        write_examples(tmp_path / "new", contents, [*GOOD, bad], overwrite=False)
    assert not (tmp_path / "new").exists()
    made = write_examples(tmp_path / "old", contents, GOOD, overwrite=False)
    with raises(DataError, *observed, location="file, line 7", remedy=remedy):
        write_examples(tmp_path / "old", contents, [bad], overwrite=True)
    assert Manifest.load(tmp_path / "old") == made
    assert not list(find_problems([open_dataset(tmp_path / "old")]))


def test_output_is_replaced_only_when_asked_and_foreign_files_never(tmp_path, contents):
    write_examples(tmp_path / "out", contents, GOOD, overwrite=False)
    with raises(DataError, location=tmp_path / "out", remedy="--overwrite"):
        write_examples(tmp_path / "out", contents, GOOD[:1], overwrite=False)
    write_examples(tmp_path / "out", contents, GOOD[:1], overwrite=True)
    assert open_dataset(tmp_path / "out").num_sequences(LENGTH) == 1
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with raises(DataError, "notes.txt", location=tmp_path / "out"):
        write_examples(tmp_path / "out", contents, GOOD, overwrite=True)
    with raises(DataError, "no examples", location=tmp_path / "none"):
        write_examples(tmp_path / "none", contents, [], overwrite=False)


def test_unfinished_work_of_another_job_is_dropped_only_when_told(tmp_path, contents):
    work = WorkFolder(tmp_path / "out")
    work.begin({"of": "preprocess"}, [], overwrite=False)
    with raises(DataError, location=work.path, remedy="--overwrite"):
        write_examples(tmp_path / "out", contents, GOOD, overwrite=False)
    assert work.has("job.json")
    write_examples(tmp_path / "out", contents, GOOD, overwrite=True)
    assert not work.path.exists() and open_dataset(tmp_path / "out").num_sequences(LENGTH) == 2


@pytest.mark.parametrize("step", ["_write", "publish_dataset"])
def test_killed_run_is_repeated_by_the_same_command(tmp_path, contents, monkeypatch, step):
    write_examples(tmp_path / "out", contents, GOOD[:1], overwrite=False)
    with monkeypatch.context() as patch:
        patch.setattr(task_examples, step, mock.Mock(side_effect=KeyboardInterrupt))
        patch.setattr(WorkFolder, "remove", lambda work: None)
        with pytest.raises(KeyboardInterrupt):
            write_examples(tmp_path / "out", contents, GOOD, overwrite=True)
    write_examples(tmp_path / "out", contents, GOOD, overwrite=False)
    assert open_dataset(tmp_path / "out").num_sequences(LENGTH) == 2
    assert not (tmp_path / "out" / "unfinished").exists()


# SCROLLS


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    return write_benchmark(tmp_path_factory.mktemp("benchmark"))


@pytest.mark.parametrize("name", TASKS)
def test_scrolls_split_becomes_an_example_for_each_output(tmp_path, letters, benchmark, name):
    folder = str(letters.definition.parent)
    options = ScrollsOptions(name, benchmark, "train", folder, tmp_path, length=1300, segments="newline")
    made = prepare_scrolls(options)
    rows = list(read_rows(benchmark, name, "train"))
    dataset, prompter = open_dataset(tmp_path), Prompter(TASKS[name], 1300, letters)
    assert dataset.num_sequences(1300) == len(rows) == 9
    assert made.examples == PromptAnswerRecord(task=name, seq_len_tokens=1300)
    tokens, _ = dataset.sequences(np.arange(9), 1300)
    answers = dataset.answers(np.arange(9))
    for row, ids, (first, stop) in zip(rows, tokens, answers, strict=True):
        (prompt,) = prompter.prompts([row.input])
        assert ids[: first + 1].tolist() == prompt.tolist()
        assert letters.decode(ids[first + 1 : stop]) == row.output
        assert ids[stop] == letters.eos_id


def test_split_without_outputs_has_nothing_to_learn_from(tmp_path, letters, benchmark):
    options = ScrollsOptions(
        "qmsum", benchmark, "test", str(letters.definition.parent), tmp_path / "out", 1300, "newline"
    )
    with raises(DataError, "'qmsum-0_0'", location="test.jsonl, line 1", remedy="validation"):
        prepare_scrolls(options)
    assert not (tmp_path / "out").exists()


def test_prepare_task_reports_its_output_and_exits_2_on_bad_input(tmp_path, letters, benchmark):
    command = ["scrolls", "--data", benchmark, "--segments", "newline", "--tokenizer", letters.definition.parent]
    command += ["--output", tmp_path / "out", "--length", 1300]
    made = call_tool("prepare_task", *command, "--task", "qasper").output
    assert "9 examples of qasper" in made and "1300 tokens" in made
    assert_refuses("prepare_task", [*command, "--task", "squad"], DataError, "'squad'")
