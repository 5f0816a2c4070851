"""Environment variables and processor features that must be known before torch and DeepSpeed are imported.

This module does not import torch: libgomp and DeepSpeed read their variables once, when they are loaded, and CUDA when
its driver starts.

    BIPE_DEVICE=cpu|cuda      device of models; unset: the GPU if there is one
    BIPE_WEBHOOK=URL          webhook of alerts, where `alerts.webhook` gives none
    BIPE_FAILURE_FILE=PATH    file to which ranks append why they end; the supervisor sets it
    ONEDNN_MAX_CPU_ISA=AVX2   oneDNN's instruction set limit, for example to emulate a CPU without native bf16
"""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_bipe.config import RunConfig
from megatron_bipe.errors import ConfigError

DeviceType = Literal["cpu", "cuda"]

DEVICE, FAILURE_FILE, WEBHOOK = "BIPE_DEVICE", "BIPE_FAILURE_FILE", "BIPE_WEBHOOK"
_DEVICE_TYPES: tuple[DeviceType, ...] = ("cpu", "cuda")
_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")  # torch.use_deterministic_algorithms refuses others
_BATCH_SYSTEMS = {"SLURM": "SLURM_JOB_ID", "PBS": "PBS_JOBID", "LSF": "LSB_JOBID"}  # with the variable of the job
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

    torch's C++ log has errors only by default: its warning about a lost connection prints 25 lines of C++ stack.

    Raises:
        ConfigError: as in `requested_device`.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if requested_device() == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if requested_device() == "cpu" or not has_gpu_driver():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def prepare_cuda(run: RunConfig) -> None:
    """Set the variables that CUDA and cuBLAS read for a run when they start.

    Call it before DeepSpeed is imported: that asks for `torch.cuda.is_available`, which starts CUDA's driver.
    """
    if run.parallel.tensor > 1:
        # Kernels start in the order of their launches, so a collective does not wait for the product that overlaps it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if run.train.deterministic and os.environ.get(_CUBLAS_WORKSPACE) not in _DETERMINISTIC_WORKSPACES:
        os.environ[_CUBLAS_WORKSPACE] = _DETERMINISTIC_WORKSPACES[0]


def batch_job() -> str:
    """Return the name of the batch job that this process belongs to, such as "SLURM job 12"; "" if there is none."""
    found = [f"{name} job {os.environ[key]}" for name, key in _BATCH_SYSTEMS.items() if os.environ.get(key)]
    return found[0] if found else ""


def webhook_variable() -> str | None:
    """Return the value of `BIPE_WEBHOOK`; None if it is not set or empty."""
    return os.environ.get(WEBHOOK) or None


def has_gpu_driver() -> bool:
    """Return True if a GPU driver is loaded; torch may still find no usable GPU."""
    return any(Path(node).exists() for node in _GPU_NODES)


def onednn_isa_limit() -> str:
    """Return the instruction set that oneDNN is limited to; empty if it is not limited."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""


_BF16_CPU_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")  # flags of bf16 products in /proc/cpuinfo; the last: Arm
_ISAS_WITH_BF16 = re.compile(r"(AVX512_CORE_(BF16|FP16|AMX)|AVX10|ALL|DEFAULT)", re.IGNORECASE)  # oneDNN's names


class CpuFacts(NamedTuple):
    """Name and flags of the processor; empty if the operating system does not report them."""

    name: str
    flags: frozenset[str]


def cpu_facts() -> CpuFacts:
    """Read `/proc/cpuinfo`, which exists on Linux only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags") or fields.get("features") or ""  # x86, Arm
    return CpuFacts(fields.get("model name", "CPU"), frozenset(flags.split()))


class Bf16Support(NamedTuple):
    """Hardware support for bf16 matrix products."""

    is_native: bool
    reason: str  # such as "this CPU has amx_bf16"


def cpu_bf16_support(flags: Collection[str], isa_limit: str) -> Bf16Support:
    """Return whether a processor multiplies bf16 natively.

    Without such instructions torch's bf16 products are 50 to 500 times slower than fp32 ones on AVX2, and several times
    slower on AVX-512: https://github.com/pytorch/pytorch/issues/146508.

    Args:
        flags: as `/proc/cpuinfo` lists them.
        isa_limit: value of `ONEDNN_MAX_CPU_ISA`; oneDNN computes torch's matrix products.
    """
    found = [flag for flag in _BF16_CPU_FLAGS if flag in flags]
    if not found:
        missing = ", ".join(_BF16_CPU_FLAGS)
        return Bf16Support(False, f"this CPU does not multiply bf16 natively (it has none of {missing})")
    if isa_limit and not _ISAS_WITH_BF16.match(isa_limit):
        return Bf16Support(False, f"ONEDNN_MAX_CPU_ISA={isa_limit} keeps torch from multiplying bf16 natively")
    return Bf16Support(True, f"this CPU multiplies bf16 natively ({', '.join(found)})")
