"""Environment variables that must be read or set before torch and DeepSpeed are imported.

This module does not import torch: libgomp and DeepSpeed read their variables once, when they are loaded.

    BIPE_DEVICE=cpu|cuda      device of models; unset: the GPU if there is one
    ONEDNN_MAX_CPU_ISA=AVX2   oneDNN's instruction set limit, for example to emulate a CPU without native bf16
"""

import os
from pathlib import Path
from typing import Literal

from megatron_bipe.errors import ConfigError

DeviceType = Literal["cpu", "cuda"]

DEVICE = "BIPE_DEVICE"
_DEVICE_TYPES: tuple[DeviceType, ...] = ("cpu", "cuda")
_GPU_NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, Windows Subsystem for Linux


def requested_device() -> DeviceType | None:
    """Return the device type that `BIPE_DEVICE` requests, or None if it is not set.

    Raises:
        ConfigError: the variable is neither `cpu` nor `cuda`.
    """
    value = os.environ.get(DEVICE, "")
    for device_type in _DEVICE_TYPES:
        if value == device_type:
            return device_type
    if value:
        raise ConfigError(
            f"{DEVICE}={value!r}: the device type must be cpu or cuda",
            remedy="Set one of them, or unset the variable to use the GPU if there is one",
            location=DEVICE,
        )
    return None


def prepare_environment() -> None:
    """Set the variables that torch and DeepSpeed read when they are imported; call it before.

    `DS_ACCELERATOR=cpu` is set with `BIPE_DEVICE=cpu`, so that DeepSpeed does not look for GPUs, and without a GPU
    driver, so that it does not warn about that.

    Without a GPU, `OMP_WAIT_POLICY` defaults to PASSIVE: by default a waiting libgomp thread keeps its core busy, so on
    a machine with other load it takes the core from the thread that it waits for (measured in docs/performance.md).

    Raises:
        ConfigError: as in `requested_device`.
    """
    if requested_device() == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if requested_device() == "cpu" or not has_gpu_driver():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def has_gpu_driver() -> bool:
    """Return True if a GPU driver is loaded; torch may still find no usable GPU."""
    return any(Path(node).exists() for node in _GPU_NODES)


def onednn_isa_limit() -> str:
    """Return the instruction set that oneDNN is limited to; empty if it is not limited."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
