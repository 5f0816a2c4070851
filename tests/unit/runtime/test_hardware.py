"""Properties of the device, and what a run chooses by them."""

import platform
from types import SimpleNamespace

import pytest
import torch

from megatron_bipe.config import load_run_config
from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime import hardware
from megatron_bipe.runtime.environment import Bf16Support, cpu_bf16_support
from megatron_bipe.runtime.hardware import (
    bf16_support,
    choose_compile,
    choose_precision,
    own_gpu,
    peak_flops,
    peak_memory_gib,
)
from tests.helpers.ranks import run_programs

CPU = torch.device("cpu")


def test_peak_flops_of_a_cpu_is_unknown():
    assert peak_flops(CPU, torch.float32) is None and peak_flops(CPU, torch.bfloat16) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B300 SXM6 AC", 2250e12),
        ("NVIDIA GB300", 2500e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
    ],
)
def test_peak_flops_of_a_known_gpu_is_its_data_sheet(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None


def test_own_gpu_has_the_memory_that_torch_reports(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    properties = SimpleNamespace(total_memory=79 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    gpu = own_gpu(torch.device("cuda"))
    assert gpu is not None and (gpu.name, gpu.memory_gib) == ("H100", 79)
    assert own_gpu(CPU) is None


XEON, OLD_XEON, ZEN_3, GRAVITON = (
    {"avx2", "avx512f", "avx512_bf16", "amx_bf16"},
    {"avx2", "avx512f", "avx512_vnni"},
    {"avx2", "fma"},
    {"asimd", "bf16"},
)


@pytest.mark.parametrize(
    ("flags", "isa_limit", "is_native", "named"),
    [
        (XEON, "", True, "amx_bf16, avx512_bf16"),
        (XEON, "AVX512_CORE_AMX", True, "amx_bf16"),
        (XEON, "ALL", True, "amx_bf16"),
        (XEON, "AVX2", False, "ONEDNN_MAX_CPU_ISA=AVX2"),
        (XEON, "AVX512_CORE", False, "ONEDNN_MAX_CPU_ISA=AVX512_CORE"),
        (OLD_XEON, "", False, "none of"),
        (ZEN_3, "", False, "none of"),
        (GRAVITON, "", True, "bf16"),
        (frozenset(), "", False, "none of"),
    ],
)
def test_bf16_is_native_by_the_flags_of_the_cpu_and_the_limit_of_onednn(flags, isa_limit, is_native, named):
    support = cpu_bf16_support(flags, isa_limit)
    assert support.is_native is is_native and named in support.reason


@pytest.mark.parametrize(("capability", "is_native"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_is_native_on_gpus_since_compute_capability_8(monkeypatch, capability, is_native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA T4")
    assert bf16_support(torch.device("cuda")).is_native is is_native


@pytest.mark.parametrize(
    ("asked", "is_native", "precision", "warns"),
    [
        ("auto", True, "bf16", False),
        ("auto", False, "fp32", False),
        ("bf16", True, "bf16", False),
        ("bf16", False, "bf16", True),
        ("fp32", True, "fp32", False),
        ("fp32", False, "fp32", False),
    ],
)
def test_choose_precision_warns_of_slow_bf16_alone(monkeypatch, caplog, asked, is_native, precision, warns):
    monkeypatch.setattr(hardware, "bf16_support", lambda _: Bf16Support(is_native, "the reason"))
    choice = choose_precision(asked, CPU, "--dtype")
    assert choice.precision == precision
    assert ("the reason" in choice.reason) == (asked == "auto")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warns
    assert not warns or ("--dtype=bf16" in caplog.text and "the reason" in caplog.text)


def test_peak_flops_of_an_unknown_gpu_is_unknown(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Other 1")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) is None


def test_peak_memory_counts_what_was_touched():
    before = peak_memory_gib(CPU)
    held = torch.ones(int((before + 0.25) * 2**28))  # more than the process ever allocated, fp32
    assert peak_memory_gib(CPU) > before
    del held


def test_keep_freed_memory_takes_effect_on_glibc_and_freed_tensors_are_reused(tmp_path):
    code = (
        "import torch, resource\n"
        "from megatron_bipe.runtime.hardware import keep_freed_memory\n"
        "print(keep_freed_memory(torch.device('cpu')))\n"
        "for _ in range(10): torch.ones(2**24)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): torch.ones(2**24)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    [ended] = run_programs(exec, [code, {}], tmp_path)  # the allocator's settings cannot be undone
    took, faults = ended.output.split()
    if took == "True":  # 64 MiB are 16,384 pages; with new mappings all would fault 20 times
        assert int(faults) < 5000
    else:
        assert platform.libc_ver()[0] != "glibc"


@pytest.mark.parametrize(
    ("asked", "device", "zero", "compiles"),
    [
        ("auto", "cuda", 1, True),
        ("auto", "cuda", 3, False),
        ("auto", "cpu", 1, False),
        ("on", "cpu", 2, True),
        ("on", "cuda", 0, True),
        ("off", "cuda", 1, False),
        ("off", "cuda", 3, False),
    ],
)
def test_choose_compile_follows_setting_device_and_zero_stage(asked, device, zero, compiles):
    run = load_run_config(None, [f"train.compile={asked}"])
    choice = choose_compile(run, zero, on_gpu=device == "cuda")
    assert choice.compiles is compiles
    assert choice.reason.startswith("auto:" if asked == "auto" else f"train.compile={asked}")
    assert str(choice).startswith("on (" if compiles else "off (")


def test_compilation_cannot_be_forced_with_zero_3():
    run = load_run_config(None, ["train.compile=on"])
    with pytest.raises(ConfigError, match=r"stage=3.*zero1\.json"):
        choose_compile(run, 3, on_gpu=False)
