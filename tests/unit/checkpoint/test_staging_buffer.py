"""The memory for copies of the training state; on a GPU, whose calls are recorded here, it is pinned once."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from megatron_bipe.checkpoint.find import list_steps
from megatron_bipe.checkpoint.shard_files import KINDS, Fragment
from megatron_bipe.checkpoint.staging_buffer import StagingBuffer
from megatron_bipe.checkpoint.writer import CheckpointWriter
from megatron_bipe.config import CheckpointConfig
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.runtime.host_collectives import HostCollectives
from tests.helpers.checkpoints import checkpoint_info
from tests.helpers.errors import assert_warned

GPU, CPU = torch.device("cuda", 3), torch.device("cpu")
THREAD = "checkpoint_0"


def make_fragments(*sizes):
    return [
        Fragment(f"{n}.x", (size,), None, 0, {kind: torch.randn(size) for kind in KINDS})
        for n, size in enumerate(sizes)
    ]


def equal(copies, fragments):
    """Return True if two lists of fragments are the same ones and no tensors share memory."""
    pairs = [
        (copy.state[kind], fragment.state[kind])
        for copy, fragment in zip(copies, fragments, strict=True)
        for kind in KINDS
    ]
    names = [copy.name for copy in copies] == [fragment.name for fragment in fragments]
    return names and all(torch.equal(x, y) and (x.data_ptr() != y.data_ptr() or not x.numel()) for x, y in pairs)


class RecordedCuda:
    """The functions of `torch.cuda` that copies need; `calls` are (function, thread) or (function, thread, bytes)."""

    def __init__(self):
        self.calls, self.pinned, self.error = [], {}, 0

    def names(self, thread=THREAD):
        return [call[0] for call in self.calls if call[1] == thread]

    def num_bytes(self, name):
        return [call[2] for call in self.calls if call[0] == name]

    def _add(self, name, *values):
        self.calls.append((name, threading.current_thread().name, *values))

    def set_device(self, device):
        self._add("set_device", device)

    def Stream(self, device):  # noqa: N802
        return SimpleNamespace(
            wait_event=lambda event: self._add("wait_event"), synchronize=lambda: self._add("synchronize")
        )

    @contextmanager
    def stream(self, stream):
        self._add("stream")
        yield

    def current_stream(self):
        return SimpleNamespace(record_event=lambda: "event")

    def cudart(self):
        return SimpleNamespace(cudaHostRegister=self._register, cudaHostUnregister=self._unregister)

    def check_error(self, code):
        if code:
            raise RuntimeError("CUDA error: out of memory")

    def _register(self, address, num_bytes, flags):
        self._add("pin", num_bytes)
        if not self.error:
            self.pinned[address] = num_bytes
        return self.error

    def _unregister(self, address):
        self._add("unpin", self.pinned.pop(address))
        return 0


@pytest.fixture
def cuda(monkeypatch):
    recorded = RecordedCuda()
    for name in ("set_device", "Stream", "stream", "current_stream", "cudart", "check_error"):
        monkeypatch.setattr(torch.cuda, name, getattr(recorded, name))
    return recorded


def make_saver(device, **settings):
    mesh = Mesh(0, 0, 1, 1, device)
    return CheckpointWriter(CheckpointConfig(min_free_gib=0, **settings), mesh, HostCollectives(mesh), lambda: None)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_copies_are_those_of_the_state_in_memory_of_its_size_that_is_reused(cuda, device):
    buffer, fragments = StagingBuffer(device), make_fragments(1000, 0, 7, 300)
    first = buffer.take(fragments, buffer.mark())
    assert equal(first, fragments)
    storage = first[0].state["weight"].untyped_storage()
    assert storage.nbytes() == 12 * 1307
    again = buffer.take(make_fragments(1000, 0, 7, 300), buffer.mark())
    assert again[2].state["exp_avg"].data_ptr() == first[2].state["exp_avg"].data_ptr()
    assert cuda.num_bytes("pin") == ([12 * 1307] if device is GPU else [])


def test_copies_of_another_layout_of_fragments(cuda):
    buffer, layouts = StagingBuffer(GPU), [make_fragments(*sizes) for sizes in ((10, 20), (30,), (5, 3), (40, 1))]
    for fragments in layouts:
        assert equal(buffer.take(fragments, buffer.mark()), fragments)
    assert [call[2:] for call in cuda.calls if "pin" in call[0]] == [(360,), (360,), (492,)]
    assert list(cuda.pinned.values()) == [492]
    buffer.release()
    assert not cuda.pinned and not buffer.is_pinned


def test_memory_of_a_buffer_that_is_dropped_is_unpinned_before_it_is_freed(cuda):
    """As of an engine that was never closed: the next memory at this address would still count as pinned."""
    buffer = StagingBuffer(GPU)
    buffer.reserve(100)
    assert list(cuda.pinned.values()) == [400]
    del buffer
    assert not cuda.pinned and cuda.num_bytes("unpin") == [400]


def test_thread_selects_its_device_first_and_pins_at_the_start_of_the_run(cuda, tmp_path):
    saver, fragments = make_saver(GPU), make_fragments(100, 50)
    saver.reserve(fragments)
    for step in (1, 2):
        saver.save(tmp_path, checkpoint_info(step), fragments, {}, final=False)
        saver.before_update()
        saver.finish()
    copy = ["stream", "wait_event", "synchronize"]
    assert cuda.names() == ["set_device", "pin", *copy, *copy]
    assert cuda.calls[0] == ("set_device", THREAD, GPU)
    assert all(thread == THREAD for _, thread, *_ in cuda.calls)
    saver.close()
    assert cuda.names()[-1] == "unpin" and cuda.num_bytes("unpin") == cuda.num_bytes("pin") == [1800]


def test_final_save_is_copied_to_the_same_memory(cuda, tmp_path, monkeypatch):
    saver, fragments = make_saver(GPU), make_fragments(100, 50)
    saver.reserve(fragments)
    saver.save(tmp_path, checkpoint_info(1), fragments, {}, final=True)
    assert cuda.names() == ["set_device", "pin", "stream", "wait_event", "synchronize"]
    saver.close()
    assert list_steps(tmp_path) == [1]


def test_saves_that_are_not_in_the_background_pin_nothing(cuda, tmp_path):
    saver, fragments = make_saver(GPU, asynchronous=False), make_fragments(100)
    saver.reserve(fragments)
    saver.save(tmp_path, checkpoint_info(1), fragments, {}, final=False)
    saver.close()
    assert cuda.names() == ["set_device"] and list_steps(tmp_path) == [1]


def test_memory_on_a_cpu_is_allocated_by_the_first_save(tmp_path):
    saver, fragments = make_saver(CPU), make_fragments(100)
    saver.reserve(fragments)
    saver.save(tmp_path, checkpoint_info(1), fragments, {}, final=True)
    assert saver._copy._flat.numel() == 0
    saver.save(tmp_path, checkpoint_info(2), fragments, {}, final=False)
    saver.finish()
    assert saver._copy._flat.numel() == 300
    saver.close()


def test_memory_that_cannot_be_pinned_is_one_warning_at_the_start(cuda, tmp_path, caplog):
    cuda.error = 2
    saver, fragments = make_saver(GPU), make_fragments(1_000_000)
    saver.reserve(fragments)
    for step, final in ((1, False), (2, False), (3, True)):
        saver.save(tmp_path, checkpoint_info(step), fragments, {}, final=final)
    saver.close()
    assert list_steps(tmp_path) == [1, 2, 3]
    assert_warned(caplog, "0.01 GB", "pinned", "CUDA error: out of memory", "checkpoint.asynchronous=false")
    assert len(caplog.records) == 1 and cuda.names() == ["set_device", "pin"]
