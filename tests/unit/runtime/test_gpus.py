"""The table of GPUs."""

import pytest

from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime.gpus import GPUS, find_gpu, named_gpu, with_network
from tests.helpers.errors import raises


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_of_the_table_is_found_by_its_name_in_any_case(gpu):
    assert find_gpu(gpu.name) == find_gpu(gpu.name.lower()) == gpu


@pytest.mark.parametrize(
    ("device_name", "name", "memory_gib", "link_bytes_s"),
    [
        ("NVIDIA H100 80GB HBM3", "H100", 79.1, 450e9),
        ("NVIDIA H100 PCIe", "H100 PCIe", 79.1, 64e9),
        ("NVIDIA H200 NVL", "H200 NVL", 139.7, 64e9),
        ("NVIDIA H800", "H800", 79.1, 200e9),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB", 39.3, 300e9),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB", 39.3, 32e9),
        ("NVIDIA A100-SXM4-80GB", "A100", 79.1, 300e9),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe", 79.1, 32e9),
        ("NVIDIA A800-SXM4-80GB", "A800", 79.1, 200e9),
        ("NVIDIA L4", "L4", 21.9, 32e9),
    ],
)
def test_names_of_drivers_are_distinguished_by_memory_and_links(device_name, name, memory_gib, link_bytes_s):
    gpu = find_gpu(device_name)
    assert gpu is not None
    assert (gpu.name, gpu.memory_gib, gpu.link_bytes_s) == (name, memory_gib, link_bytes_s)
    assert gpu.nvlink_bytes_s == (link_bytes_s if link_bytes_s >= 200e9 else None)


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090", "H10"])
def test_slices_and_other_gpus_are_unknown(name):
    assert find_gpu(name) is None
    with raises(ConfigError, repr(name), location="--gpu", remedy="H100"):
        named_gpu(name, "--gpu")


def test_network_is_that_of_the_option():
    gpu = named_gpu("H100", "--gpu")
    slower = with_network(gpu, 200)
    assert slower is not None and slower.network_bytes_s == 25e9 and with_network(gpu, None) == gpu
    assert with_network(None, None) is None
    smaller = with_network(gpu, None, 4)
    assert smaller == gpu._replace(gpus_per_machine=4) and gpu.gpus_per_machine == 8
    with raises(ConfigError, "--gpus-per-node 4", location="--gpus-per-node", remedy="--gpu"):
        with_network(None, None, 4)
    with raises(ConfigError, 200, location="--network"):
        with_network(None, 200)
