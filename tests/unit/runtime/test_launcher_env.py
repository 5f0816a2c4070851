"""Environment variables of every launcher."""

import logging

import pytest

from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime.launcher_env import Launch, Rendezvous, first_host, read_launch, tasks_by_host
from tests.helpers.errors import assert_warned, raises

AT = {"MASTER_ADDR": "head", "MASTER_PORT": "2950"}
HEAD = Rendezvous("head", 2950)
DEEPSPEED = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_SIZE": "4", **AT}
TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", **AT}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
ALLOCATION = {  # variables of a batch script
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}
SRUN = ALLOCATION | {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
FIFTH = Launch(5, 1, 8, 4, HEAD)


def read(env, agree=None):
    return read_launch(env, agree or (lambda one_host: pytest.fail("asked MPI")), lambda: 4321)


@pytest.mark.parametrize("env", [DEEPSPEED, TORCHRUN, OPEN_MPI | AT, HYDRA | AT, SRUN | AT])
def test_read_launch_finds_the_rank_that_each_launcher_sets(env):
    assert read(env) == FIFTH


@pytest.mark.parametrize("env", [{}, AT, {"SLURM_JOB_ID": "7"}])
def test_read_launch_without_a_launcher_is_one_rank(env):
    assert read(env) == Launch(0, 0, 1, 1, Rendezvous("127.0.0.1", 4321))


@pytest.mark.parametrize("env", [OPEN_MPI, HYDRA])
def test_read_launch_lets_mpi_ranks_agree_where_to_meet(env):
    asked = []

    def agree(one_host):
        asked.append(one_host)
        return Rendezvous("found", 77)

    assert read(env, agree).rendezvous == Rendezvous("found", 77)
    assert read(env | {"MASTER_ADDR": "head"}, agree).rendezvous == Rendezvous("head", 77)
    on_one = {name: "8" if value == "4" else value for name, value in env.items()}
    assert read(on_one, agree).num_local_ranks == 8
    assert asked == [False, False, True]


def test_read_launch_by_srun_meets_at_the_first_host_on_a_port_of_the_step():
    rendezvous = read(SRUN).rendezvous
    assert rendezvous.address == "gpu07" and 15000 <= rendezvous.port < 25000
    others = [SRUN | {"SLURM_STEP_ID": "1"}, SRUN | {"SLURM_JOB_ID": "1234568"}]
    assert len({rendezvous.port, *(read(other).rendezvous.port for other in others)}) == 3
    assert read(SRUN | {"SLURM_STEP_NODELIST": "gpu08"}).rendezvous.address == "gpu08"
    assert read(SRUN | {"MASTER_PORT": "99"}).rendezvous == Rendezvous("gpu07", 99)


def test_read_launch_by_srun_counts_the_tasks_of_its_own_host():
    uneven = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "5,3"}
    assert read(uneven).num_local_ranks == 3
    assert read(uneven | {"SLURM_NODEID": "0"}).num_local_ranks == 5
    asked = {name: value for name, value in SRUN.items() if "TASKS_PER_NODE" not in name}
    assert read(asked | {"SLURM_NTASKS_PER_NODE": "4"}).num_local_ranks == 4


def test_read_launch_knows_the_cores_that_srun_gives_each_task():
    assert read(SRUN | {"SLURM_CPUS_PER_TASK": "8"}).own_cores == 8
    assert read(SRUN).own_cores is read(DEEPSPEED | {"SLURM_CPUS_PER_TASK": "64"}).own_cores is None


@pytest.mark.parametrize("step", [None, "4294967290", "4294967291", "-5"])
def test_read_launch_in_an_allocation_without_srun_is_one_rank_and_logs_it(step, caplog):
    env = ALLOCATION | ({"SLURM_STEP_ID": step} if step else {})
    with caplog.at_level(logging.WARNING):
        assert read(env).num_ranks == 1
    assert_warned(caplog, 1234567, 8)


def test_read_launch_of_one_task_in_an_allocation_is_silent(caplog):
    read(ALLOCATION | {"SLURM_NTASKS": "1"})
    assert not caplog.text


@pytest.mark.parametrize("outer", [SRUN, HYDRA, {"RANK": "1", "WORLD_SIZE": "2", **AT}, {"PMI_RANK": "0"}])
def test_read_launch_of_nested_launchers_uses_the_inner_one(outer):
    assert read(outer | OPEN_MPI | AT) == FIFTH


def test_read_launch_uses_torchruns_variables_inside_srun():
    assert read(SRUN | OPEN_MPI | TORCHRUN) == FIFTH
    # srun's own process manager interface sets two of MPICH's variables
    assert read(SRUN | AT | {"PMI_RANK": "5", "PMI_SIZE": "8"}) == FIFTH


@pytest.mark.parametrize(
    ("env", "observed"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "LOCAL_RANK"),
        ({"PMI_RANK": "1"}, "MPI_LOCALRANKID"),
        ({**TORCHRUN, "WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({name: value for name, value in DEEPSPEED.items() if name != "LOCAL_SIZE"}, "LOCAL_SIZE"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"}, "MASTER_PORT"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT"),
        ({**TORCHRUN, "MASTER_PORT": "0"}, "MASTER_PORT"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT"),
        ({**TORCHRUN, "RANK": "8"}, "8 of 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "4 of 4"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "1 of 9"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "5"}, "5 of 5"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4x2"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({name: value for name, value in SRUN.items() if "NODELIST" not in name}, "SLURM_STEP_NODELIST"),
    ],
)
def test_read_launch_of_an_incomplete_launch_names_launcher_variables_and_remedy(env, observed):
    seen = [f"{name}={value}" for name, value in env.items() if value and "SLURM" not in name]
    with raises(ConfigError, *seen) as caught:
        read(env)
    message = caught.value.message
    for name in sorted(env, key=len, reverse=True):
        message = message.replace(f"{name}={env[name]}", "")  # the reason must name it, besides the list of those seen
    assert observed in message and caught.value.remedy
    assert caught.value.location in {"torchrun or deepspeed", "Open MPI", "MPICH or Intel MPI", "srun"}


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[07-12]", "gpu07"),
        ("gpu[3,5-7]-ib,login", "gpu3-ib"),
        ("rack[1-2]n[07,09-12],login", "rack1n07"),
        ("a.b-c,d[1-2]", "a.b-c"),
    ],
)
def test_first_host_of_a_compressed_list(hosts, first):
    assert first_host(hosts) == first


def test_tasks_by_host_unfolds_repetitions():
    assert tasks_by_host("4(x2),3") == [4, 4, 3]
    assert tasks_by_host("8") == [8]
    assert tasks_by_host("4(x2") is None and tasks_by_host("") is None
