"""Fine-tuning tasks as a user types them: raw files, dataset, training, export, answers, table."""

import csv
import json
from pathlib import Path

import pytest

pytest.importorskip("rouge_score", reason="rouge_score is not installed")

from megatron_bipe.errors import ConfigError
from megatron_bipe.eval.sequences import spread_order
from megatron_bipe.tasks.scrolls.tasks import TASKS, questions, read_rows
from tests.helpers.commands import flags
from tests.helpers.errors import assert_error
from tests.helpers.scrolls import write_benchmark
from tests.helpers.small_runs import losses
from tests.helpers.tools import call_tool, pretrain_error, run_pretrain

MODEL = "model={num_layers: 2, hidden_size: 32, num_heads: 4, ffn_size: 64, intra_size: 32, "
SUMMARY_LENGTH, QUESTION_LENGTH = 1100, 320


def length_of(task: str) -> int:
    return SUMMARY_LENGTH if TASKS[task].metric == "rouge" else QUESTION_LENGTH


@pytest.fixture(scope="module")
def scrolls(tmp_path_factory, letters):
    """Write data of every task, and train a model for each form of task."""
    folder = tmp_path_factory.mktemp("scrolls")
    write_benchmark(folder / "raw")
    for name in TASKS:
        raw = ("--task", name, "--data", folder / "raw", "--length", length_of(name), "--segments", "newline")
        tokenizer = ("--tokenizer", letters.definition.parent)
        call_tool("prepare_task", "scrolls", *raw, *tokenizer, "--output", folder / name)
    for length in (SUMMARY_LENGTH, QUESTION_LENGTH):
        paths = ", ".join(str(folder / name) for name in TASKS if length_of(name) == length)
        settings = flags(
            [
                f"run_dir={folder / 'run' / str(length)}",
                f"data.path=[{paths}]",
                f"{MODEL}vocab_size: {letters.vocab_size}}}",
                "optimizer={lr: 1e-2, warmup_steps: 2}",
                f"train={{steps: 6, seq_len_tokens: {length}, global_batch: 8, micro_batch: 2, precision: fp32}}",
            ]
        )
        run_pretrain([*settings, "--stop-step", 3], folder / "first", 2)
        run_pretrain(settings, folder / "second", 2)
        output = folder / "exported" / str(length)
        call_tool("export_hf", "--checkpoint", folder / "run" / str(length), "--output", output)
    return folder


def test_training_on_answers_learns_and_continues(scrolls):
    for length in (SUMMARY_LENGTH, QUESTION_LENGTH):
        found = losses(scrolls / "run" / str(length))
        assert len(found) == 6 and found[-1] < found[0] - 0.5


def test_every_task_is_answered_and_scored_into_one_table(scrolls):
    results = scrolls / "results"
    for name in TASKS:
        length = length_of(name)
        all_questions = questions(read_rows(scrolls / "raw", name, "validation"))
        asked = [all_questions[index] for index in sorted(spread_order(len(all_questions))[:2])]
        given = ("--model", scrolls / "exported" / str(length), "--task", name, "--data", scrolls / "raw")
        output = call_tool("evaluate", "scrolls", *given, "--length", length, "--limit", 2, "--output", results).output
        predictions = json.loads((results / f"{name}.predictions.json").read_text())
        assert list(predictions) == [question.id for question in asked]
        scores = json.loads((results / f"{name}.json").read_text())["scores"]
        assert 0 <= scores["score"] <= 100
    assert all(name in output for name in TASKS) and "\nmean" not in output  # of 2 of each
    with (results / "scrolls.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14 and rows[0].keys() == {"Task", "ID", "Prediction"}


def test_bad_commands_exit_with_code_2_and_one_message(scrolls):
    common = ("scrolls", "--model", scrolls / "exported" / str(QUESTION_LENGTH), "--data", scrolls / "raw")
    cases: dict[str, list[object]] = {
        "squad": ["--task", "squad"],
        "qasper": ["--task", "qasper", "--length", 100],
        "qasper.json": ["--task", "qasper"],
        "qasper/dev.jsonl": ["--task", "qasper", "--split", "dev", "--overwrite"],
    }
    (scrolls / "bad").mkdir()
    (scrolls / "bad" / "qasper.json").write_text("{}")
    for observed, further in cases.items():
        target: Path = scrolls / ("bad" if observed == "qasper.json" else "none")
        output = call_tool("evaluate", *common, *further, "--output", target, code=2).output
        assert output.count("Error: ") == 1 and observed in output, output
    settings = [f"data.path={scrolls / 'qasper'}", f"run_dir={scrolls / 'other'}", "train.seq_len_tokens=64"]
    assert_error(pretrain_error(*flags(settings)), ConfigError, QUESTION_LENGTH, 64)
    assert not (scrolls / "other").exists()


def test_arithmetic_from_problems_to_accuracy(tmp_path):
    made = ("arithmetic", "--operators", "1..2", "--length", 16)
    for name, further in (("data", ["--problems", 4000]), ("valid", ["--problems", 64, "--held-out"])):
        call_tool("prepare_task", *made, *further, "--output", tmp_path / name)
    settings = [
        f"run_dir={tmp_path / 'run'}",
        f"data={{path: {tmp_path / 'data'}, valid_path: {tmp_path / 'valid'}}}",
        f"{MODEL}vocab_size: 21}}",
        "optimizer={lr: 1e-2, warmup_steps: 5}",
        "train={steps: 60, seq_len_tokens: 16, global_batch: 64, micro_batch: 32, precision: fp32, valid_samples: 64}",
    ]
    run_pretrain(flags(settings), tmp_path / "logs", 2)
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 1
    call_tool("export_hf", "--checkpoint", tmp_path / "run", "--output", tmp_path / "model")
    solve = ("arithmetic", "--model", tmp_path / "model", "--problems", 20)
    output = call_tool("evaluate", *solve, "--operators", "1..3", "--output", tmp_path / "results").output
    assert "operators" in output and "%" in output
    [model] = json.loads((tmp_path / "results" / "arithmetic.json").read_text())["models"]
    assert [result["operators"] for result in model["results"]] == [1, 2, 3]
    assert all(result["num_problems"] == 20 for result in model["results"])
    again = call_tool("evaluate", *solve, "--operators", "1..3", "--output", tmp_path / "results", code=2)
    assert "arithmetic.json" in again.output
    assert "a..3" in call_tool("evaluate", *solve, "--operators", "a..3", "--output", tmp_path / "r", code=2).output
