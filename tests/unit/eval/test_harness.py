"""lm-evaluation-harness on an exported model, offline, against the training model on the same tokens."""

import json
import math
import os
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.segments import bilevel_ids, segment_ends, sequence_ends
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.eval.eval_model import load_exported_model
from megatron_bipe.eval.perplexity import EvalSettings, evaluate_perplexity
from megatron_bipe.hf.export import ExportOptions, export_model
from megatron_bipe.hf.hf_config import DataFields
from megatron_bipe.hf.tokenizer_files import TokenizerSource
from tests.helpers.errors import raises

harness = pytest.importorskip("megatron_bipe.eval.harness", reason="lm_eval is not installed", exc_type=ImportError)

LENGTH = 32  # tokens of a sequence
TEXT = "the first line. it ends here.\nanother one\n\nand <s> some more of it \u4e16 " * 5
TEXT = TEXT[: 8 * LENGTH]  # one token per character; in a shorter last sequence the harness uses more context
QUESTIONS = [
    {"text": "where\nit is", "choices": [" there.", "\nhere", "x"], "label": 1},
    {"text": "one. two.", "choices": [" three", "  \u00e9 \n."], "label": 0},
]
COMMON = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
TASKS = {
    "our_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "our_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {"our_choice": QUESTIONS, "our_text": [{"text": TEXT}, {"text": TEXT[7:40]}]}
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        about = COMMON | task | {"task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(about))
    return folder


@pytest.fixture(scope="module", autouse=True)
def tasks_read_once(tasks):
    """The harness's own tasks are thousands of files: they are read once, not for each test."""
    manager = harness.TaskManager(include_path=tasks)
    with mock.patch.object(harness, "TaskManager", return_value=manager) as made:
        yield
    assert all(call.kwargs == {"include_path": tasks} for call in made.call_args_list)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, write_text_dataset):
    """A dataset that has the text as its one document."""
    folder = tmp_path_factory.mktemp("data")
    write_text_dataset(folder, [[TEXT]])
    return TokenDataset(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory, dataset, make_eval_model):
    """Exported models with their tokenizer, by encoding."""
    tokenizer = load_tokenizer(dataset.path / "tokenizer")
    source = TokenizerSource(tokenizer.definition, tokenizer.to_json(), {"bos": 1}, tokenizer.encode_batch)
    fields = DataFields(dataset.rule.spec, dataset.rule.token_ids, tokenizer.fingerprint, {"bos": 1})
    folders = {}
    for encoding in ("bipe_rope", "bipe_alibi", "rope"):
        eval_model = make_eval_model(encoding, vocab_size=tokenizer.vocab_size, train_len_tokens=LENGTH)
        sequences = ids_of(dataset.tokens(0, 20)[None].astype(np.int64), dataset.rule, eval_model.config)
        folders[encoding] = tmp_path_factory.mktemp(encoding) / "model"
        options = ExportOptions(dtype=torch.float32)
        export_model(
            eval_model.model.state_dict(),
            eval_model.config,
            folders[encoding],
            fields,
            sequences,
            source,
            options,
        )
    return folders


def ids_of(tokens, rule, config):
    arrays = (tokens, *bilevel_ids(sequence_ends(segment_ends(tokens, rule), rule), config.intra_size - 1))
    return tuple(map(torch.from_numpy, arrays))


def log_likelihoods(eval_model, tokens):
    """Return the log-likelihood of each token but the first, by the training model in one sequence."""
    ids = ids_of(np.array([tokens[:-1]]), eval_model.rule, eval_model.config)
    with torch.no_grad():
        return eval_model.model(ids).log_softmax(-1)[0].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].double()


def check_choices(found, folder):
    """Compare each option's log-likelihood with the training model's on BOS, question, option."""
    eval_model, tokenizer = load_exported_model(folder), load_tokenizer(folder)
    for question, options in zip(QUESTIONS, found, strict=True):
        for option, value in zip(question["choices"], options, strict=True):
            short, whole = tokenizer.encode_batch([question["text"], question["text"] + option])
            assert whole[: len(short)].tolist() == short.tolist()
            expected = log_likelihoods(eval_model, [1, *whole.tolist()])[len(short) :].sum()
            assert value == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("encoding", ["bipe_rope", "bipe_alibi", "rope"])
def test_harness_gives_our_log_likelihoods_and_perplexity(encoding, models, dataset, tasks):
    folder = models[encoding]
    settings = harness.HarnessSettings(include_path=tasks, batch_size=3)
    results = harness.run_tasks(folder, ["our_choice", "our_text"], settings)
    samples = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in results["samples"].items()}
    check_choices([[value[0] for value in row["filtered_resps"]] for row in samples["our_choice"]], folder)
    ours = evaluate_perplexity(load_exported_model(folder), dataset, LENGTH, EvalSettings())
    [found, _] = [row["filtered_resps"][0] for row in samples["our_text"]]
    assert ours.num_predictions == 8 * LENGTH
    assert math.exp(-found / ours.num_predictions) == pytest.approx(ours.perplexity, rel=1e-5)
    assert perplexity_by_hand(folder, dataset) == pytest.approx(ours.perplexity, rel=1e-5)


