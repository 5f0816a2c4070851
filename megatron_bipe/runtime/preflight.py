"""The preflight of a launch: what every rank measures, in which order, and when a step is skipped."""

import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bipe.config import RunConfig
from megatron_bipe.errors import FAILED, ConfigError
from megatron_bipe.parallel import Mesh
from megatron_bipe.runtime import host_facts
from megatron_bipe.runtime.distributed_init import find_gloo_interface, launch_store
from megatron_bipe.runtime.gpus import Gpu
from megatron_bipe.runtime.hardware import own_gpu
from megatron_bipe.runtime.preflight_checks import CHECKS, Report
from megatron_bipe.runtime.preflight_facts import Bounded, ranks_text, run_check
from megatron_bipe.runtime.preflight_network import Network, clock_difference
from megatron_bipe.runtime.preflight_steps import Measures, SkippedError, Steps

_RATE_BYTES = 2**28
_SEEN_S = 10.0  # longest time until a new file is seen on other hosts: NFS caches the content of folders


class Plan(NamedTuple):
    """What is to be started, as functions that may raise an error on this rank."""

    load: Callable[[], tuple[RunConfig, dict[str, Any]]]  # the configurations of the run and of DeepSpeed
    checkpoint_space: Callable[[RunConfig], tuple[int, Bounded]]  # bytes of a checkpoint; free and needed bytes
    device_problem: str = ""
    limit_s: float = 60.0  # of a step
    rate_bytes: int = _RATE_BYTES


def run_preflight(mesh: Mesh, plan: Plan, conclude: Callable[[Report], None]) -> int:
    """Check a launch; all ranks call this together, and return the same exit code.

    Args:
        mesh: this rank.
        plan: what is to be started.
        conclude: called with the report on the main rank, before the others learn the code.

    Raises:
        ConfigError: the store of the launch cannot be reached.
        BipeError: the main rank does not answer.
    """
    began_s, host = time.monotonic(), socket.gethostname()
    stores = launch_store(mesh, plan.limit_s)
    steps = Steps(mesh, stores[0], plan.limit_s, host)
    steps.take({"ranks": lambda: host})
    failed = steps.take(_local_measures(mesh, plan))
    _check_folder(steps, mesh, plan)
    failed |= steps.take({"clock": lambda: clock_difference(mesh, stores[1])}, _missing(steps))
    network = Network(mesh, stores[1], plan.limit_s, steps.doing)
    failed |= _check_network(steps, network, failed, own_gpu(mesh.device) if "device" not in failed else None)
    if not mesh.is_main:
        return steps.end(FAILED)
    facts = {
        check.name: {rank: found[check.name] for rank, found in steps.facts.items() if check.name in found}
        for check in CHECKS
    }
    results = [run_check(check, facts[check.name], steps.hosts) for check in CHECKS]
    report = Report(results, steps.hosts, mesh.num_ranks, time.monotonic() - began_s)
    conclude(report)
    return steps.end(report.code)


def _missing(steps: Steps) -> str:
    return f"{ranks_text(sorted(steps.lost))} did not answer" if steps.lost else ""


def _local_measures(mesh: Mesh, plan: Plan) -> Measures:
    """Return the measurements that involve this rank alone, and on the first rank of each host those of the host."""

    def device() -> str:
        if plan.device_problem:
            raise RuntimeError(plan.device_problem)
        return host_facts.device_fact(mesh)

    measures: dict[str, Callable[[], Any]] = {
        "device": device,
        "device memory": lambda: host_facts.free_device_memory(mesh),
        "versions": host_facts.versions,
        "configuration": lambda: _flat_configuration(*plan.load()),
        "environment": lambda: host_facts.relevant_environment(os.environ),
        "open files": lambda: host_facts.open_files(mesh),
        "gloo interface": lambda: find_gloo_interface(mesh),
    }
    if mesh.local_rank == 0:
        measures |= {
            "data": lambda: host_facts.data_fingerprints(_loaded(plan)),
            "disk": lambda: plan.checkpoint_space(_loaded(plan))[1],
            "host memory": lambda: _host_memory(mesh, plan, _loaded(plan)),
            "shared memory": lambda: host_facts.shared_memory(mesh),
        }
    return measures


