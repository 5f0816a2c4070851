"""The table of known GPUs: bf16 peak, memory, bandwidth of memory and of the links between GPUs of one machine.

Peaks and bandwidths are those of NVIDIA's data sheets: dense bf16 products with fp32 accumulation, and one direction of
the links. `memory_gib` is what torch reports as the total, which is less than the data sheet's figure; for GPUs whose
total is not published it is that of a GPU with the same memory, or less. docs/performance.md lists the sources.
"""

import re
from typing import NamedTuple

from megatron_bipe.errors import ConfigError

_PCIE_4, _PCIE_5 = 32e9, 64e9  # 16 lanes, bytes/s in one direction


class Gpu(NamedTuple):
    """Properties of a GPU that estimates need."""

    name: str
    pattern: str  # of the name that the driver reports
    bf16_flops: float  # FLOP/s
    memory_gib: float
    memory_bytes_s: float
    link_bytes_s: float  # NVLink if it connects all GPUs of a machine, else PCIe
    network_bytes_s: float = 50e9  # of one GPU to other machines: 400 Gbit/s, as in DGX systems since H100
    gpus_per_machine: int = 8  # connected by these links

    @property
    def nvlink_bytes_s(self) -> float | None:
        """Return the rate of NVLink; None if PCIe connects the GPUs of a machine."""
        return self.link_bytes_s if self.link_bytes_s > _PCIE_5 else None


# The first pattern that matches applies.
GPUS = (
    Gpu("GB300", r"\bGB300\b", 2500e12, 267.6, 8e12, 900e9),
    Gpu("B300", r"\bB300\b", 2250e12, 267.6, 8e12, 900e9),
    Gpu("GB200", r"\bGB200\b", 2500e12, 178.3, 8e12, 900e9),
    Gpu("B200", r"\bB200\b", 2250e12, 178.3, 8e12, 900e9),
    Gpu("GH200", r"\bGH200\b", 989e12, 93.0, 4e12, 450e9),
    Gpu("H200 NVL", r"\bH200 NVL\b", 835e12, 139.7, 4.8e12, _PCIE_5),
    Gpu("H200", r"\bH200\b", 989e12, 139.7, 4.8e12, 450e9),
    Gpu("H100 PCIe", r"\bH100 PCIe\b", 756e12, 79.1, 2.0e12, _PCIE_5),
    Gpu("H100 NVL", r"\bH100 NVL\b", 835e12, 93.0, 3.9e12, _PCIE_5),
    Gpu("H100", r"\bH100\b", 989e12, 79.1, 3.35e12, 450e9),
    Gpu("H800 PCIe", r"\bH800 PCIe\b", 756e12, 79.1, 2.0e12, _PCIE_5),
    Gpu("H800", r"\bH800\b", 989e12, 79.1, 3.35e12, 200e9),
    Gpu("H20", r"\bH20\b", 148e12, 95.0, 4.0e12, 450e9),
    Gpu("A100 PCIe 40GB", r"\bA100.PCIe.40GB", 312e12, 39.3, 1.555e12, _PCIE_4),
    Gpu("A100 40GB", r"\bA100\b.*40GB", 312e12, 39.3, 1.555e12, 300e9),
    Gpu("A100 80GB PCIe", r"\bA100 80GB PCIe\b", 312e12, 79.1, 1.935e12, _PCIE_4),
    Gpu("A100", r"\bA100\b", 312e12, 79.1, 2.039e12, 300e9),
    Gpu("A800 80GB PCIe", r"\bA800 80GB PCIe\b", 312e12, 79.1, 1.935e12, _PCIE_4),
    Gpu("A800 40GB", r"\bA800\b.*40GB", 312e12, 39.3, 1.555e12, 200e9),
    Gpu("A800", r"\bA800\b", 312e12, 79.1, 2.039e12, 200e9),
    Gpu("A40", r"\bA40\b", 149.7e12, 44.4, 0.696e12, _PCIE_4),
    Gpu("A30", r"\bA30\b", 165e12, 23.4, 0.933e12, _PCIE_4),
    Gpu("A10G", r"\bA10G\b", 70e12, 21.9, 0.6e12, _PCIE_4),
    Gpu("A10", r"\bA10\b", 125e12, 21.9, 0.6e12, _PCIE_4),
    Gpu("L40S", r"\bL40S\b", 362e12, 44.4, 0.864e12, _PCIE_4),
    Gpu("L40", r"\bL40\b", 181e12, 44.4, 0.864e12, _PCIE_4),
    Gpu("L4", r"\bL4\b", 121e12, 21.9, 0.3e12, _PCIE_4),
)


def find_gpu(device_name: str) -> Gpu | None:
    """Return the known GPU with this name; None for others and for MIG slices, whose names do not show their size."""
    if re.search(r"\bMIG\b", device_name):
        return None
    return next((gpu for gpu in GPUS if re.search(gpu.pattern, device_name, re.IGNORECASE)), None)


def named_gpu(name: str, option: str) -> Gpu:
    """Return the known GPU that an option names.

    Raises:
        ConfigError: there is none.
    """
    if gpu := find_gpu(name):
        return gpu
    known = ", ".join(gpu.name for gpu in GPUS)
    raise ConfigError(f"{option} {name!r} is not a known GPU", remedy=f"Choose one of {known}", location=option)


def with_network(gpu: Gpu | None, gbit: int | None, gpus_per_node: int | None = None) -> Gpu | None:
    """Return the GPU with a network of this many Gbit/s and machines of this many GPUs; None: unchanged.

    Raises:
        ConfigError: there is a network or a machine, but no GPU.
    """
    for option, value in (("--network", gbit), ("--gpus-per-node", gpus_per_node)):
        if value is not None and gpu is None:
            raise ConfigError(
                f"{option} {value} without a known GPU", remedy="Add --gpu NAME, or remove it", location=option
            )
    if gpu is None:
        return None
    network_bytes_s = gpu.network_bytes_s if gbit is None else gbit * 1e9 / 8
    return gpu._replace(network_bytes_s=network_bytes_s, gpus_per_machine=gpus_per_node or gpu.gpus_per_machine)
