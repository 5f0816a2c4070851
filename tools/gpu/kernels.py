"""The installed software, and attention's kernels: which ones run, their time and their error."""

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.attention import largest_error
from gpu.check import Check
from gpu.engines import wait_for_device
from megatron_bipe.config import ModelConfig
from megatron_bipe.model import causal_attention
from megatron_bipe.runtime.hardware import device_name, device_type, peak_flops

PACKAGES = ("torch", "deepspeed", "transformers", "triton")
HEAD_WIDTHS = (64, 72, 80, 128, 136, 144)
EARLY_QUERIES = 64  # their sums have few terms, so that errors do not average out
REPEATS = 5


def versions(check: Check) -> None:
    """Report the versions, the device and its peak."""
    device = torch.device(device_type())
    check.report("device", device_name(device) if check.on_gpu else f"CPU: {device_name(device)}")
    check.report("python", platform.python_version())
    for package in PACKAGES:
        try:
            check.report(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            check.report(package, "not installed")
    check.report("cuda", str(torch.version.cuda))
    check.report("cudnn", str(torch.backends.cudnn.version()))
    peak = peak_flops(device, torch.bfloat16)
    check.report("peak TFLOP/s", peak / 1e12 if peak else "unknown")


def attention(check: Check) -> None:
    """Report kernel, time and error of attention for the head widths of the recipes, with bias channels or without."""
    for width in HEAD_WIDTHS:
        for key_heads in (12, 4):
            _time_kernels(check, width, key_heads)
    tokens_of_error = (1024, 8192, 32768) if check.on_gpu else (256,)
    for tokens in tokens_of_error:
        for width in (64, 128):
            _report_errors(check, width, tokens)


def _time_kernels(check: Check, width: int, key_heads: int) -> None:
    """Report the longest kernel and the time, without and with gradients."""
    rows, tokens, dtype = check.choose(8, 1), check.choose(1024, 32), torch.bfloat16 if check.on_gpu else torch.float32
    generator = torch.Generator().manual_seed(0)
    device = torch.device(device_type())
    q, k, v = (
        torch.randn(rows, heads, tokens, width, generator=generator).to(device, dtype)
        for heads in (12, key_heads, key_heads)
    )
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    grad = torch.randn(q.shape, generator=generator).to(device, dtype)
    name = f"heads {width}, 12/{key_heads}"

    def forward() -> None:
        with torch.no_grad():
            causal_attention(q, k, v)

    def with_backward() -> None:
        causal_attention(*inputs).backward(grad)

    for kind, run in (("forward", forward), ("forward and backward", with_backward)):
        check.report(f"{name}, {kind}: kernel", longest_kernel(run))
        check.report(f"{name}, {kind}: ms", 1000 * median_s(run, device))


def longest_kernel(run: Callable[[], object]) -> str:
    """Return the name of the kernel in which a call spends most time; on a CPU, of the operation."""
    run()  # the first call may choose a kernel
    found = kernels_of(run)
    return found[0].name[:100] if found else "none"


class Kernel(NamedTuple):
    """The launches of one kernel in a call; on a CPU, of one operation."""

    time_us: float
    num_launches: int
    name: str


def kernels_of(run: Callable[[], object]) -> list[Kernel]:
    """Return the kernels of a call, the longest first; on a CPU, the operations."""
    device = torch.device(device_type())
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        run()
        wait_for_device(device)
    return kernel_times(profiler, on_gpu=on_gpu)


def kernel_times(profiler: profile, *, on_gpu: bool) -> list[Kernel]:
    """Return the kernels that a profiler has recorded, the longest first; on a CPU, the operations.

    Marked ranges, such as those of torch.compile and of an optimizer's step, are not included: on a GPU they have the
    time of all kernels within them.
    """
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = [
        Kernel(event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
        for event in profiler.key_averages()
        if event.device_type == wanted and not event.is_user_annotation
    ]
    return sorted(found, reverse=True)


def median_s(run: Callable[[], None], device: torch.device) -> float:
    """Return the median time of calls after a first one."""
    seconds = []
    for _ in range(REPEATS + 1):
        wait_for_device(device)
        began_s = time.perf_counter()
        run()
        wait_for_device(device)
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds[1:])


def _report_errors(check: Check, width: int, tokens: int) -> None:
    """Report errors against fp64, and the largest ratio of those with the bias to those without."""
    model = ModelConfig(num_heads=12, hidden_size=12 * width)
    queries: dict[str, Tensor] = {
        "early": torch.arange(EARLY_QUERIES),
        "late": torch.arange(tokens - EARLY_QUERIES, tokens),
    }
    ratios = []
    for where, positions in queries.items():
        plain = largest_error(model, tokens, False, queries=positions)
        check.report(f"heads {width}, {tokens} tokens, {where} queries: error", plain)
        for name, bilevel in (("alibi", False), ("bipe_alibi", True)):
            biased = largest_error(model, tokens, True, bilevel=bilevel, queries=positions)
            check.report(f"heads {width}, {tokens} tokens, {where} queries: error of {name}", biased)
            ratios.append(biased / plain)
    check.report(f"heads {width}, {tokens} tokens: largest ratio of errors", max(ratios))
