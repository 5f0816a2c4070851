"""Batches that are read in advance are those that are read when requested, in the same order."""

import threading
from types import SimpleNamespace

import pytest
import torch

from megatron_bipe.data.collate import for_transfer
from megatron_bipe.engine.base import on_device
from megatron_bipe.errors import DataError
from megatron_bipe.train import read_ahead
from megatron_bipe.train.read_ahead import ReadAhead, reading_ahead
from megatron_bipe.types import Batch
from tests.helpers.errors import raises
from tests.helpers.loop import NumberedBatches

CPU = torch.device("cpu")
[VALID] = NumberedBatches.validations


def _first_tokens(batches):
    return [int(batch.tokens_BT[0, 0]) for batch in batches]


def _reader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.fixture
def loader():
    """Return a loader, and fail if the test leaves a thread."""
    yield NumberedBatches()
    assert _reader_threads() == []


def _unchanged(batch):
    return batch


def test_batches_are_those_of_the_loader_across_updates_rollbacks_and_validations(loader):
    with ReadAhead(loader, _unchanged) as ahead:
        for sample in (0, 6, 12, 6, 36):  # two updates in order, a rollback, and skipped samples
            assert _first_tokens(ahead.train_batches(sample)) == _first_tokens(loader.train_batches(sample))
            assert _first_tokens(ahead.valid_batches(VALID)) == _first_tokens(loader.valid_batches(VALID))
        next(ahead.train_batches(42))  # an update that ends early
        assert _first_tokens(ahead.train_batches(42)) == [42, 44, 46]
        assert ahead.has_valid and ahead.validations == loader.validations
        assert ahead.sequences(7).tolist() == loader.sequences(7).tolist()


def test_reading_goes_on_while_a_batch_is_used_and_across_the_end_of_an_update(loader):
    with ReadAhead(loader, _unchanged) as ahead:
        batches = ahead.train_batches(0)
        for number in range(loader.num_micro_batches):  # as the pipeline engine does, which does not ask for more
            next(batches)
            loader.wait_for_reads(number + 3)
        assert loader.reads == [0, 2, 4, 6, 8]
        next(ahead.train_batches(6))
        loader.wait_for_reads(6)
        assert loader.reads == [0, 2, 4, 6, 8, 10]  # none was read twice
        assert loader.threads == {thread.name for thread in _reader_threads()}


def test_rank_that_asks_for_no_batch_reads_none(loader):
    with ReadAhead(loader, _unchanged) as ahead:
        ahead.train_batches(0)  # a middle stage of a pipeline
        ahead.train_batches(6)
        assert loader.reads == [] and _reader_threads() == []


def test_error_of_reading_is_raised_at_its_batch_and_the_next_update_reads_again(loader):
    loader.error_at = 4
    with ReadAhead(loader, _unchanged) as ahead:
        batches = ahead.train_batches(0)
        assert [int(next(batches).tokens_BT[0, 0]) for _ in range(2)] == [0, 2]
        with raises(DataError, "sample 4", location="shard"):
            next(batches)
        loader.error_at = None
        assert _first_tokens(ahead.train_batches(0)) == [0, 2, 4]


def test_damage_that_is_found_after_a_batch_was_read_is_raised_before_it_is_used(loader):
    with ReadAhead(loader, _unchanged) as ahead:
        batches = ahead.train_batches(0)
        next(batches)
        loader.wait_for_reads(3)
        loader.damage = DataError("the shard is damaged", remedy="Copy it again", location="shard")
        with raises(DataError, "damaged", location="shard"):
            next(batches)
        with raises(DataError, "damaged", location="shard"):
            next(ahead.valid_batches(VALID))


def test_thread_ends_with_a_block_that_fails_while_it_reads(loader):
    loader.gate.clear()
    ahead = ReadAhead(loader, _unchanged)
    training = threading.Thread(target=lambda: next(ahead.train_batches(0)))
    training.start()
    loader.wait_for_reads(1)
    ahead.__exit__(ValueError, ValueError("elsewhere"), None)  # returns although the read hangs
    assert _reader_threads()
    loader.gate.set()
    training.join(20)
    for thread in _reader_threads():
        thread.join(20)
    assert loader.reads == [0]


def test_validation_that_is_stopped_reads_no_more(loader):
    loader.num_valid = 100
    with ReadAhead(loader, _unchanged) as ahead:
        for number, _ in enumerate(ahead.valid_batches(VALID)):
            if number == 2:
                break
        assert _first_tokens(ahead.train_batches(0)) == [0, 2, 4]
        assert 3 <= loader.num_valid_read <= 5


def test_reading_time_is_the_time_that_training_waited(loader, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(read_ahead, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with ReadAhead(loader, _unchanged) as ahead:
        list(ahead.train_batches(0))
        assert ahead.reading_time_s() == loader.num_micro_batches  # a tick each, of the thread that trains
        list(ahead.valid_batches(VALID))
        assert ahead.reading_time_s() == 0


def test_batches_for_a_gpu_are_pinned_int32_by_a_thread_of_its_device(loader, monkeypatch):
    calls = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: calls.append((threading.current_thread().name, device))
    )
    monkeypatch.setattr(read_ahead, "for_transfer", lambda batch: for_transfer(batch, pin))

    def pin(tensor):
        calls.append((threading.current_thread().name, tensor.dtype))
        return tensor

    device = torch.device("cuda", 3)
    with reading_ahead(loader, device) as batches:
        batch = next(batches.train_batches(0))
    assert batch.tokens_BT.dtype == torch.int32
    assert calls[:6] == [("batches_0", value) for value in (device, *[torch.int32] * 4, torch.float32)]
    with reading_ahead(loader, CPU) as batches:
        assert batches is loader


def test_ids_are_widened_on_the_device_and_weights_are_not():
    wide = Batch(*(torch.arange(6).view(2, 3) + number for number in range(4)), torch.rand(2, 3))
    pinned = []
    narrow = for_transfer(wide, lambda tensor: pinned.append(tensor) or tensor)
    assert [x.dtype for x in narrow] == [torch.int32] * 4 + [torch.float32] and len(pinned) == 5
    for moved in (on_device(narrow, CPU), on_device(wide, CPU)):
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(moved, wide, strict=True))
    assert for_transfer(wide._replace(weights_BT=None), lambda tensor: tensor).weights_BT is None
