"""The device that models run on: type, name, precision, compilation, bf16 support, peak FLOP/s and memory."""

import ctypes
import logging
import resource
from typing import NamedTuple

import torch

from megatron_bipe.config import AUTO, ComputePrecision, Precision, RunConfig
from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime.environment import (
    DEVICE,
    Bf16Support,
    DeviceType,
    cpu_bf16_support,
    cpu_facts,
    onednn_isa_limit,
    requested_device,
)
from megatron_bipe.runtime.gpus import Gpu, find_gpu

_log = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by `train.precision`

# Options of glibc's malloc.h: no mmap for large blocks, no trimming of the heap, growth by 64 MiB.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEEP_MEMORY = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 * 2**20}


class PrecisionChoice(NamedTuple):
    """The precision that a model computes in, and why."""

    precision: ComputePrecision
    reason: str


class CompileChoice(NamedTuple):
    """True if torch.compile fuses blocks and the loss, and why."""

    compiles: bool
    reason: str

    def __str__(self) -> str:
        return f"{'on' if self.compiles else 'off'} ({self.reason})"


class Choices(NamedTuple):
    """What a run leaves to the hardware."""

    precision: PrecisionChoice
    compiles: CompileChoice


def device_type() -> DeviceType:
    """Return the device type that `BIPE_DEVICE` requests, else `cuda` if there is a GPU, else `cpu`.

    CUDA is not initialized if `BIPE_DEVICE=cpu`.

    Raises:
        ConfigError: `BIPE_DEVICE=cuda` without a GPU that torch can use, or an unknown value.
    """
    requested = requested_device()
    if requested == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if requested == "cuda":
        raise ConfigError(
            f"{DEVICE}=cuda, but torch {torch.__version__} finds no GPU",
            remedy="Check nvidia-smi and that torch is a CUDA build, or unset the variable",
            location=DEVICE,
        )
    return "cpu"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_facts().name


def choose_precision(asked: Precision, device: torch.device, option: str) -> PrecisionChoice:
    """Return the compute precision: `auto` is bf16 if the device multiplies it natively, else fp32.

    Log a warning if bf16 is requested and is not native.

    Args:
        asked: requested precision.
        device: device of the model.
        option: name of the setting, for messages: `train.precision` or `--dtype`.
    """
    support = bf16_support(device)
    if asked == AUTO:
        return PrecisionChoice("bf16" if support.is_native else "fp32", f"auto: {support.reason}")
    if asked == "bf16" and not support.is_native:
        _log.warning(
            "%s=bf16, but %s: matrix products will be many times slower than in fp32, which %s=auto selects",
            *(option, support.reason, option),
        )
    return PrecisionChoice(asked, f"{option}={asked}")


def choose_compile(run: RunConfig, zero_stage: int, *, on_gpu: bool) -> CompileChoice:
    """Return whether torch.compile fuses blocks and the loss of a run.

    `auto` compiles on a GPU, unless the ZeRO stage rules it out.

    Raises:
        ConfigError: `train.compile=on` with ZeRO 3.
    """
    asked = run.train.compile
    if asked == "off":
        return CompileChoice(compiles=False, reason="train.compile=off")
    if zero_stage == 3:
        if asked == "on":
            raise ConfigError(
                "train.compile=on with zero_optimization.stage=3: DeepSpeed gathers the weights of ZeRO 3 in hooks of "
                "each layer, which cannot be part of a compiled block",
                remedy="Set train.compile=auto or off, or use ds_configs/zero1.json or zero2.json",
                location="train.compile",
            )
        return CompileChoice(compiles=False, reason="auto: ZeRO 3 gathers weights between the layers of a block")
    if asked == AUTO and not on_gpu:
        return CompileChoice(compiles=False, reason="auto: not on a CPU")
    return CompileChoice(compiles=True, reason="auto: on a GPU" if asked == AUTO else "train.compile=on")


def weights_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype that a run's weights have in evaluation and export.

    An imported run keeps `auto` until its training starts, and its weights are not rounded before.
    """
    return torch.float32 if precision == AUTO else DTYPES[precision]


def bf16_support(device: torch.device) -> Bf16Support:
    """Return whether the device multiplies bf16 in hardware, according to its flags; nothing is timed."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        gpu = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
        is_native = (major, minor) >= (8, 0)
        return Bf16Support(is_native, f"{gpu} multiplies bf16 {'natively' if is_native else 'by emulation only'}")
    return cpu_bf16_support(cpu_facts().flags, onednn_isa_limit())


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the data sheet's dense bf16 peak of a GPU, FLOP/s; None for other precisions, unknown GPUs, CPUs.

    A CPU has no fixed peak: its clock depends on the instructions and on the load of other cores.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu and gpu.bf16_flops


def own_gpu(device: torch.device) -> Gpu | None:
    """Return this machine's GPU with the memory that torch reports; None on a CPU and for unknown GPUs."""
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu and gpu._replace(memory_gib=torch.cuda.get_device_properties(device).total_memory / 2**30)


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: device memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def keep_freed_memory(device: torch.device) -> bool:
    """Let glibc reuse freed memory for the next tensors instead of returning it to the system; CPU only.

    By default every large tensor is mapped and faulted in page by page again at every step. Measured on two cores with
    the quickstart's model: 1.28 times the tokens per second. The process keeps its peak memory until it ends.

    Returns:
        True if the C library accepted the settings; only glibc knows them.
    """
    if device.type != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, value) == 1 for option, value in _KEEP_MEMORY.items())
