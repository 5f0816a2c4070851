"""Fine-tuning tasks as a user types them: raw files, dataset, training, export, answers, table."""

import csv
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("rouge_score", reason="rouge_score is not installed")

from megatron_bipe.data.scrolls import TASKS
from megatron_bipe.data.scrolls_files import questions, read_rows
from megatron_bipe.eval.generation import load_generator
from megatron_bipe.eval.scrolls import answer, score_answers, write_results
from tests.e2e.test_line import pretrain, python
from tests.helpers.scrolls import write_benchmark

MODEL = "model={num_layers: 2, hidden_size: 32, num_heads: 4, ffn_size: 64, intra_size: 32, "
SUMMARY_LENGTH, QUESTION_LENGTH = 1100, 320
BY_COMMAND = ("gov_report", "contract_nli")  # the first and the last
LOSS = "loss/train_nats"


def _losses(run_dir: Path) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line[LOSS] for line in lines if LOSS in line]


@pytest.fixture(scope="module")
def scrolls(tmp_path_factory, letters, free_port):
    """Data of every task; for each form of task a model that was trained on some of them."""
    folder = tmp_path_factory.mktemp("scrolls")
    write_benchmark(folder / "raw")
    for name, task in TASKS.items():
        length = SUMMARY_LENGTH if task.metric == "rouge" else QUESTION_LENGTH
        command = ["--task", name, "--data", folder / "raw", "--length", length, "--segments", "newline"]
        tokenizer = ["--tokenizer", letters.definition.parent]
        python("tools/prepare_task.py", "scrolls", *command, *tokenizer, "--output", folder / name)
    for form, length in (("rouge", SUMMARY_LENGTH), ("other", QUESTION_LENGTH)):
        names = [name for name, task in TASKS.items() if (task.metric == "rouge") == (form == "rouge")]
        settings = [
            f"run_dir={folder / 'run' / form}",
            f"data.path=[{', '.join(str(folder / name) for name in names)}]",
            f"{MODEL}vocab_size: {letters.vocab_size}}}",
            "optimizer={lr: 1e-2, warmup_steps: 2}",
            f"train={{steps: 6, seq_len_tokens: {length}, global_batch: 8, micro_batch: 2, precision: fp32}}",
        ]
        pretrain("--stop-step", 3, settings=settings, ranks=2, port=free_port())
        pretrain(settings=settings, ranks=2, port=free_port())
        checkpoint, output = folder / "run" / form, folder / "exported" / form
        python("tools/export_hf.py", "--checkpoint", checkpoint, "--output", output)
    return folder


def test_training_on_answers_learns_and_goes_on(scrolls):
    for form in ("rouge", "other"):
        losses = _losses(scrolls / "run" / form)
        assert len(losses) == 6 and losses[-1] < losses[0] - 0.5


def test_every_task_is_answered_and_scored_into_one_table(scrolls):
    results, generators = scrolls / "results", {}
    for name, task in TASKS.items():
        model = scrolls / "exported" / ("rouge" if task.metric == "rouge" else "other")
        length = SUMMARY_LENGTH if task.metric == "rouge" else QUESTION_LENGTH
        asked = questions(read_rows(scrolls / "raw", name, "validation"))[:2]
        if name in BY_COMMAND:
            command = ["tools/evaluate.py", "scrolls", "--model", model, "--task", name, "--data", scrolls / "raw"]
            output = python(*command, "--length", length, "--limit", 2, "--output", results)
        else:  # the same without the time that a process takes to start
            if model not in generators:
                generators[model] = load_generator(model, "cpu", torch.float32)
            answers = answer(generators[model], task, asked, length, 65_536)
            about = {"split": "validation", "num_examples": 2, "scores": score_answers(task, asked, answers)}
            about["limit"] = 2
            write_results(results, task, about, answers)
        predictions = json.loads((results / f"{name}.predictions.json").read_text())
        assert list(predictions) == [question.id for question in asked]
        scores = json.loads((results / f"{name}.json").read_text())["scores"]
        assert 0 <= scores["score"] <= 100
    assert all(name in output for name in TASKS) and "\nmean" not in output  # of the first 2 of each
    with (results / "scrolls.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14 and rows[0].keys() == {"Task", "ID", "Prediction"}


def test_bad_commands_leave_with_code_2_and_one_message(scrolls, free_port):
    command = ["tools/evaluate.py", "scrolls", "--model", scrolls / "exported" / "other", "--data", scrolls / "raw"]
    cases = {
        "no SCROLLS task": ["--task", "squad"],
        "hold no prompt of qasper": ["--task", "qasper", "--length", 100],
        "there is already qasper.json": ["--task", "qasper"],
        "it has no qasper/dev.jsonl": ["--task", "qasper", "--split", "dev", "--overwrite"],
    }
    (scrolls / "bad").mkdir()
    (scrolls / "bad" / "qasper.json").write_text("{}")
    for message, further in cases.items():
        target = "bad" if "already" in message else "none"
        output = python(*command, *further, "--output", scrolls / target, code=2)
        assert output.count("Error: ") == 1 and message in output, output
    settings = [f"data.path={scrolls / 'qasper'}", f"run_dir={scrolls / 'other'}", "train.seq_len_tokens=64"]
    output = pretrain(settings=settings, ranks=1, port=free_port(), code=2)
    assert "examples made for windows of 320" in output and not (scrolls / "other").exists()


def test_arithmetic_from_problems_to_accuracy(tmp_path, free_port):
    made = ["arithmetic", "--operators", "1..2", "--length", 16]
    for name, further in (("data", ["--problems", 4000]), ("valid", ["--problems", 64, "--held-out"])):
        python("tools/prepare_task.py", *made, *further, "--output", tmp_path / name)
    settings = [
        f"run_dir={tmp_path / 'run'}",
        f"data={{path: {tmp_path / 'data'}, valid_path: {tmp_path / 'valid'}}}",
        f"{MODEL}vocab_size: 21}}",
        "optimizer={lr: 1e-2, warmup_steps: 5}",
        "train={steps: 60, seq_len_tokens: 16, global_batch: 64, micro_batch: 32, precision: fp32, valid_samples: 64}",
    ]
    pretrain(settings=settings, ranks=2, port=free_port())
    losses = _losses(tmp_path / "run")
    assert losses[-1] < losses[0] - 1
    python("tools/export_hf.py", "--checkpoint", tmp_path / "run", "--output", tmp_path / "model")
    command = ["tools/evaluate.py", "arithmetic", "--model", tmp_path / "model", "--problems", 20]
    output = python(*command, "--operators", "1..3", "--output", tmp_path / "results")
    assert "operators" in output and "%" in output
    [model] = json.loads((tmp_path / "results" / "arithmetic.json").read_text())["models"]
    assert [result["operators"] for result in model["results"]] == [1, 2, 3]
    assert all(result["num_problems"] == 20 for result in model["results"])
    again = python(*command, "--operators", "1..3", "--output", tmp_path / "results", code=2)
    assert "there is already arithmetic.json" in again
    assert "no range" in python(*command, "--operators", "a..3", "--output", tmp_path / "r", code=2)
