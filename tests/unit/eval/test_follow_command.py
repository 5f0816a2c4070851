"""`tools/evaluate.py follow` from the outside: all kinds of evaluations, options, exit codes, signals."""

import json
import os
import shutil
import signal

import pytest
import torch
import yaml

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import PromptAnswerRecord
from megatron_bipe.errors import CheckpointError, ConfigError, DataError
from megatron_bipe.eval import follow as follower
from megatron_bipe.eval import follow_kinds
from megatron_bipe.runtime.child_processes import STOP_SIGNALS
from megatron_bipe.runtime.preemption import EXIT_RESUMABLE
from tests.helpers.tools import assert_refuses, call_tool

harness = pytest.importorskip("megatron_bipe.eval.harness", reason="lm_eval is not installed", exc_type=ImportError)

TEXT = "the first line. it ends here.\nanother one\n\nand some more of it " * 4
TASK = {
    "task": "our_choice",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}],
    "metadata": {"version": 1},
}
PERPLEXITY = ("--lengths", "8,16", "--device", "cpu", "--once")


@pytest.fixture(autouse=True)
def own_settings(monkeypatch, tmp_path):
    """Signal handlers and threads, which the command sets, are those of before; nothing is downloaded."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def text_data(tmp_path_factory, write_text_dataset):
    folder = tmp_path_factory.mktemp("text") / "valid"
    write_text_dataset(folder, [[TEXT]])
    return TokenDataset(folder)


@pytest.fixture
def run(text_data, make_eval_model, save_run):
    """The folder of a run with checkpoints of steps 5 and 10, and its tokenizer."""
    record = text_data.manifest.tokenizer
    changes = {"vocab_size": record.vocab_size, "fingerprint": record.fingerprint}
    run_dir = save_run(make_eval_model(name="run", rule=text_data.rule, **changes), text_data)
    shutil.copytree(text_data.path / "tokenizer", run_dir / "tokenizer")
    return run_dir


@pytest.fixture
def task_files(tmp_path, monkeypatch):
    """A folder with one task; the harness's own thousands of task files are not read."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "our_choice.jsonl"
    data.write_text(json.dumps({"text": "where it is", "choices": [" there.", " here"], "label": 1}) + "\n")
    (folder / "our_choice.yaml").write_text(
        yaml.safe_dump(TASK | {"dataset_kwargs": {"data_files": {"test": str(data)}}})
    )
    manager = harness.TaskManager(include_path=folder, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", lambda **_: manager)
    return folder


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]


def test_follow_makes_all_kinds_of_evaluations_with_the_values_of_their_commands(run, text_data, task_files, tmp_path):
    kinds = ("--do", "perplexity,harness,generate", "--data", text_data.path, "--tasks", "our_choice", *PERPLEXITY)
    given = ("follow", run, *kinds, "--include", task_files, "--prompt", "and ", "--max-new-tokens", 4, "--every", 10)
    call_tool("evaluate", *given)
    found = {(line["kind"], line.get("length_tokens")): line for line in lines(run)}
    assert {line["step"] for line in lines(run)} == {10} and len(lines(run)) == 4
    assert not (run / "following").exists()

    out = tmp_path / "out"
    call_tool(
        *("evaluate", "perplexity", "--model", run, "--data", text_data.path, "--lengths", "8,16"),
        *("--device", "cpu", "--output", out),
    )
    [model] = json.loads((out / "perplexity.json").read_text())["models"]
    for result in model["results"]:
        values = found["perplexity", result["length_tokens"]]["values"]
        assert values == {key: pytest.approx(result[key]) for key in values}
    assert found["perplexity", 8]["data"] == "valid"

    call_tool("export_hf", "--checkpoint", run, "--output", tmp_path / "model")
    call_tool(
        *("evaluate", "harness", "--model", tmp_path / "model", "--tasks", "our_choice", "--include", task_files),
        *("--device", "cpu", "--output", out),
    )
    expected = json.loads((out / "harness.json").read_text())["results"]["our_choice"]
    assert found["harness", None]["task"] == "our_choice"
    assert found["harness", None]["values"]["acc"] == expected["acc,none"]

    options = ("--max-new-tokens", 4, "--temperature", 0, "--device", "cpu", "--dtype", "fp32")
    printed = call_tool("generate", "--model", tmp_path / "model", "--prompt", "and ", *options).output
    assert found["generate", None]["prompt"] == "and "
    assert found["generate", None]["values"]["text"] in printed


def configure(run_dir, valid, **train):
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["data"] = {"valid": {name: str(folder) for name, folder in valid.items()}}
    config["train"] |= train
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))


