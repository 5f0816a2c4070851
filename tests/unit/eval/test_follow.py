"""The follower of a run: every checkpoint is evaluated once, whatever happens to files, disk and process."""

import errno
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_bipe.config import load_run_config
from megatron_bipe.errors import CheckpointError, ConfigError, DataError
from megatron_bipe.eval import follow as follower
from megatron_bipe.eval.follow import Evaluation, Pace, follow
from megatron_bipe.eval.follow_kinds import perplexities
from megatron_bipe.eval.perplexity import EvalSettings, evaluate_perplexity
from megatron_bipe.io import locked
from megatron_bipe.run_files import DONE, START
from megatron_bipe.train.metrics_file import Events
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.errors import assert_warned, raises

ONCE = Pace(once=True)


@pytest.fixture
def run(make_dataset, make_eval_model, documents, save_run):
    """The folder of a run with checkpoints of steps 5 and 10."""
    return save_run(make_eval_model(name="run"), make_dataset(documents))


def never():
    return False


def lines(run_dir):
    text = (run_dir / "evaluations.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def steps(run_dir):
    return [(line["step"], line["kind"]) for line in lines(run_dir)]


def constant(kind="perplexity", measure=lambda _: {"loss": 1.5}):
    """Return an evaluation whose values need no model."""
    return Evaluation(kind, {"kind": kind}, measure)


def failing(error, kind="harness"):
    def measure(_):
        raise error

    return constant(kind, measure)


def weights_of(factor):
    return {"0.weight": torch.full((3,), float(factor))}


def test_follow_values_are_those_of_the_perplexity_command(run, make_dataset, make_eval_model, documents):
    dataset, settings = make_dataset(documents), EvalSettings()
    evaluations = perplexities(run, load_run_config(run / "config.yaml"), {"valid": dataset}, [8, 16], settings)
    assert follow(run, evaluations, ONCE, never) == ()
    found = lines(run)
    assert [(line["step"], line["kind"], line["data"], line["length_tokens"]) for line in found] == [
        (step, "perplexity", "valid", length) for step in (5, 10) for length in (8, 16)
    ]
    for line in found[2:]:
        expected = evaluate_perplexity(make_eval_model(), dataset, line["length_tokens"], settings)
        assert line["values"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
        assert line["values"]["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert found[0]["values"]["nats_per_token"] != found[2]["values"]["nats_per_token"]
    assert [found[0][key] for key in ("protocol", "max_tokens", "dtype")] == ["full", None, "float32"]
    assert not (run / "following").exists()


def test_follow_makes_no_evaluation_twice_and_those_of_other_settings_once(run):
    follow(run, [constant()], ONCE, never)
    before = (run / "evaluations.jsonl").read_bytes()
    follow(run, [constant(measure=None)], ONCE, never)
    assert (run / "evaluations.jsonl").read_bytes() == before
    follow(run, [constant(), Evaluation("", {"kind": "perplexity", "length_tokens": 8}, lambda _: {})], ONCE, never)
    assert (run / "evaluations.jsonl").read_bytes().startswith(before)
    assert [line.get("length_tokens") for line in lines(run)] == [None, None, 8, 8]


def test_follow_every_selects_steps(run):
    follow(run, [constant()], ONCE._replace(every=10), never)
    assert steps(run) == [(10, "perplexity")]


@pytest.mark.parametrize("spoil", [lambda line: line[:-9], lambda line: b"\xff" + line[1:-1]])
def test_follow_repairs_a_last_line_that_a_crash_left_incomplete(run, spoil):
    follow(run, [constant()], ONCE, never)
    first, last = (run / "evaluations.jsonl").read_bytes().splitlines(keepends=True)
    spoiled = first + spoil(last)
    (run / "evaluations.jsonl").write_bytes(spoiled)
    follow(run, [constant()], ONCE, never)
    content = (run / "evaluations.jsonl").read_bytes()
    assert content.startswith(spoiled + b"\n") and json.loads(content.splitlines()[-1])["step"] == 10
    assert len(content.splitlines()) == 3


def test_follow_evaluates_a_checkpoint_that_replaces_another_of_its_step(run):
    follow(run, [constant()], ONCE, never)
    same = shutil.copytree(run / "checkpoints" / "step-00000005", run.parent / "same")
    write_checkpoint(run, 5, weights_of(3))
    follow(run, [constant()], ONCE, never)
    assert [step for step, _ in steps(run)] == [5, 10, 5]
    assert len({line["fingerprint"] for line in lines(run)}) == 3
    shutil.rmtree(run / "checkpoints" / "step-00000005")
    same.rename(run / "checkpoints" / "step-00000005")
    follow(run, [constant()], ONCE, never)
    assert len(lines(run)) == 3


def test_follow_reports_a_damaged_checkpoint_once_and_evaluates_the_others(run, caplog):
    file = run / "checkpoints" / "step-00000005" / "rank-00000.safetensors"
    intact = file.read_bytes()
    file.write_bytes(intact[:-1] + b"\x01")
    evaluations = [constant(kind, lambda model: {"loss": float(len(model.loaded.name))}) for kind in ("a", "b")]
    [failed] = follow(run, evaluations, ONCE, never)
    assert "step 5" in failed and file.name in failed
    assert steps(run) == [(10, "a"), (10, "b")]
    assert sum(file.name in record.getMessage() for record in caplog.records) == 1
    file.write_bytes(intact)
    assert follow(run, evaluations, ONCE, never) == ()
    assert steps(run)[2:] == [(5, "a"), (5, "b")]


def test_follow_skips_a_checkpoint_that_is_deleted_while_it_is_read(run, caplog):
    caplog.set_level("INFO")

    def measure(model):
        if model.checkpoint.step == 5:
            shutil.rmtree(model.checkpoint.folder)
        return {"name": model.loaded.name}

    assert follow(run, [constant("a", measure), constant("b")], ONCE, never) == ()
    assert steps(run) == [(10, "a"), (10, "b")]
    assert any("step 5" in record.getMessage() and "deleted" in record.getMessage() for record in caplog.records)


def test_follow_does_not_record_values_of_a_checkpoint_that_is_replaced_while_it_is_read(run, monkeypatch):
    load, replaced = follower.load_eval_model, []

    def load_and_replace(spec):
        model = load(spec)
        if not replaced:
            replaced.append(spec)
            write_checkpoint(run, 5, {name: weight / 4 for name, weight in model.model.state_dict().items()})
        return model

    monkeypatch.setattr(follower, "load_eval_model", load_and_replace)
    norm = constant("norm", lambda model: {"norm": float(next(model.loaded.model.parameters()).detach().norm())})
    before = follower.fingerprint_of(run / "checkpoints" / "step-00000005")
    assert follow(run, [norm], ONCE, never) == ()
    assert steps(run) == [(5, "norm"), (10, "norm")] and replaced
    assert lines(run)[0]["fingerprint"] not in ("", before)


@pytest.mark.parametrize("error", [ConfigError("no such task"), RuntimeError("out of memory")])
def test_follow_one_kind_that_fails_does_not_stop_the_others_and_is_tried_by_the_next_start(run, error, caplog):
    failed = follow(run, [failing(error), constant("generate")], ONCE, never)
    assert failed == ("step 5: harness", "step 10: harness")
    assert steps(run) == [(5, "generate"), (10, "generate")]
    assert_warned(caplog, "step 10", "harness", error)
    assert follow(run, [constant("harness"), constant("generate")], ONCE, never) == ()
    assert steps(run)[2:] == [(5, "harness"), (10, "harness")]


def test_follow_tries_errors_that_may_pass_again(run):
    calls = []

    def measure(model):
        calls.append(model.checkpoint.step)
        if calls.count(model.checkpoint.step) < 3 or model.checkpoint.step == 10:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return {}

    pace = ONCE._replace(poll_s=0.01)
    assert follow(run, [constant("harness", measure)], pace, never) == ("step 10: harness",)
    assert calls == [5, 10] * 3 and steps(run) == [(5, "harness")]


def test_follow_refuses_to_run_twice_on_a_run(run):
    with locked(run / "following", lambda: None), raises(DataError, os.getpid(), location=run) as caught:
        follow(run, [constant()], ONCE, never)
    assert caught.value.transient and not (run / "evaluations.jsonl").exists()


def test_follow_removes_what_a_killed_follower_left(run):
    (run / "following" / "step-00000005").mkdir(parents=True)
    (run / "following" / "step-00000005" / "config.json").touch()
    (run / "following" / "lock").touch()
    follow(run, [constant()], ONCE, never)
    assert not (run / "following").exists()


class FullDisk(io.FileIO):
    """A file on a disk that has room for 20 bytes."""

    def write(self, data):
        room = 20 - (self.seek(0, os.SEEK_END) - self.begin)
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data[:room])

    def __enter__(self):
        self.begin = self.seek(0, os.SEEK_END)
        return self


def open_on_full_disk(path, mode="r", **_):
    return FullDisk(path, mode) if mode == "ab" else open(path, mode)  # noqa: PTH123


def test_follow_on_a_full_disk_ends_with_an_error_and_loses_nothing(run, monkeypatch, caplog):
    follow(run, [constant()], ONCE._replace(every=10), never)
    before = (run / "evaluations.jsonl").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", open_on_full_disk)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
            follow(run, [constant()], ONCE, never)
    assert caught.value.filename == str(run / "evaluations.jsonl")
    assert any('"loss":1.5' in record.getMessage() for record in caplog.records)
    assert (run / "evaluations.jsonl").read_bytes()[: len(before)] == before
    follow(run, [constant()], ONCE, never)
    content = (run / "evaluations.jsonl").read_bytes().splitlines()
    assert [json.loads(content[index])["step"] for index in (0, 2)] == [10, 5] and len(content) == 3


def test_follow_ends_when_the_run_is_done_after_its_last_checkpoint(run, monkeypatch):
    events = Events(run, is_main=True)
    events.add(START, step=0)
    waits = []

    def wait(*_):
        waits.append(steps(run))
        if len(waits) == 2:
            write_checkpoint(run, 15, weights_of(1))
            events.add(DONE, step=15)

    monkeypatch.setattr(follower, "_wait", wait)
    follow(run, [constant()], Pace(), never)
    assert [step for step, _ in steps(run)] == [5, 10, 15] and len(waits) == 2


def test_follow_of_a_run_that_is_done_continues_if_asked(run, monkeypatch):
    Events(run, is_main=True).add(DONE, step=10)
    waits = []
    monkeypatch.setattr(follower, "_wait", lambda *_: waits.append(1))
    follow(run, [constant()], Pace(keep_going=True), lambda: len(waits) >= 3)
    assert len(waits) == 3


def test_follow_stops_after_the_current_evaluation(run):
    asked = []
    evaluations = [constant("a", lambda _: asked.append(1) or {}), constant("b")]
    assert follow(run, evaluations, Pace(), lambda: bool(asked)) == ()
    assert steps(run) == [(5, "a")]


def test_follow_checks_lengths_and_data_before_there_is_a_checkpoint(
    make_dataset, make_eval_model, documents, save_run
):
    dataset, settings = make_dataset(documents), EvalSettings()
    run_dir = save_run(make_eval_model("learned", name="learned"), dataset, steps=())
    config = load_run_config(run_dir / "config.yaml")
    with raises(ConfigError, 64, 16, location=run_dir):
        perplexities(run_dir, config, {"a": dataset}, [8, 64], settings)
    with raises(DataError, 173, location="corpus"):
        perplexities(
            run_dir, config.model_copy(update={"model": make_eval_model().config}), {"a": dataset}, [4096], settings
        )
    other = make_dataset(documents, name="other", fingerprint="b" * 64)
    with raises(DataError, "bbbb", location=run_dir):
        perplexities(run_dir, config, {"a": other}, [8], settings)
    (run_dir / "data.json").unlink()
    with raises(CheckpointError, location="data.json"):
        perplexities(run_dir, config, {"a": dataset}, [8], settings)