def perplexity_by_hand(folder, dataset):
    """Return what plain transformers computes in adjacent sequences, each token predicted from those before it."""
    hf_model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = torch.from_numpy(dataset.tokens(0, 8 * LENGTH + 1).astype(np.int64))
    with torch.no_grad():
        logits = hf_model(tokens[:-1].view(8, LENGTH)).logits
    return float(F.cross_entropy(logits.flatten(0, 1).double(), tokens[1:]).exp())


COMMANDS = """
import json, runpy, sys
from unittest import mock

import lm_eval.tasks

tasks, models, output = json.loads(sys.argv[1])
manager = lm_eval.tasks.TaskManager(include_path=tasks, include_defaults=False)  # these are thousands of files
with mock.patch("lm_eval.tasks.TaskManager", return_value=manager):
    for encoding, folder in models.items():
        sys.argv[:] = ["lm_eval", "--model", "hf", "--tasks", "our_choice", "--include_path", tasks, "--device", "cpu"]
        sys.argv += ["--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32"]
        sys.argv += ["--output_path", f"{output}/{encoding}", "--log_samples"]
        runpy.run_module("lm_eval", run_name="__main__")
"""


@pytest.mark.slow
def test_harness_from_its_own_command_line_gives_our_log_likelihoods(models, tasks, tmp_path):
    question = json.dumps([str(tasks), {encoding: str(folder) for encoding, folder in models.items()}, str(tmp_path)])
    command = [sys.executable, "-c", COMMANDS, question]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    for encoding, folder in models.items():
        [file] = (tmp_path / encoding).rglob("samples_our_choice*.jsonl")
        rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
        check_choices([[float(value[0]) for value in row["filtered_resps"]] for row in rows], folder)


@pytest.mark.parametrize("encoding", ["bipe_rope", "bipe_alibi", "rope"])
def test_run_tasks_with_bad_input_refuses(encoding, models, tasks, tmp_path):
    folder = shutil.copytree(models[encoding], tmp_path / "model")
    settings = harness.HarnessSettings(include_path=tasks)
    with raises(ConfigError, "'our_choise'", "our_choice", location="--tasks"):
        harness.run_tasks(folder, ["our_choise"], settings)
    with raises(CheckpointError, "config.json", location=tmp_path):
        harness.run_tasks(tmp_path, ["our_choice"], settings)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with raises(CheckpointError, "tokenizer", location=folder):
        harness.run_tasks(folder, ["our_choice"], settings)


@pytest.mark.parametrize(
    "line",
    [
        "process_docs: !function utils.run",
        "process_docs: !fun%63tion utils.run",
        "process_docs: !!python/name:utils.run",
        "group: {task: [{process_docs: !function utils.run}]}",
        "include: ../other.yaml",
        "'include': /other.yaml",
        '"\\u0069nclude": ../other.yaml',
        "include: [a.yaml]",
        "metric_list: [{metric: ./utils.py}]",
    ],
)
def test_task_files_that_name_code_are_refused(models, tmp_path, line):
    file = tmp_path / "tasks" / "inner" / "a.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"task: a\n{line}\n")
    settings = harness.HarnessSettings(include_path=tmp_path / "tasks")
    named = line.split()[-1].strip("[]{}").removeprefix("!!")
    with raises(ConfigError, named, location=file, remedy="--trust-remote-code"):
        harness.run_tasks(models["rope"], ["a"], settings)


def test_task_files_that_name_code_by_a_handle_or_an_included_file_are_refused(models, tmp_path):
    settings = harness.HarnessSettings(include_path=tmp_path)
    (tmp_path / "a.yaml").write_text("%TAG !e! !fun\n---\ntask: a\nprocess_docs: !e!ction utils.run\n")
    with raises(ConfigError, "!function", "utils.run", location=tmp_path / "a.yaml"):
        harness.run_tasks(models["rope"], ["a"], settings)
    (tmp_path / "a.yaml").write_text("task: a\ninclude: common\n")
    (tmp_path / "common").write_text("process_docs: !function utils.run\n")
    with raises(ConfigError, "utils.run", location=tmp_path / "common"):
        harness.run_tasks(models["rope"], ["a"], settings)


def test_templates_that_call_python_code_are_refused(models, tasks, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    folder = shutil.copytree(tasks, tmp_path / "tasks")
    file = next(file for file in folder.rglob("*.yaml") if "our_choice" in file.read_text())
    marker = tmp_path / "ran"
    call = f"{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}}"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"doc_to_text": call}))
    manager = TaskManager(include_path=folder, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", lambda **_: manager)
    with raises(ConfigError, "__init__", remedy="--trust-remote-code"):
        harness.run_tasks(models["rope"], ["our_choice"], harness.HarnessSettings(include_path=folder))
    assert not marker.exists()
