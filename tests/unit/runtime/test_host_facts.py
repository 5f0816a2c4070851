"""Facts of a rank and its host."""

import resource
import shutil

import pytest
import torch

from megatron_bipe.config import RunConfig
from megatron_bipe.errors import DataError
from megatron_bipe.runtime import host_facts
from megatron_bipe.runtime.host_facts import (
    data_fingerprints,
    device_fact,
    free_device_memory,
    host_memory,
    open_files,
    relevant_environment,
    shared_memory,
    source_hash,
    versions,
    write_rate,
)
from megatron_bipe.runtime.preflight_steps import SkippedError
from tests.helpers.errors import raises
from tests.helpers.loop import MAIN

GPU = MAIN._replace(num_ranks=64, num_local_ranks=8, device=torch.device("cuda", 3))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Let torch report a GPU, on which another process has taken a quarter of the memory."""
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n")
    monkeypatch.setattr(host_facts, "_DRIVER", driver)
    properties = type("Properties", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, 80 * 2**30))


def test_device_of_a_gpu_has_memory_and_driver(gpu):
    assert device_fact(GPU) == "NVIDIA H100 80GB HBM3, 80.0 GiB, driver 550.54.15"
    assert not free_device_memory(GPU).is_kept
    assert device_fact(MAIN).startswith("CPU ")
    with pytest.raises(SkippedError):
        free_device_memory(MAIN)


def test_shared_memory_must_suffice_on_gpus_only(monkeypatch):
    monkeypatch.setattr(host_facts.shutil, "disk_usage", lambda path: type("Usage", (), {"total": 64 * 2**20}))
    assert not shared_memory(GPU).is_kept
    assert shared_memory(GPU._replace(num_local_ranks=1)).is_kept and shared_memory(MAIN).is_kept


def test_open_files_must_suffice_for_a_connection_to_each_rank(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert open_files(GPU).is_kept and not open_files(GPU._replace(num_ranks=512)).is_kept
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert open_files(GPU._replace(num_ranks=512)).is_kept


def test_host_memory_must_suffice_for_the_copies_of_all_ranks_of_the_host(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(host_facts, "_CGROUP", tmp_path)
    run = RunConfig()
    assert host_memory(run, GPU, 16_000) == (2000, 2000, None)  # an eighth of the ranks
    assert not host_memory(run, GPU, 16_008).is_kept
    blocking = run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"asynchronous": False})})
    assert host_memory(blocking, GPU, 10**15).is_kept
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(run, GPU, 16_000).seen > 2000


def test_environment_has_variables_of_communication_and_not_the_names_of_interfaces():
    env = {
        "NCCL_ALGO": "Ring",
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "4",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    others = {"PYTHONHASHSEED": "1", "HOME": "/root", "CUDA_VISIBLE_DEVICES": "0", "MY_NCCL_ALGO": "Tree"}
    assert relevant_environment(env | others) == env | {"GLOO_SOCKET_IFNAME": "is set"}


def test_source_hash_changes_with_content_and_names(tmp_path):
    (tmp_path / "a.py").write_text("1")
    first = source_hash(tmp_path)
    assert source_hash(tmp_path) == first == source_hash(tmp_path)
    (tmp_path / "a.py").write_text("2")
    assert source_hash(tmp_path) != first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    (tmp_path / "b.py").write_text("1")
    assert source_hash(tmp_path) != first
    assert {"python", "torch", "deepspeed", "numpy", "transformers", "source"} <= set(versions())


def test_data_has_a_fingerprint_for_each_dataset_and_incomplete_files_are_an_error(train_and_valid, tmp_path):
    folders = [train_and_valid / "train", train_and_valid / "valid"]
    data = RunConfig().data.model_copy(update={"path": folders[0], "valid_path": folders[1]})
    found = data_fingerprints(RunConfig().model_copy(update={"data": data}))
    assert list(found) == list(map(str, folders)) and len(set(found.values())) == 2
    copy = tmp_path / "data"
    shutil.copytree(folders[0], copy)
    (copy / "part-00000.bin").write_bytes(b"")
    with raises(DataError, 0, location=copy / "part-00000.bin"):
        data_fingerprints(RunConfig().model_copy(update={"data": data.model_copy(update={"path": copy})}))


def test_write_rate_leaves_no_file(tmp_path):
    assert write_rate(tmp_path, 1000) > 0
    assert list(tmp_path.iterdir()) == []
