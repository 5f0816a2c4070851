"""What a start records: code, versions, hosts, settings, without secrets, in a bounded size, and never fatally."""

import json
import subprocess

import pytest

from megatron_bipe.config import load_run_config
from megatron_bipe.data.manifest import DataRecord
from megatron_bipe.run_files import read_events
from megatron_bipe.runtime.hardware import Choices, CompileChoice, PrecisionChoice
from megatron_bipe.runtime.preemption import StopRequest
from megatron_bipe.train import provenance
from megatron_bipe.train.profile import Profile
from megatron_bipe.train.provenance import Given, describe_start, git_state, hide_secrets, last_line, own_settings
from megatron_bipe.train.trainer import Trainer
from tests.helpers.loop import MAIN, Notes


@pytest.fixture
def run(tmp_path):
    return load_run_config(None, [f"run_dir={tmp_path}", "train.precision=fp32", "alerts.webhook=http://host/SECRET"])


RECORD = DataRecord.model_validate(
    {
        "tokenizer": {"name": "t", "fingerprint": "a" * 64, "vocab_size": 400, "special_ids": {"end": 0}},
        "rule": {"spec": "newline", "token_ids": [13]},
        "fingerprint": "b" * 64,
    }
)


@pytest.fixture
def given(tmp_path):
    choices = Choices(PrecisionChoice("fp32", "auto: a CPU"), CompileChoice(False, "auto: not on a CPU"))
    settings = {"zero_optimization": {"stage": 2}}
    return Given(tmp_path / "ds.json", settings, choices, ["optimizer"], stop_step=2, profile_steps=0)


class ManyRanks:
    """Collectives of 1,024 nodes with 8 ranks each."""

    def all_gather_object(self, thing):
        host, device = thing
        return [[f"{host}-{rank // 8:04d}.cluster.example", device] for rank in range(8192)]


def test_start_event_has_the_provenance(run, given, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["pretrain.py", "--set", "alerts.webhook=http://host/SECRET", "--allow", "optimizer"]
    )
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    notes = Notes(tmp_path)
    facts = describe_start(run, MAIN, notes.host, given, RECORD)
    trainer = Trainer(run, MAIN, notes, notes, notes, StopRequest(), Profile(0, tmp_path, MAIN), facts)
    assert trainer.run(2)
    start = read_events(tmp_path)[0]
    assert (start["event"], start["step"], start["ranks"]) == ("start", 0, 1)
    assert start["command"].endswith("pretrain.py --set 'alerts.webhook=(hidden)' --allow optimizer")
    assert start["deepspeed"] == {"file": str(given.ds_file), "settings": given.ds_settings} and start["zero"] == 2
    assert (start["data"], start["tokenizer"], start["segments"]) == ("b" * 64, "a" * 64, "newline")
    assert start["precision"] == {"precision": "fp32", "reason": "auto: a CPU"} and start["allow"] == ["optimizer"]
    assert start["environment"]["NCCL_DEBUG"] == "INFO" and sum(start["hosts"].values()) == 1
    assert {"python", "torch", "deepspeed", "source"} <= start["versions"].keys()
    assert start["launched_at"] < start["time"] and start["before"] is None
    assert start["settings"]["alerts.webhook"] == "(hidden)"
    assert "SECRET" not in json.dumps(start)


def test_size_does_not_grow_with_the_ranks(run, given):
    facts = describe_start(run, MAIN._replace(num_ranks=8192), ManyRanks(), given, RECORD)
    assert len(json.dumps(facts)) < 12_000
    assert len(facts["hosts"]) == 64 and facts["more_hosts"] == 1024 - 64
    assert list(facts["devices"].values()) == [8192]


def test_only_the_main_rank_describes_the_start(run, given):
    assert describe_start(run, MAIN._replace(rank=1), Notes.host, given, RECORD) == {}


def test_facts_that_cannot_be_found_are_null(run, given, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(provenance, "versions", fail)
    monkeypatch.setattr(provenance, "run_command", fail)
    facts = describe_start(run, MAIN, Notes.host, given, RECORD)
    assert facts["versions"] is None and facts["code"] is None and facts["zero"] == 2


def test_git_state(tmp_path):
    package = tmp_path / "package"
    package.mkdir()

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    assert git_state(package) is None
    git("init")
    (package / "__init__.py").touch()
    assert git_state(package) is None  # inside a checkout that does not track it
    git("add", ".")
    git("commit", "-m", "one")
    state = git_state(package)
    assert state is not None and len(state["commit"]) == 40 and state["dirty"] is False
    (package / "__init__.py").write_text("1\n")
    assert git_state(package) == {"commit": state["commit"], "dirty": True}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", None),
        (b'{"step": 1, "time": 2.0}\n', {"step": 1, "time": 2.0}),
        (b'{"step": 1, "time": 2.0}\n{"step": 2, "ti', {"step": 1, "time": 2.0}),
        (b'{"step": 1}\n[]\n\x00\n' + b"x" * 100 + b"\n", {"step": 1, "time": None}),
        (b'{"step": 1, "time": 2.0}\n' * 9999 + b'{"step": 7, "time": 3.0}\n', {"step": 7, "time": 3.0}),
    ],
)
def test_last_line(tmp_path, content, expected):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    assert last_line(path) == expected


@pytest.mark.parametrize("word", ["alerts.webhook=S", "alerts={webhook: S}", "--set=alerts.webhook=S"])
def test_secrets_are_hidden(word):
    assert "S" not in hide_secrets(f"a '{word}' b".replace("--set", "--x"))


def test_own_settings_are_those_that_differ_from_defaults():
    run = load_run_config(None, ["train.steps=7", "data.path={a/b: 1, c/d: 2}"])
    assert own_settings(run) == {"train.steps": 7, "data.path": {"a/b": 1.0, "c/d": 2.0}}
