"""Environment variables that must be read or set before torch and DeepSpeed are imported.

No torch here: libgomp and DeepSpeed read their variables once, while they are loaded.

    BIPE_DEVICE=cpu|cuda      where models run; unset: on the GPU if there is one
    ONEDNN_MAX_CPU_ISA=AVX2   oneDNN's own limit, for example to emulate a processor without native bf16
"""

import os
from pathlib import Path
from typing import Literal

from megatron_bipe.errors import ConfigError

DeviceType = Literal["cpu", "cuda"]

DEVICE = "BIPE_DEVICE"
_DEVICE_TYPES: tuple[DeviceType, ...] = ("cpu", "cuda")
_GPU_NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # drivers of NVIDIA, of AMD, and of Windows' Linux subsystem


def requested_device() -> DeviceType | None:
    """Return the device type that `BIPE_DEVICE` asks for, None where it leaves the choice to the machine.

    Raises:
        ConfigError: the variable holds something else than `cpu` or `cuda`.
    """
    value = os.environ.get(DEVICE, "")
    for device_type in _DEVICE_TYPES:
        if value == device_type:
            return device_type
    if value:
        raise ConfigError(
            f"{DEVICE}={value!r}: a device type is cpu or cuda",
            remedy="Set one of them, or unset the variable to use the GPU where there is one",
            location=DEVICE,
        )
    return None


def prepare_environment() -> None:
    """Set what torch and DeepSpeed read while they are imported; call it before they are.

    DeepSpeed gets `DS_ACCELERATOR=cpu` with `BIPE_DEVICE=cpu`, so that it does not look for GPUs either, and where no
    driver is loaded, so that it does not warn of that.

    Where nothing runs on a GPU, `OMP_WAIT_POLICY=PASSIVE` unless it is set: by default a thread of libgomp that waits
    for the others keeps its core busy, so on a machine with other work it takes the core from the thread that it waits
    for (docs/performance.md has the measurement).

    Raises:
        ConfigError: as `requested_device`.
    """
    if requested_device() == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if requested_device() == "cpu" or not has_gpu_driver():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def has_gpu_driver() -> bool:
    """Return True if the driver of a GPU is loaded; torch may still find no GPU that it can use."""
    return any(Path(node).exists() for node in _GPU_NODES)


def onednn_isa_limit() -> str:
    """Return the instruction set that oneDNN is limited to, empty where it is not."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
