"""Heartbeats that ranks exchange, and the report about a rank that hangs."""

import json
import threading

import pytest
import torch.distributed as dist

from megatron_bipe.runtime import watchdog
from megatron_bipe.runtime.host_collectives import in_thread
from megatron_bipe.runtime.watchdog import Heartbeat, HeartbeatStore, Shutdown, group_ranks_by_location, silent_ranks


@pytest.fixture
def ranks():
    """Two ranks of a launch of three."""
    store = dist.HashStore()
    return HeartbeatStore(lambda: store, 0, 3), HeartbeatStore(lambda: store, 1, 3)


def heartbeats(*locations, beats=1):
    return {
        rank: None if location is None else Heartbeat(beats, f"rank {rank} on h{rank}", location)
        for rank, location in enumerate(locations)
    }


def test_heartbeat_shows_the_last_beat_of_each_rank_and_none_of_one_that_never_started(ranks):
    for beats in (1, 2):
        ranks[1].send(Heartbeat(beats, "one", "step 3"))
    assert ranks[0].read_all() == {0: None, 1: Heartbeat(2, "one", "step 3"), 2: None}


def test_heartbeat_has_one_first_failure_and_all_ranks_learn_of_the_end(ranks):
    assert [rank.is_first_to_fail() for rank in (ranks[1], ranks[0], ranks[1])] == [True, False, False]
    assert ranks[0].shutdown_request() is None
    ranks[1].request_shutdown(Shutdown("rank 1 failed", 2))
    assert ranks[0].shutdown_request() == Shutdown("rank 1 failed", 2)


@pytest.mark.parametrize("crafted", [["bye", 0, False], ["bye", 75, False], ["bye"], [1, 1, True], 7, None, "\xff{"])
def test_heartbeat_end_that_no_rank_can_have_requested_is_not_obeyed(crafted):
    store = dist.HashStore()
    rank = HeartbeatStore(lambda: store, 0, 2)
    store.set("end", json.dumps(crafted) if crafted != "\xff{" else crafted)
    store.set("rank-1", "not json")
    assert rank.shutdown_request() is None and rank.read_all() == {0: None, 1: None}


def test_heartbeat_keeps_rank_0_until_all_have_finished(ranks):
    last = HeartbeatStore(dist.HashStore, 0, 2)
    with pytest.raises(RuntimeError, match=r"(?i)time.{0,2}out"):
        last.finish(0.1)
    store = dist.HashStore()
    other = threading.Thread(target=HeartbeatStore(lambda: store, 1, 2).finish, args=(10,))
    other.start()
    HeartbeatStore(lambda: store, 0, 2).finish(10)
    other.join()


def test_heartbeat_does_not_wait_for_a_store_that_hangs(monkeypatch):
    monkeypatch.setattr(watchdog, "ANSWER_S", 0.05)
    release = threading.Event()

    class Stuck:
        def add(self, *_):
            release.wait()

    call = HeartbeatStore(Stuck, 0, 2)
    with pytest.raises(TimeoutError):
        call.is_first_to_fail()
    release.set()


def test_heartbeat_does_not_wait_for_a_connection_that_hangs_and_uses_it_once_it_is_made(monkeypatch):
    release, stores = threading.Event(), []

    def connect():
        release.wait(5)
        stores.append(dist.HashStore())
        return stores[-1]

    call = HeartbeatStore(connect, 0, 1)
    monkeypatch.setattr(watchdog, "ANSWER_S", 0.05)
    for beats in (1, 2):
        with pytest.raises(TimeoutError):
            call.send(Heartbeat(beats, "zero", "step 1"))
    monkeypatch.setattr(watchdog, "ANSWER_S", 10)
    release.set()
    assert call.read_all() == {0: Heartbeat(2, "zero", "step 1")}
    assert len(stores) == 1


def test_silent_ranks_are_those_without_a_new_beat():
    before, after = heartbeats("a", "a", "a", None), heartbeats("b", "b", "b", None, beats=2)
    after[1] = before[1]
    assert list(silent_ranks(before, after, 0)) == [
        "No heartbeat: rank 1 on h1, last at a",
        "No heartbeat, ever: rank 3",
    ]
    assert next(silent_ranks(before, before, 0)).startswith("No heartbeat: rank 1")  # not of the observing rank
    assert list(silent_ranks(heartbeats("a", "a"), heartbeats("a", "a", beats=2), 0)) == []


def test_rank_locations_start_with_the_rank_that_differs():
    after = heartbeats("wait", "wait", "loop", "wait", "wait", "wait", beats=2)
    found = list(group_ranks_by_location(heartbeats(*["wait"] * 6), after, 0))
    assert found[0] == "At loop: rank 2 on h2"
    assert found[1].startswith("At wait: rank 0 on h0, rank 1") and found[1].endswith("rank 4 on h4 and 1 more")
    assert len(found) == 2


def test_in_thread_yields_until_the_work_is_done_and_raises_its_error():
    release = threading.Event()
    steps = in_thread(lambda: release.wait(20) and 1 / 0)
    next(steps)
    release.set()
    with pytest.raises(ZeroDivisionError):
        list(steps)
