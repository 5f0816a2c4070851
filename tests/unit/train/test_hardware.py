"""What a machine could do."""

import platform
import subprocess
import sys

import pytest
import torch

from megatron_bipe.train.hardware import peak_flops, peak_memory_gib

CPU = torch.device("cpu")


def test_peak_flops_of_a_cpu_bounds_what_a_product_reaches():
    peak = peak_flops(CPU, torch.float32)
    assert 1e8 < peak < 1e15


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A10G", 70e12)],
)
def test_peak_flops_of_a_known_gpu_is_its_data_sheet(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None


def test_peak_flops_of_an_unknown_gpu_is_unknown(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Other 1")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) is None


def test_peak_memory_counts_what_was_touched():
    before = peak_memory_gib(CPU)
    held = torch.ones(int((before + 0.25) * 2**28))  # more than the process ever held, fp32
    assert peak_memory_gib(CPU) > before
    del held


def test_keep_freed_memory_takes_hold_on_glibc_and_freed_tensors_are_reused():
    code = (
        "import torch, resource\n"
        "from megatron_bipe.train.hardware import keep_freed_memory\n"
        "print(keep_freed_memory(torch.device('cpu')))\n"
        "for _ in range(10): torch.ones(2**24)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): torch.ones(2**24)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took, faults = done.stdout.split()
    if took == "True":  # 64 MiB are 16,384 pages; mapped anew they would fault 20 times over
        assert int(faults) < 5000
    else:
        assert platform.libc_ver()[0] != "glibc"