def _host_memory(mesh: Mesh, plan: Plan, run: RunConfig) -> Bounded:
    return host_facts.host_memory(run, mesh, plan.checkpoint_space(run)[0])


def _flat_configuration(run: RunConfig, ds_config: Mapping[str, Any]) -> dict[str, str]:
    """Return all fields of both configurations as text."""
    found: dict[str, str] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            found[prefix] = str(value)

    add("", run.model_dump(mode="json"))
    add("DeepSpeed", ds_config)
    return found


def _loaded(plan: Plan) -> RunConfig:
    """Return the run configuration; its errors are those of the check of the configuration."""
    try:
        return plan.load()[0]
    except Exception as error:
        raise SkippedError("the configuration could not be loaded") from error


def _check_folder(steps: Steps, mesh: Mesh, plan: Plan) -> None:
    """Check that the first rank of each host sees a file of the main rank in the run folder, and can write there."""
    name = steps.broadcast("folder", f".preflight-{uuid.uuid4().hex[:8]}")
    made: list[Path] = []

    def work() -> Path:
        return _loaded(plan).run_dir.absolute() / name

    def begin() -> str:
        made.extend(_make_folders(work()))
        (work() / name).write_text(name, encoding="utf-8")
        return str(work().parent)

    skip = _missing(steps)
    if "run folder" in steps.take({"run folder": begin} if mesh.is_main else {}, skip):
        skip = skip or "rank 0 cannot use the run folder"
    measures: dict[str, Callable[[], Any]] = {
        "run folder": lambda: _write_in(work(), name),
        "write rate": lambda: Bounded(host_facts.write_rate(work(), plan.rate_bytes)),
    }
    if mesh.is_main:
        del measures["run folder"]
    steps.take(measures if mesh.local_rank == 0 else {}, skip)
    if made:
        _remove_folders(made)


def _make_folders(path: Path) -> list[Path]:
    """Create a folder, and return those that did not exist, the innermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_folders(made: list[Path]) -> None:
    shutil.rmtree(made[0], ignore_errors=True)
    with suppress(OSError):  # another process has written there
        for folder in made[1:]:
            folder.rmdir()


def _write_in(work: Path, name: str) -> str:
    """Wait for the main rank's file, and write one; return the run folder."""
    until_s = time.monotonic() + _SEEN_S
    while not (work / name).exists():
        if time.monotonic() > until_s:
            raise ConfigError(f"a file that rank 0 wrote to {work.parent} does not appear here within {_SEEN_S:g} s")
        time.sleep(0.05)
    (work / f"{name}-{socket.gethostname()}").write_text(name, encoding="utf-8")
    return str(work.parent)


def _check_network(steps: Steps, network: Network, failed: set[str], gpu: Gpu | None) -> set[str]:
    """Start the groups and measure them; a step that depends on one that failed is not made."""
    skip = _missing(steps)
    for needed, reason in (("device", "a rank has no device"), ("gloo interface", "gloo cannot connect the hosts")):
        if needed in failed:
            skip = skip or reason
    found = steps.take({"process group": network.start_group}, skip)
    skip = skip or _missing(steps) or ("the process group did not start" if found else "")
    host_side = steps.take({"host-side group": network.start_host_group}, skip)
    skip = skip or _missing(steps) or ("the host-side group did not start" if host_side else "")
    rates_within_hosts = partial(network.rates_within_hosts, gpu.nvlink_bytes_s if gpu else None)
    within = steps.take({"within hosts, GB/s": rates_within_hosts}, skip)
    skip = skip or _missing(steps) or ("the measurement within hosts failed" if within else "")
    return found | host_side | within | steps.take({"all ranks, GB/s": network.rates_of_all_ranks}, skip)
