"""Results of SCROLLS tasks: scores, the benchmark's layouts, the table."""

import csv
import json

import pytest

pytest.importorskip("rouge_score", reason="rouge_score is not installed")

from megatron_bipe.errors import DataError
from megatron_bipe.tasks.scrolls.evaluate import answer, results_table, score_answers, write_results
from megatron_bipe.tasks.scrolls.tasks import TASKS, Question
from tests.helpers.errors import raises

ASKED = [Question("a", "?", ("the cat", "a dog")), Question("b", "?", ("x y",))]
ANSWERS = {"b": 'x, "z"\n', "a": "dog"}


def _about(scores, split="validation", limit=None):
    return {"split": split, "num_examples": 2, "scores": scores, "limit": limit}


def test_scores_are_of_each_inputs_own_answer():
    assert score_answers(TASKS["qasper"], ASKED, ANSWERS) == {"f1": 75.0, "score": 75.0}
    assert score_answers(TASKS["quality"], ASKED, ANSWERS) == {"exact_match": 50.0, "score": 50.0}
    rouge = score_answers(TASKS["qmsum"], ASKED, ANSWERS)
    assert rouge is not None and rouge["score"] == rouge["geometric_mean"]
    assert score_answers(TASKS["qasper"], [question._replace(outputs=()) for question in ASKED], ANSWERS) is None


def test_split_with_some_outputs_missing_is_refused_before_anything_is_generated():
    with raises(DataError, "1 of 2", "'b'", location="--data"):
        answer(
            None, TASKS["qasper"], [ASKED[0], ASKED[1]._replace(outputs=())], 8192, 1
        )  # before anything is generated


def test_empty_split_is_refused():
    with raises(DataError, "qasper", location="--data"):
        answer(None, TASKS["qasper"], [], 8192, 1)


def test_results_are_in_the_benchmarks_layouts_and_gather_in_a_folder(tmp_path):
    for name in ("qasper", "gov_report"):
        write_results(tmp_path, TASKS[name], _about(score_answers(TASKS[name], ASKED, ANSWERS)), ANSWERS)
    assert json.loads((tmp_path / "qasper.predictions.json").read_text()) == ANSWERS
    report = json.loads((tmp_path / "qasper.json").read_text())
    assert (report["metric"], report["scores"]["score"]) == ("f1", 75.0)
    with (tmp_path / "scrolls.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["Task"], row["ID"]) for row in rows] == [
        ("gov_report", "b"),
        ("gov_report", "a"),
        ("qasper", "b"),
        ("qasper", "a"),
    ]
    assert rows[2] == {"Task": "qasper", "ID": "b", "Prediction": 'x, "z"\n'}
    table = results_table(tmp_path)
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["gov_report", "qasper"]
    assert table.splitlines()[3].split() == ["qasper", "validation", "2", "f1", "75.00"]


def test_table_has_the_benchmarks_mean_once_all_seven_tasks_have_results_of_one_split(tmp_path):
    for index, task in enumerate(TASKS.values()):
        assert "\nmean" not in results_table(tmp_path)
        write_results(tmp_path, task, _about({"score": 10.0 * index}), ANSWERS)
    assert results_table(tmp_path).splitlines()[-1].split() == ["mean", "30.00"]
    write_results(tmp_path, task, _about(None, "test"), ANSWERS)
    table = results_table(tmp_path)
    assert "\nmean" not in table and "no outputs" in table
    write_results(tmp_path, task, _about({"score": 1.0}, "train"), ANSWERS)
    assert "\nmean" not in results_table(tmp_path)
    write_results(tmp_path, task, _about({"score": 1.0}, limit=2), ANSWERS)
    table = results_table(tmp_path)
    assert "\nmean" not in table and "2 spread evenly" in table


def test_submission_is_of_one_split(tmp_path):
    for name, split in (("qasper", "validation"), ("quality", "test"), ("qmsum", "test")):
        write_results(tmp_path, TASKS[name], _about(None, split), ANSWERS)
    with (tmp_path / "scrolls.csv").open(newline="") as file:
        assert {row["Task"] for row in csv.DictReader(file)} == {"quality", "qmsum"}


@pytest.mark.parametrize("content", ["{", "{}", "[1]", '{"scores": {}, "split": "test"}'])
def test_damaged_results_are_named(tmp_path, content):
    (tmp_path / "qasper.json").write_text(content)
    with raises(DataError, "qasper", location=tmp_path, remedy="--output"):
        results_table(tmp_path)
