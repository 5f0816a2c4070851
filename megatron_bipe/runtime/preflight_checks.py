"""The checks of a preflight, as one table, and the report of their results."""

import hashlib
import json
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

from megatron_bipe import errors
from megatron_bipe.runtime.preflight_facts import (
    FAILED,
    Check,
    Result,
    bounded,
    bounded_entries,
    listed,
    same,
    same_entries,
)
from megatron_bipe.runtime.preflight_steps import UNKNOWN_HOST
from megatron_bipe.text_table import text_table

_WIDTH = 96  # of the text that shows what was seen
_SAME = "equal on all ranks"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"


def _seconds(duration_s: float) -> str:
    return f"{duration_s:.2f} s"


def _listed(entries: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in entries.items()) or "none"


def _hash(entries: Mapping[str, str]) -> str:
    return f"SHA-256 {hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:12]}"


CHECKS = (
    Check("ranks", "all have started", same(lambda _: "all have started"), "Read the output of the missing ranks"),
    Check("device", _SAME, same(), "Give all hosts the same GPUs and driver, one per rank"),
    Check(
        "device memory",
        "nothing else uses the GPU",
        bounded(_gb),
        "End the other processes on these GPUs, shown by nvidia-smi",
    ),
    Check("versions", _SAME, same_entries(_listed), "Install the same versions and the same source on all hosts"),
    Check("configuration", _SAME, same_entries(_hash), "Start all ranks with the same files and options"),
    Check(
        "environment",
        _SAME,
        same_entries(_listed),
        "Set these variables on all hosts: deepspeed passes on NCCL* and, from a file .deepspeed_env, others; "
        "srun --export=ALL all; mpirun -x NAME",
    ),
    Check("clock", "within 1 s of rank 0", bounded(_seconds), "Synchronize the clocks, for example with chrony"),
    Check("data", _SAME, same_entries(_listed), "Copy the dataset again, or use a shared file system"),
    Check(
        "run folder",
        "the same folder, and writable",
        same(),
        "Put run_dir on a file system that all hosts share, where all may write",
    ),
    Check("write rate", "", bounded(lambda rate: f"{rate / 1e6:,.0f} MB/s"), ""),
    Check(
        "disk",
        "has space for the next checkpoint",
        bounded(_gb),
        "Free space, or keep fewer checkpoints (checkpoint.keep_last, checkpoint.keep_every)",
    ),
    Check(
        "host memory",
        "has space for copies of the training state",
        bounded(_gb),
        "Give the job more memory, or set checkpoint.asynchronous=false",
    ),
    Check(
        "shared memory",
        "suffices for NCCL",
        bounded(_gb),
        "Enlarge /dev/shm; in a container: --shm-size=1g, or --ipc=host",
    ),
    Check("open files", "suffices for the connections", bounded("{:,.0f}".format), "Raise the limit: ulimit -n 65536"),
    Check(
        "gloo interface",
        "reachable from other hosts",
        listed(),
        "Set GLOO_SOCKET_IFNAME on all hosts, for deepspeed in .deepspeed_env",
    ),
    Check(
        "process group",
        "starts and adds up",
        bounded(_seconds),
        "Run again with NCCL_DEBUG=INFO; set NCCL_SOCKET_IFNAME (gloo: GLOO_SOCKET_IFNAME) to the hosts' interface",
    ),
    Check(
        "host-side group",
        "starts",
        bounded(_seconds),
        "Set GLOO_SOCKET_IFNAME to the hosts' interface, for deepspeed in .deepspeed_env",
    ),
    Check(
        "within hosts, GB/s",
        "no host is much slower than the median, or than its NVLink",
        bounded_entries("{:,.2f}".format),
        "Compare nvidia-smi topo -m and nvidia-smi nvlink --status of these hosts with the others",
    ),
    Check("all ranks, GB/s", "", bounded_entries("{:,.2f}".format), ""),
)


def _rows(result: Result) -> list[tuple[str, str, str]]:
    """Return the rows of a result: what was seen is broken into lines."""
    lines = textwrap.wrap(result.seen, _WIDTH, break_long_words=False, break_on_hyphens=False)
    return [(result.name, result.verdict, lines[0]), *(("", "", line) for line in lines[1:])]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Report(NamedTuple):
    """Results of a preflight, on the main rank."""

    results: list[Result]
    hosts: dict[int, str]
    num_ranks: int
    duration_s: float

    @property
    def code(self) -> int:
        return errors.FAILED if any(result.verdict == FAILED for result in self.results) else 0

    def __str__(self) -> str:
        rows = [row for result in self.results for row in _rows(result)]
        failed = [result for result in self.results if result.verdict == FAILED]
        remedies = [f"{result.name}: the rule is: {result.rule}. {result.remedy}." for result in failed]
        num_hosts = len(set(self.hosts.values()) - {UNKNOWN_HOST})
        sizes = f"{_counted(self.num_ranks, 'rank')} on {_counted(num_hosts, 'host')}"
        head = f"preflight: {sizes}, {self.duration_s:.0f} s, {len(failed)} failed"
        table = text_table([("check", "verdict", "seen"), *rows], head=1, left=(0, 1, 2))
        return "\n".join([head, "", table, *(["", *remedies] if failed else [])]) + "\n"

    def as_json(self) -> str:
        content = {
            "code": self.code,
            "ranks": self.num_ranks,
            "hosts": self.hosts,
            "duration_s": self.duration_s,
            "checks": [result._asdict() for result in self.results],
        }
        return json.dumps(content, indent=2) + "\n"
