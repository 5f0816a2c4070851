"""What the machine could do, and what keeps it from doing so."""

import ctypes
import resource
import time

import torch

# Dense bf16 tensor-core peaks from the vendors' data sheets, FLOP/s.
# The first name that fits counts.
_BF16_PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
}
# glibc's malloc.h: never map large blocks by themselves, never trim the heap, grow it by 64 MiB.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEEP_MEMORY = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 * 2**20}
_PROBE_SIZE, _PROBE_REPEATS = 1024, 5


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of one device, or None where it is not known.

    GPUs: the data sheet's dense bf16 figure. CPU: the best of a few square matrix products, measured now with
    the threads this rank has.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [peak for model, peak in _BF16_PEAKS.items() if model in name]
        return known[0] if known and dtype == torch.bfloat16 else None
    a, b = torch.ones(2, _PROBE_SIZE, _PROBE_SIZE, dtype=dtype)
    best_s = min(_timed(a, b) for _ in range(_PROBE_REPEATS))
    return 2 * _PROBE_SIZE**3 / best_s


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has used, GiB: device memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def keep_freed_memory(device: torch.device) -> bool:
    """Let glibc hand freed memory to the next tensor instead of returning it to the system; nothing but on a CPU.

    By default every large tensor is mapped anew and faulted in page by page, at every step. Measured on two cores
    with the quickstart's model: 1.28 times the tokens a second. The process keeps its peak memory until it ends.

    Returns:
        Whether the C library took the settings; others than glibc do not know them.
    """
    if device.type != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, value) == 1 for option, value in _KEEP_MEMORY.items())


def _timed(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(a, b)
    return time.perf_counter() - start
