"""Effects of joining a launch on the process."""

import os
import socket
import sys
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_bipe.config.load import load_run_config
from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime.distributed_init import (
    connect_store,
    find_gloo_interface,
    host_group_error,
    host_store,
    join_launch,
    launch_store,
)
from tests.helpers.errors import raises

LAUNCH = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "2950",
}


@pytest.fixture
def environment(monkeypatch):
    """Remove the launch from the environment, and restore threads and variables afterwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    with mock.patch.dict(os.environ):
        for name in (
            *LAUNCH,
            "LOCAL_SIZE",
            "OMP_NUM_THREADS",
            "GLOO_SOCKET_IFNAME",
            "NCCL_SOCKET_IFNAME",
            "BIPE_DEVICE",
            "DS_ACCELERATOR",
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "CUBLAS_WORKSPACE_CONFIG",
        ):
            os.environ.pop(name, None)
        yield os.environ
    torch.set_num_threads(threads)


def test_join_launch_without_a_launcher_is_one_rank_that_can_start_a_group(environment):
    mesh = join_launch()
    assert (mesh.rank, mesh.num_ranks, mesh.is_main, mesh.device.type) == (0, 1, True, "cpu")
    assert environment["MASTER_ADDR"] == "127.0.0.1" and int(environment["MASTER_PORT"]) > 0


def test_join_launch_reads_what_a_launcher_set(environment):
    environment.update(LAUNCH)
    mesh = join_launch()
    assert (mesh.rank, mesh.local_rank, mesh.num_ranks, mesh.num_local_ranks) == (5, 1, 8, 4)
    assert not mesh.is_main


def test_join_launch_on_one_host_uses_its_loopback_interface(environment):
    environment.update(LAUNCH, WORLD_SIZE="4", RANK="1", GLOO_SOCKET_IFNAME="eth7")
    join_launch()
    assert (environment["MASTER_ADDR"], environment["NCCL_SOCKET_IFNAME"]) == ("127.0.0.1", "=lo")
    assert environment["GLOO_SOCKET_IFNAME"] == "eth7"  # the user's choice


def test_join_launch_on_one_host_takes_only_the_port_of_rank_0_from_torchruns_store(environment):
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment.update(LAUNCH, WORLD_SIZE="4", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(agent.port))
    environment.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="2")
    mesh = join_launch()
    own_port = environment["MASTER_PORT"]
    assert int(own_port) != agent.port and environment["TORCHELASTIC_USE_AGENT_STORE"] == "False"
    environment.update(RANK="1", MASTER_PORT=str(agent.port), TORCHELASTIC_USE_AGENT_STORE="True")
    assert host_store(join_launch()) is None and environment["MASTER_PORT"] == own_port
    store = host_store(mesh)
    connect_store(5).set("key", "value")
    assert store.get("attempt-2 /key") == b"value"


def test_join_launch_sets_torchs_variables_from_another_launcher(environment):
    names = {"RANK": "RANK", "SIZE": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_RANK", "LOCAL_SIZE": "LOCAL_WORLD_SIZE"}
    environment.update({f"OMPI_COMM_WORLD_{name}": LAUNCH[standard] for name, standard in names.items()})
    environment.update(MASTER_ADDR="head", MASTER_PORT="2950")
    join_launch()
    assert {name: environment[name] for name in LAUNCH} == LAUNCH


def test_join_launch_by_mpi_without_mpi4py_names_the_remedy(environment, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    environment.update({f"OMPI_COMM_WORLD_{name}": "1" for name in ("SIZE", "LOCAL_SIZE")})
    environment.update({f"OMPI_COMM_WORLD_{name}": "0" for name in ("RANK", "LOCAL_RANK")})
    with raises(ConfigError, "mpi4py", location="mpiexec", remedy="MASTER_ADDR"):
        join_launch()


@pytest.fixture
def gpus(environment, monkeypatch):
    """Let torch see four GPUs; yield what is known when CUDA starts, and restore torch's switches."""
    started = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: started.update(environment, device=device))
    environment.update(LAUNCH)
    products, fill = torch.backends.cuda.matmul, torch.utils.deterministic.fill_uninitialized_memory
    reduced = products.allow_bf16_reduced_precision_reduction
    yield started
    products.allow_bf16_reduced_precision_reduction = reduced
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def test_join_launch_on_a_gpu_sums_products_in_fp32_and_shares_the_cores(gpus, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert join_launch().device == gpus["device"] == torch.device("cuda", 1)
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == 2
    assert not {"CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_MAX_CONNECTIONS"} & gpus.keys()


@pytest.mark.parametrize(("chosen", "used"), [("", ":4096:8"), (":16:8", ":16:8"), (":4096:2", ":4096:8")])
def test_join_launch_on_a_gpu_sets_what_a_deterministic_run_needs_before_cuda_starts(gpus, environment, chosen, used):
    environment["CUBLAS_WORKSPACE_CONFIG"] = chosen
    join_launch(run=load_run_config(None, ["train.deterministic=true"]))
    assert gpus["CUBLAS_WORKSPACE_CONFIG"] == used
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize(("chosen", "used"), [({}, "1"), ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "8")])
def test_join_launch_on_a_gpu_keeps_the_order_of_kernels_with_tensor_parallelism(gpus, environment, chosen, used):
    environment.update(chosen)
    join_launch(run=load_run_config(None, ["parallel.tensor=2"]))
    assert gpus["CUDA_DEVICE_MAX_CONNECTIONS"] == used


