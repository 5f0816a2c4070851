"""Name of the processor and its native support for bf16, without torch."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

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