def test_follow_reads_the_text_of_the_run_s_validations_in_its_precision(run, text_data):
    settings = {"valid_lengths": [16, 8], "valid_samples": 3, "seq_len_tokens": 16, "precision": "bf16"}
    configure(run, {"books": text_data.path}, **settings)
    call_tool("evaluate", "follow", run, "--device", "cpu", "--once", "--threads", 2)
    assert [(line["data"], line["length_tokens"]) for line in lines(run)] == [("books", 8), ("books", 16)] * 2
    assert {(line["max_tokens"], line["dtype"], line["protocol"]) for line in lines(run)} == {(48, "bfloat16", "full")}
    assert {line["values"]["num_predictions"] for line in lines(run)} == {47}
    assert torch.get_num_threads() == 2
    call_tool("evaluate", "follow", run, "--device", "cpu", "--once", "--max-tokens", 30, "--dtype", "fp32")
    assert {(line["max_tokens"], line["dtype"]) for line in lines(run)[4:]} == {(30, "float32")}


def test_follow_skips_validation_sets_of_prompts_and_answers(run, text_data, tmp_path, write_dataset):
    examples = PromptAnswerRecord(task="noise", seq_len_tokens=8)
    write_dataset(tmp_path / "qa", [[[3, 4], [6]] * 9], examples=examples)
    configure(run, {"qa": tmp_path / "qa", "books": text_data.path}, seq_len_tokens=8)
    assert "qa" in call_tool("evaluate", "follow", run, "--device", "cpu", "--once").output
    assert {line["data"] for line in lines(run)} == {"books"}
    configure(run, {"qa": tmp_path / "qa"})
    assert_refuses("evaluate", ("follow", run, "--once"), ConfigError, "1 validation", location="--data")


def test_follow_exit_code_is_1_after_a_failure_and_names_it(run, text_data):
    (run / "checkpoints" / "step-00000005" / "rank-00000.safetensors").write_bytes(b"damaged")
    output = call_tool("evaluate", "follow", run, "--data", text_data.path, *PERPLEXITY, code=1).output
    assert "step 5" in output.splitlines()[-1] and "rank-00000" in output.splitlines()[-1]
    assert {line["step"] for line in lines(run)} == {10}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_follow_asked_to_stop_ends_after_the_current_evaluation(run, text_data, monkeypatch, number):
    evaluate = follow_kinds.evaluate_perplexity

    def evaluate_and_stop(*arguments):
        os.kill(os.getpid(), number)
        return evaluate(*arguments)

    monkeypatch.setattr(follow_kinds, "evaluate_perplexity", evaluate_and_stop)
    given = ("follow", run, "--data", text_data.path, *PERPLEXITY[:-1])
    assert number.name in call_tool("evaluate", *given, code=EXIT_RESUMABLE).output
    assert len(lines(run)) == 1


def test_follow_on_a_full_disk_names_the_file(run, text_data, monkeypatch):
    def fail(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(follower.os, "fsync", fail)
    given = ("follow", run, "--data", text_data.path, *PERPLEXITY)
    assert_refuses("evaluate", given, DataError, "full", location="evaluations.jsonl")


def test_follow_bad_input_is_named_before_anything_is_evaluated(run, text_data, tmp_path, make_eval_model):
    def refuses(kind, *observed, run_dir=run, given=("--data", text_data.path), location=None):
        assert_refuses("evaluate", ("follow", run_dir, "--once", *given), kind, *observed, location=location)

    refuses(CheckpointError, run_dir=tmp_path / "absent", location="absent")
    refuses(ConfigError, "chat", given=("--do", "perplexity,chat"), location="--do")
    refuses(ConfigError, "harness", given=("--do", "harness"), location="--tasks")
    refuses(ConfigError, "generate", given=("--prompt", "a"), location="--prompt")
    refuses(ConfigError, given=(), location="--data")
    for option, value in (
        ("--every", 0),
        ("--threads", 0),
        ("--poll-s", 0),
        ("--max-new-tokens", 0),
        ("--temperature", -1),
    ):
        refuses(ConfigError, value, given=(option, value), location=option)
    refuses(ConfigError, "'x'", given=("--lengths", "x"), location="--lengths")
    refuses(DataError, given=("--data", tmp_path / "none"), location="none")
    refuses(DataError, 4096, given=("--data", text_data.path, "--lengths", "4096"), location="valid")
    assert not (run / "evaluations.jsonl").exists()


def test_follow_unknown_task_is_named_before_anything_is_evaluated(run, task_files):
    given = ("follow", run, "--once", "--do", "harness", "--tasks", "our_choise", "--include", task_files)
    assert_refuses("evaluate", given, ConfigError, "our_choise", "our_choice", location="--tasks")
