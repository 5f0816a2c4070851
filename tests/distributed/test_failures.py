"""A rank that raises, dies or hangs ends the launch, and the output names it and the place it was at.

Each case starts a real launcher. `parallel.timeout_s` is what a hang costs; launchers then give a stopped process 30
seconds before they kill it.
"""

import re
import socket

import pytest

from tests.helpers.commands import TEXTS, options, run

TIMEOUT_S = 20
HOST = socket.gethostname()
NAMES = [f"rank {rank} of 2 on {HOST} (stage 0, data 0, context 0, tensor {rank})" for rank in range(2)]


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_text_dataset):
    folder = tmp_path_factory.mktemp("data")
    write_text_dataset(folder, TEXTS)
    return folder


@pytest.fixture
def launch(data, tmp_path, free_port):
    """Two tensor-parallel ranks by a launcher, one of which does not go on at step 3."""

    def started(launcher, fault, rank):
        port = str(free_port())
        prefix = {
            "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", port, "-m"],
            "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", port, "--module"],
        }[launcher]
        settings = ["parallel.tensor=2", f"parallel.timeout_s={TIMEOUT_S}"]
        arguments = options(data, tmp_path / "run", *settings, steps=1000)
        command = [*prefix, "tests.distributed.faulty", "--ds_config", "ds_configs/zero1.json", *arguments]
        ended = run(*command, env={"FAULT": f"{fault}:{rank}:3"})
        assert ended.code != 0 and not ended.left, ended.output
        assert "step 2/1000" in ended.output and "step 3/1000" not in ended.output, ended.output
        return ended.output

    return started


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_failure_rank_that_raises_is_named_with_its_traceback(launch, launcher):
    output = launch(launcher, "raise", 1)
    assert f"{NAMES[1]}, at step 3, failed:" in output, output
    assert "ValueError: a fault was asked for" in output and output.count("Traceback") <= 2, output  # torchrun's own


def test_failure_rank_that_is_killed_is_named_by_the_others(launch):
    output = launch("deepspeed", "kill", 1)
    assert f"No sign of life: {NAMES[1]}, last at " in output, output


def test_failure_rank_0_that_is_killed_takes_the_store_along(launch):
    output = launch("deepspeed", "kill", 0)
    assert f"{NAMES[1]}, at step 3, micro-batch 1," in output, output
    assert "the store of the launch, with rank 0 or its launcher, is gone" in output, output


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_failure_rank_that_is_stopped_is_named_by_the_others(launch, launcher):
    output = launch(launcher, "stop", 1)
    assert f"{NAMES[0]}, at step 3, micro-batch 1, has made no progress for {TIMEOUT_S} s" in output, output
    assert f"No sign of life: {NAMES[1]}, last at " in output, output


def test_failure_rank_0_that_is_stopped_stops_the_store(launch):
    output = launch("deepspeed", "stop", 0)
    assert f"{NAMES[1]}, at step 3, micro-batch 1, has made no progress for {TIMEOUT_S} s" in output, output
    assert "the store of the launch, with rank 0 or its launcher, does not answer" in output, output


def test_failure_rank_in_an_endless_loop_is_at_another_place_than_the_others(launch):
    output = launch("torchrun", "spin", 1)
    assert "has made no progress" in output, output
    alone = rf"At step 3, in _spin \(faulty.py:\d+\): {re.escape(NAMES[1])}"
    assert re.search(alone, output), output
    for name, function in ((NAMES[0], "train_step"), (NAMES[1], "_spin")):  # both ranks show their stacks
        assert re.search(rf"{re.escape(name)}, at step 3.*is in\n.*, in {function}\n", output, re.DOTALL | re.I), output
