"""Limits of the all-reduces within hosts, with rates that replace those of GPUs."""

import pytest
import torch
import torch.distributed as dist

from megatron_bipe.runtime import preflight_network
from megatron_bipe.runtime.preflight_network import Network
from tests.helpers.loop import MAIN

HOSTS = [[0, 1], [2, 3], [4, 5]]


@pytest.fixture
def rates(monkeypatch):
    """Return a function that returns what rank 0 finds, given the largest rate of each rank and of its links."""
    monkeypatch.setattr(dist, "new_group", lambda ranks: ranks)

    def found(largest, nvlink_bytes_s=None, device="cuda"):
        mesh = MAIN._replace(num_ranks=6, num_local_ranks=2, device=torch.device(device))
        network = Network(mesh, None, 60.0, lambda what: None)
        network._host_ranks = HOSTS
        network._host = type("Host", (), {"all_gather_object": lambda self, own: largest})()
        monkeypatch.setattr(network, "_rates", lambda group, num_ranks: {"1 MiB": 9.0, "256 MiB": largest[0]})
        return network.rates_within_hosts(nvlink_bytes_s)

    return found


def test_a_host_of_gpus_below_half_of_the_median_breaks_the_rule(rates):
    slow = rates([100.0, 100.0, 300.0, 300.0, 300.0, 300.0])
    assert not slow["256 MiB"].is_kept and slow["1 MiB"].is_kept
    assert rates([160.0, 160.0, 300.0, 300.0, 300.0, 300.0])["256 MiB"].is_kept
    assert rates([100.0, 100.0, 300.0, 300.0, 300.0, 300.0], device="cpu")["256 MiB"].is_kept


def test_a_launch_that_is_far_below_the_rate_of_its_links_breaks_the_rule(rates):
    assert not rates([30.0] * 6, nvlink_bytes_s=450e9)["256 MiB"].is_kept
    assert rates([30.0] * 6)["256 MiB"].is_kept and rates([300.0] * 6, nvlink_bytes_s=450e9)["256 MiB"].is_kept


def test_the_rate_is_that_at_which_a_rank_sends(monkeypatch):
    clock = iter([0.0, 0.005, 0.0, 0.005])
    monkeypatch.setattr(preflight_network.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(dist, "all_reduce", lambda x, group=None: None)
    network = Network(MAIN._replace(num_ranks=4), None, 60.0, lambda what: None)
    assert network._rates(None, 4)["8 MiB"] == pytest.approx(2**23 / 0.001 * 1.5 / 1e9)
