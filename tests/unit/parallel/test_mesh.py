"""Who a process is, from what the launcher put into its environment."""

import os
from unittest import mock

import pytest
import torch

from megatron_bipe.parallel.mesh import join_launch

LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """An environment without a launch; threads and variables are put back."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    with mock.patch.dict(os.environ):
        for name in (*LAUNCH, "OMP_NUM_THREADS"):
            os.environ.pop(name, None)
        yield os.environ
    torch.set_num_threads(threads)


def test_join_launch_without_a_launcher_is_one_rank_that_can_start_a_group(environment):
    mesh = join_launch()
    assert (mesh.rank, mesh.num_ranks, mesh.is_main, mesh.device.type) == (0, 1, True, "cpu")
    assert all(environment[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def test_join_launch_reads_what_a_launcher_set(environment):
    environment.update(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8", LOCAL_WORLD_SIZE="4")
    mesh = join_launch()
    assert (mesh.rank, mesh.local_rank, mesh.num_ranks, mesh.num_local_ranks) == (5, 1, 8, 4)
    assert not mesh.is_main


def test_join_launch_shares_the_cores_among_the_ranks_of_a_machine(environment, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
    join_launch()
    assert torch.get_num_threads() == 2


def test_join_launch_leaves_a_chosen_thread_count_alone(environment):
    torch.set_num_threads(1)
    environment["OMP_NUM_THREADS"] = "1"
    join_launch()
    assert torch.get_num_threads() == 1