def test_join_launch_on_a_cpu_leaves_torch_as_it_is(environment):
    join_launch(run=load_run_config(None, ["train.deterministic=true", "parallel.tensor=2"]))
    assert not torch.are_deterministic_algorithms_enabled()
    assert not {"CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_MAX_CONNECTIONS"} & environment.keys()


def test_join_launch_of_more_ranks_than_gpus_is_refused(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    environment.update(LAUNCH)
    with raises(ConfigError, "local rank 1", "GPU", remedy="--gpus-per-node") as caught:
        join_launch()
    assert "rank 5" in caught.value.location


def test_join_launch_with_bipe_device_cpu_uses_no_gpu_and_configures_deepspeed(environment, monkeypatch):
    def touched():
        raise AssertionError("CUDA was asked")

    for name in ("is_available", "device_count"):
        monkeypatch.setattr(torch.cuda, name, touched)
    environment.update(LAUNCH, BIPE_DEVICE="cpu")
    assert join_launch().device.type == "cpu"
    assert environment["DS_ACCELERATOR"] == "cpu"


def test_join_launch_with_bipe_device_cuda_and_no_gpu_is_refused(environment):
    environment["BIPE_DEVICE"] = "cuda"
    with raises(ConfigError, "BIPE_DEVICE=cuda", location="BIPE_DEVICE"):
        join_launch()


def test_join_launch_with_an_unknown_bipe_device_is_refused(environment):
    environment["BIPE_DEVICE"] = "gpu"
    with raises(ConfigError, "'gpu'", location="BIPE_DEVICE"):
        join_launch()


def test_join_launch_shares_the_cores_among_the_ranks_of_a_machine(environment, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    environment.update(LAUNCH)
    join_launch()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("allowed", "used"), [(8, 8), (64, 8), (2, 2)])  # bound by SLURM, not bound, bound to fewer
def test_join_launch_by_srun_does_not_divide_the_cores_of_a_task(environment, monkeypatch, allowed, used):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(allowed))
    environment.update(SLURM_JOB_ID="7", SLURM_STEP_ID="0", SLURM_PROCID="1", SLURM_LOCALID="1", SLURM_NTASKS="4")
    environment.update(SLURM_TASKS_PER_NODE="4", SLURM_CPUS_PER_TASK="8", MASTER_ADDR="head", MASTER_PORT="2950")
    join_launch()
    assert torch.get_num_threads() == used


