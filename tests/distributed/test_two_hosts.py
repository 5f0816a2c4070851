"""Two hosts: network namespaces with an address and a host name each, joined by a virtual cable.

They share processors and disk but no network interface, so that ranks find each other only through the variables of
the launch. Measured: the losses of 3 steps are those of one host bit for bit.
"""

import os
import shutil
import subprocess
import uuid

import pytest

from tests.helpers.commands import options, run, run_all
from tests.helpers.faults import ProcessFault
from tests.helpers.small_runs import losses

ADDRESSES = ("10.213.77.1", "10.213.77.2")
STEPS = 3
ON_HOST = 'hostname "$1"; export GLOO_SOCKET_IFNAME="$2"; shift 2; exec "$@"'


@pytest.fixture(scope="module")
def hosts():
    """Return command prefixes that run a command on one host or the other."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip(reason="two network namespaces need root, iproute2 and util-linux")
    mark = uuid.uuid4().hex[:8]
    spaces, ends = [f"host-{side}-{mark}" for side in "ab"], [f"v{side}{mark}" for side in "ab"]
    try:
        for space in spaces:
            if subprocess.run(["ip", "netns", "add", space], capture_output=True, check=False).returncode != 0:
                pytest.skip(reason="this machine lets no one make network namespaces")
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for space, end, address in zip(spaces, ends, ADDRESSES, strict=True):
            _ip("link", "set", end, "netns", space)
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", end)
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", end, "up")
        yield [
            ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", ON_HOST, "sh", f"host-{side}", end]
            for space, end, side in zip(spaces, ends, "ab", strict=True)
        ]
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)


def _ip(*words):
    subprocess.run(["ip", *words], check=True)


def torchrun(num_hosts, host, ranks, port, program):
    """Return the launch command of one host."""
    rendezvous = ["--master-addr", ADDRESSES[0] if num_hosts > 1 else "127.0.0.1", "--master-port", str(port)]
    layout = ["--nnodes", str(num_hosts), "--node-rank", str(host), "--nproc-per-node", str(ranks)]
    return ["torchrun", *layout, *rendezvous, *program, "--ds_config", "ds_configs/zero1.json"]


@pytest.mark.slow
def test_two_hosts_train_like_one(hosts, text_dataset, tmp_path, free_port):
    def arguments(name):
        return options(text_dataset, tmp_path / name, "parallel.tensor=2", steps=STEPS)

    one = run(*torchrun(1, 0, 4, free_port(), ["pretrain.py"]), *arguments("one"))
    assert one.code == 0, one.output
    port = free_port()
    both = run_all(
        [[*hosts[n], *torchrun(2, n, 2, port, ["pretrain.py"]), *arguments("two")] for n in range(2)],
    )
    assert [ended.code for ended in both] == [0, 0], [ended.output for ended in both]
    assert f"step {STEPS}/{STEPS}" in both[0].output and f"step {STEPS}/{STEPS}" not in both[1].output
    assert losses(tmp_path / "two") == losses(tmp_path / "one") and len(losses(tmp_path / "two")) == STEPS


@pytest.mark.slow
def test_two_hosts_end_together_and_name_the_host_that_failed(hosts, text_dataset, tmp_path, free_port):
    port, program = free_port(), ["-m", "tests.helpers.faults"]
    fault = ProcessFault("raise", 3, "step 2")
    settings = options(text_dataset, tmp_path / "run", "parallel.tensor=2", "parallel.timeout_s=30", steps=1000)
    both = run_all(
        [[*hosts[n], *torchrun(2, n, 2, port, program), *settings] for n in range(2)],
        env=fault.variables,
    )
    name = "rank 3 of 4 on host-b (stage 0, data 1, context 0, tensor 1), at step 2,"
    assert all(ended.code != 0 and not ended.left for ended in both)
    assert f"{name} failed:" in both[1].output and "ValueError: an injected fault" in both[1].output
    assert f"leaves: {name} failed first: ValueError" in both[0].output, both[0].output
