"""Saves in the background write the state at the time of the save, and the loop waits only for the copy."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from megatron_bipe.checkpoint import writer as module
from megatron_bipe.checkpoint.find import find_checkpoint, list_steps, step_folder
from megatron_bipe.checkpoint.shard_files import KINDS, Fragment, StateReader
from megatron_bipe.checkpoint.writer import CheckpointWriter
from megatron_bipe.config import CheckpointConfig
from megatron_bipe.errors import CheckpointError
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.runtime.host_collectives import HostCollectives
from megatron_bipe.runtime.observer import Observer
from tests.helpers.checkpoints import checkpoint_info
from tests.helpers.errors import assert_warned, raises

MESH = Mesh(0, 0, 1, 1, torch.device("cpu"))


def make_saver(**settings):
    return CheckpointWriter(CheckpointConfig(min_free_gib=0, **settings), MESH, HostCollectives(MESH), lambda: None)


@pytest.fixture
def live():
    """Return the state of a parameter, and a fragment that is a view of it."""
    state = {kind: torch.full((1000,), float(number)) for number, kind in enumerate(KINDS)}
    return state, [Fragment("0.x", (1000,), None, 0, state)]


class Gate:
    """Replacement of a function whose calls wait until it is opened."""

    def __init__(self, monkeypatch, name):
        self.opened, self.reached = threading.Event(), threading.Event()
        real = getattr(module, name)

        def waiting(*args):
            self.reached.set()
            assert self.opened.wait(20)
            return real(*args)

        monkeypatch.setattr(module, name, waiting)


def test_save_in_background_holds_the_state_at_the_time_of_the_save(tmp_path, live, monkeypatch):
    state, fragments = live
    gate = Gate(monkeypatch, "write_fragments")
    saver = make_saver()
    saver.save(tmp_path, checkpoint_info(10), fragments, {}, final=False)
    saver.before_update()
    for tensor in state.values():
        tensor.add_(100.0)  # the optimizer's step
    assert list_steps(tmp_path) == []
    gate.opened.set()
    saver.finish()
    reader = StateReader(find_checkpoint(tmp_path).folder)
    for number, kind in enumerate(KINDS):
        assert torch.equal(reader.full(kind, "0.x"), torch.full((1000,), float(number)))


def test_save_update_waits_only_for_the_copy(tmp_path, live, monkeypatch):
    _, fragments = live
    copying, writing = threading.Event(), Gate(monkeypatch, "write_fragments")
    saver = make_saver()
    take = saver._copy.take
    monkeypatch.setattr(saver._copy, "take", lambda *args: (copying.wait(20), take(*args))[1])
    saver.save(tmp_path, checkpoint_info(10), fragments, {}, final=False)
    update = threading.Thread(target=saver.before_update)
    update.start()
    update.join(0.2)
    assert update.is_alive()
    copying.set()
    update.join(20)
    assert not update.is_alive() and not writing.opened.is_set()
    writing.opened.set()
    saver.finish()
    assert list_steps(tmp_path) == [10]
    assert saver.waited_s >= 0.2


def test_save_waits_for_the_previous_one(tmp_path, live, monkeypatch):
    _, fragments = live
    gate = Gate(monkeypatch, "write_fragments")
    saver = make_saver()
    saver.save(tmp_path, checkpoint_info(10), fragments, {}, final=False)
    assert gate.reached.wait(20)
    later = threading.Thread(
        target=saver.save, args=(tmp_path, checkpoint_info(20), fragments, {}), kwargs={"final": True}
    )
    later.start()
    later.join(0.2)
    assert later.is_alive()
    gate.opened.set()
    later.join(20)
    assert list_steps(tmp_path) == [10, 20]


def test_save_final_or_synchronous_is_done_when_it_returns(tmp_path, live):
    _, fragments = live
    make_saver().save(tmp_path, checkpoint_info(10), fragments, {}, final=True)
    assert list_steps(tmp_path) == [10]
    make_saver(asynchronous=False).save(tmp_path, checkpoint_info(20), fragments, {}, final=False)
    assert list_steps(tmp_path) == [10, 20]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", ["begin", "write_fragments", "write_index", "publish"])
def test_save_that_fails_is_a_warning_unless_it_is_the_last(tmp_path, live, monkeypatch, caplog, name, asynchronous):
    _, fragments = live
    saver = make_saver(asynchronous=asynchronous)
    saver.save(tmp_path, checkpoint_info(10), fragments, {}, final=True)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        saver.save(tmp_path, checkpoint_info(20), fragments, {}, final=False)
        saver.before_update()
        saver.finish()
        [record] = [record for record in caplog.records if record.levelname == "WARNING"]
        assert "step 20" in record.message and "No space left on device" in record.message
        location, remedy = tmp_path / "checkpoints", "checkpoint.keep_last"
        with raises(CheckpointError, "No space left on device", location=location, remedy=remedy):
            saver.save(tmp_path, checkpoint_info(30), fragments, {}, final=True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000010"]
    saver.save(tmp_path, checkpoint_info(40), fragments, {}, final=True)
    assert list_steps(tmp_path) == [10, 40]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", ["begin", "write_fragments"])  # before and in the write
def test_save_that_fails_too_often_in_a_row_ends_the_run(tmp_path, live, monkeypatch, name, asynchronous):
    def fail(*_):
        raise OSError("No space left on device")

    def save(step, *, fails):
        with monkeypatch.context() as patch:
            if fails:
                patch.setattr(module, name, fail)
            saver.save(tmp_path, checkpoint_info(step), live[1], {}, final=False)
            saver.finish()

    saver = make_saver(asynchronous=asynchronous, max_failures=3)
    for step, fails in enumerate([True, True, False, True, True], start=1):
        save(step, fails=fails)
    assert list_steps(tmp_path) == [3]
    with raises(CheckpointError, 3, "checkpoint.max_failures", "No space left", location=tmp_path / "checkpoints"):
        save(6, fails=True)
    saver = make_saver(asynchronous=asynchronous, max_failures=0)
    for step in range(7, 12):
        save(step, fails=True)
    saver = make_saver(asynchronous=asynchronous, max_failures=1)
    save(12, fails=False)
    with raises(CheckpointError, 1, "checkpoint.max_failures"):
        save(13, fails=True)
    assert list_steps(tmp_path) == [3, 12]


def test_save_whose_copy_fails_is_a_warning_of_one_line_and_training_continues(tmp_path, live, monkeypatch, caplog):
    _, fragments = live
    saver = make_saver()

    def fail(*_):
        raise RuntimeError("CUDA error: unspecified launch failure\nCompile with `TORCH_USE_CUDA_DSA`")

    monkeypatch.setattr(saver._copy, "take", fail)
    saver.save(tmp_path, checkpoint_info(10), fragments, {}, final=False)
    saver.before_update()
    saver.finish()
    assert_warned(caplog, "step 10", "host memory: CUDA error: unspecified launch failure")
    assert "Compile" not in caplog.text and "Traceback" not in caplog.text
    assert list_steps(tmp_path) == []


def test_save_without_memory_for_a_copy_is_written_while_the_update_waits(tmp_path, live, monkeypatch, caplog):
    state, fragments = live
    gate = Gate(monkeypatch, "write_fragments")
    saver = make_saver()

    def fail(*_):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(saver._copy, "_allocated", fail)
    saver.save(tmp_path, checkpoint_info(10), fragments, {}, final=False)
    update = threading.Thread(target=lambda: (saver.before_update(), state["weight"].add_(100.0)))
    update.start()
    assert gate.reached.wait(20)
    update.join(0.2)
    assert update.is_alive()
    gate.opened.set()
    update.join(20)
    saver.save(tmp_path, checkpoint_info(20), fragments, {}, final=False)
    saver.finish()
    weights = [StateReader(step_folder(tmp_path, step)).full("weight", "0.x") for step in (10, 20)]
    assert [float(x.unique()) for x in weights] == [0.0, 100.0]
    assert_warned(caplog, "0.00 GB", "can't allocate memory", "checkpoint.asynchronous=false")
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def test_update_that_waits_for_a_write_without_a_copy_is_progress(tmp_path, live, monkeypatch):
    saver = make_saver()
    saver.observer, real = Recorder(), module.write_fragments
    monkeypatch.setattr(saver._copy, "take", lambda *_: None)

    def once_awaited(*arguments):
        until_s = time.monotonic() + 10
        while not saver._is_awaited and time.monotonic() < until_s:
            time.sleep(0.001)
        return real(*arguments)

    monkeypatch.setattr(module, "write_fragments", once_awaited)
    saver.save(tmp_path, checkpoint_info(10), live[1], {}, final=False)
    saver.before_update()
    assert saver.observer.num_signs > 0
    saver.close()


def test_save_removes_old_checkpoints_once_the_new_one_is_complete(tmp_path, live):
    _, fragments = live
    saver = make_saver(keep_last=2, keep_every=30)
    for step in (10, 20, 30, 40, 50, 60, 70):
        saver.save(tmp_path, checkpoint_info(step), fragments, {}, final=False)
    saver.finish()
    assert list_steps(tmp_path) == [30, 60, 70]


def test_save_warns_of_old_checkpoints_that_cannot_be_deleted(tmp_path, live, monkeypatch, caplog):
    _, fragments = live

    def fail(*_):
        raise OSError("no permission")

    monkeypatch.setattr(module, "retire", fail)
    make_saver(keep_last=1).save(tmp_path, checkpoint_info(10), fragments, {}, final=True)
    assert_warned(caplog, "OSError: no permission")
    assert list_steps(tmp_path) == [10]


class Recorder(Observer):
    """Observer that keeps what it receives."""

    def __init__(self):
        self.num_signs, self.saves = 0, []

    def progress(self):
        self.num_signs += 1

    def saved(self, step, num_bytes, seconds):
        self.saves.append((step, num_bytes))

    def save_failed(self, step, reason):
        self.saves.append((step, reason))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saves_are_recorded_and_waiting_for_one_is_progress(tmp_path, live, monkeypatch, asynchronous):
    saver = make_saver(asynchronous=asynchronous)
    saver.observer = recorder = Recorder()
    saver.save(tmp_path, checkpoint_info(10), live[1], {}, final=True)
    assert recorder.num_signs > 0
    monkeypatch.setattr(module, "write_fragments", lambda *_: 1 / 0)
    saver.save(tmp_path, checkpoint_info(20), live[1], {}, final=False)
    saver.finish()
    with raises(CheckpointError):
        saver.save(tmp_path, checkpoint_info(30), live[1], {}, final=True)
    assert recorder.saves[0] == (10, 12_000)
    assert [(step, "ZeroDivisionError" in reason) for step, reason in recorder.saves[1:]] == [(20, True), (30, True)]


def test_writes_of_other_ranks_are_progress_of_those_that_wait(live, monkeypatch):
    monkeypatch.setattr(module, "_TELL_S", 0.01)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [dist.TCPStore("127.0.0.1", server.port) for _ in range(2)]
    ranks = [
        CheckpointWriter(CheckpointConfig(), MESH._replace(rank=rank, num_ranks=2), None, lambda: stores.pop())
        for rank in range(2)
    ]
    ranks[0].observer = recorder = Recorder()
    with ThreadPoolExecutor(1) as pool, ranks[0]._awaiting():
        waiting = pool.submit(ranks[0]._get, "save", "1")
        for num_signs in (1, 2, 3):
            ranks[1]._advance("save")
            ranks[1]._told_s = -math.inf
            while recorder.num_signs < num_signs:
                time.sleep(0.001)
        server.set("save/1", "written")
        assert waiting.result(20) == b"written"