def test_join_launch_leaves_a_chosen_thread_count_alone(environment):
    torch.set_num_threads(1)
    environment.update(LAUNCH, OMP_NUM_THREADS="1")
    join_launch()
    assert torch.get_num_threads() == 1


def resolve_host_name(monkeypatch, *addresses):
    """Let the host name have these addresses, in order; without any it is unknown."""

    def found(name, port, **hints):
        if not addresses:
            raise socket.gaierror("Name or service not known")
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in each], socket.SOCK_STREAM, 6, "", (each, 0)) for each in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", found)


def let_host_have(monkeypatch, own):
    """Let sockets bind to these addresses only."""

    class Probe(nullcontext):
        def __init__(self, family, kind):
            super().__init__(self)

        def bind(self, address):
            if address[0] not in own:
                raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(socket, "socket", Probe)


def test_gloo_on_a_loopback_address_is_refused_on_several_hosts_only(environment, monkeypatch):
    resolve_host_name(monkeypatch, "127.0.1.1")  # as Debian's /etc/hosts has it
    environment.update(LAUNCH)
    mesh = join_launch()
    with raises(ConfigError, "127.0.1.1", location="GLOO_SOCKET_IFNAME", remedy=".deepspeed_env"):
        find_gloo_interface(mesh)
    assert find_gloo_interface(mesh._replace(num_local_ranks=8)) == "127.0.1.1"
    environment["MASTER_ADDR"] = "127.0.0.1"  # all ranks reach it, so they are on one machine
    assert find_gloo_interface(mesh) == "127.0.1.1"


def test_gloo_interface_is_the_one_that_is_chosen_and_exists(environment, monkeypatch):
    environment.update(LAUNCH, GLOO_SOCKET_IFNAME="lo")
    mesh = join_launch()
    assert find_gloo_interface(mesh) == "lo"
    environment["GLOO_SOCKET_IFNAME"] = "eth77"
    with raises(ConfigError, "GLOO_SOCKET_IFNAME=eth77", "lo", location="GLOO_SOCKET_IFNAME"):
        find_gloo_interface(mesh)
    del environment["GLOO_SOCKET_IFNAME"]
    own = {"2001:db8::7", "10.0.0.7"}
    let_host_have(monkeypatch, own)
    for addresses, used in ((["10.0.0.7"], "10.0.0.7"), (["203.0.113.1", "2001:db8::7"], "2001:db8::7")):
        resolve_host_name(monkeypatch, *addresses)
        assert find_gloo_interface(mesh) == used


@pytest.mark.parametrize("addresses", [[], ["203.0.113.1"], ["::1"]])
def test_gloo_without_an_address_that_the_host_has_is_refused_on_several_hosts(environment, monkeypatch, addresses):
    """A host name that is unknown, or has the address of a translating gateway: gloo then listens on the loopback."""
    let_host_have(monkeypatch, {"::1"})
    resolve_host_name(monkeypatch, *addresses)
    environment.update(LAUNCH)
    with raises(ConfigError, "::1" if "::1" in addresses else "127.0.0.1", location="GLOO_SOCKET_IFNAME"):
        find_gloo_interface(join_launch())


def test_host_side_group_that_fails_across_hosts_names_the_interface(environment):
    environment.update(LAUNCH)
    mesh, seen = join_launch(), RuntimeError("connection refused")
    error = host_group_error(mesh, seen)
    assert isinstance(error, ConfigError) and error.transient
    assert "connection refused" in str(error) and "GLOO_SOCKET_IFNAME" in error.remedy
    assert host_group_error(mesh._replace(num_local_ranks=8), seen) is seen


def test_launch_store_does_not_wait_for_ranks_and_a_store_that_is_missing_is_transient(environment, free_port):
    environment.update(LAUNCH, RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    stores = launch_store(join_launch(), 5)
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"
    environment.update(RANK="1", MASTER_PORT=str(free_port()))
    with raises(ConfigError, "127.0.0.1") as caught:
        launch_store(join_launch(), 0.5)
    assert caught.value.transient and "rank 1" in caught.value.location
