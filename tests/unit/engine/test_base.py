"""Common parts of both engines."""

import socket
from itertools import count

import pytest
import torch
import torch.distributed as dist

from megatron_bipe.config.load import load_run_config
from megatron_bipe.engine import base
from megatron_bipe.engine.base import ForwardTimer, check_precision, start_deepspeed
from megatron_bipe.errors import ConfigError
from megatron_bipe.parallel.mesh import Mesh
from tests.helpers.errors import raises

MESH = Mesh(0, 0, 3, 3, torch.device("cpu"))


@pytest.mark.parametrize("others", [("fp32", "fp32"), ("fp32", "bf16")])
def test_precision_that_hosts_settled_differently_is_refused(monkeypatch, others):
    def gather(own):
        return [own, *([precision, f"rank {rank}"] for rank, precision in enumerate(others, 1))]

    monkeypatch.setattr(base, "all_gather_json", gather)
    run = load_run_config(None, ["train.precision=fp32"])
    if len({"fp32", *others}) == 1:
        check_precision(MESH, run)
        return
    with raises(ConfigError, "bf16", "rank 2", "fp32", "rank 0", location="train.precision"):
        check_precision(MESH, run)


def test_forward_timer_of_a_gpu_waits_for_the_last_forward_pass_alone(monkeypatch):
    """Not for the backward pass and the update behind it."""
    waited = []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing
            self.number = next(numbers)

        def record(self): ...

        def synchronize(self):
            waited.append(self.number)

        def elapsed_time(self, end):
            return 1000 * (end.number - self.number)

    numbers = count()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("all"))
    module = torch.nn.Identity()
    timer = ForwardTimer(module, torch.device("cuda", 0), wanted=True)
    assert timer.pop_seconds() == 0 and waited == []
    for _ in range(3):
        module(torch.ones(1))
    assert timer.pop_seconds() == 3 and waited == [5]


def test_port_of_another_launch_is_one_clear_error(monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        for name, value in (rank | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        with raises(ConfigError, port, remedy="--master_port") as error:
            start_deepspeed(MESH._replace(num_ranks=1), 30)
    assert error.value.location.startswith("MASTER_PORT") and not dist.is_initialized()
