"""Provenance of a launch, which its `start` event records: code, versions, hosts, devices, settings and data.

Nothing here ends a run: a fact that cannot be found is null. The size is bounded, whatever the number of ranks.
"""

import os
import shlex
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil

import megatron_bipe
from megatron_bipe.config import RunConfig, zero_stage
from megatron_bipe.data.manifest import DataRecord
from megatron_bipe.parallel import Mesh
from megatron_bipe.run_files import METRICS, TIME, read_last_lines
from megatron_bipe.runtime.child_processes import run_command
from megatron_bipe.runtime.environment import batch_job
from megatron_bipe.runtime.hardware import Choices, device_name
from megatron_bipe.runtime.host_collectives import HostCollectives
from megatron_bipe.runtime.host_facts import relevant_environment, versions

T = TypeVar("T")

SECRETS = ("alerts.webhook",)  # settings whose values are not repeated outside config.yaml
HIDDEN = "(hidden)"
_GIT_TIMEOUT_S = 5.0
_MAX_HOSTS = 64  # listed by name; more are counted
_MAX_TEXT = 4000  # characters of the command line


class Given(NamedTuple):
    """What a launch was given besides its configuration."""

    ds_file: Path
    ds_settings: Mapping[str, Any]
    """Content of the DeepSpeed file, as written."""
    choices: Choices
    allow: Sequence[str]
    stop_step: int
    """Step at which the launch ends; the schedule ends at `train.steps`."""
    profile_steps: int


def describe_start(
    run: RunConfig, mesh: Mesh, host: HostCollectives, given: Given, record: DataRecord
) -> dict[str, Any]:
    """Return the provenance of this launch; all ranks call it together, and only the main rank gets it.

    Args:
        run: the run configuration, its precision resolved.
        mesh: this rank, with the parallel layout.
        host: collectives, through which the ranks name their hosts and devices.
        given: what the launch was given besides.
        record: record of the training data.
    """
    ranks = host.all_gather_object([socket.gethostname(), device_name(mesh.device)])
    if not mesh.is_main:
        return {}
    axes = {"tensor": mesh.tensor, "context": mesh.context, "pipeline": mesh.pipeline, "data": mesh.data_ranks}
    return {
        "launched_at": _or_none(lambda: psutil.Process().create_time()),
        "before": _or_none(lambda: last_line(run.run_dir / METRICS)),
        "command": hide_secrets(shlex.join([Path(sys.executable).name, *sys.argv]))[:_MAX_TEXT],
        "code": _or_none(git_state),
        "versions": _or_none(versions),
        "environment": relevant_environment(os.environ),
        "job": batch_job(),
        **count_hosts([name for name, _ in ranks]),
        "devices": dict(Counter(device for _, device in ranks)),
        "device_type": mesh.device.type,
        "layout": axes | {"sequence": mesh.sequence},
        "zero": zero_stage(dict(given.ds_settings)),
        "deepspeed": {"file": str(given.ds_file), "settings": given.ds_settings},
        "precision": given.choices.precision._asdict(),
        "compile": given.choices.compiles._asdict(),
        "data": record.fingerprint,
        "tokenizer": record.tokenizer.fingerprint,
        "segments": record.rule.spec,
        "allow": list(given.allow),
        "settings": own_settings(run),
    }


def own_settings(run: RunConfig) -> dict[str, Any]:
    """Return the fields that differ from their defaults, by dotted name."""
    found = flat_settings(run.model_dump(mode="json", exclude_defaults=True))
    return {key: HIDDEN if key in SECRETS else value for key, value in found.items()}


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name; a mapping of other things than fields, such as a blend, is a value."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value and all(name.isidentifier() for name in value):
            result |= flat_settings(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def hide_secrets(command: str) -> str:
    """Return a command line without the values of `SECRETS`, also where `--set` gives their section."""
    names = [key.rpartition(".")[2] for key in SECRETS]
    return shlex.join(
        f"{word.split('=', 1)[0]}={HIDDEN}" if "=" in word and any(name in word for name in names) else word
        for word in shlex.split(command)
    )


def git_state(folder: Path = Path(megatron_bipe.__file__).parent) -> dict[str, Any] | None:
    """Return the commit of a source folder, and whether tracked files differ from it; None if git does not track it.

    An installed package may lie inside an unrelated checkout, so the files of the folder must be tracked.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), "--no-optional-locks", *arguments]
        pipe = subprocess.PIPE
        return run_command(command, check=True, timeout_s=_GIT_TIMEOUT_S, stdout=pipe, stderr=pipe).stdout.strip()

    def state() -> dict[str, Any]:
        git("ls-files", "--error-unmatch", "__init__.py")
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}

    return _or_none(state)


def count_hosts(names: Sequence[str]) -> dict[str, Any]:
    """Return the number of ranks by host; beyond `_MAX_HOSTS`, the number of further hosts."""
    counts = Counter(names)
    listed = dict(list(counts.items())[:_MAX_HOSTS])
    more = len(counts) - len(listed)
    return {"hosts": listed} | ({"more_hosts": more} if more else {})


def last_line(path: Path) -> dict[str, Any] | None:
    """Return step and time of the last complete line of metrics.jsonl, before a resume truncates it; None: no line."""
    lines = read_last_lines(path, {"step"})
    return {"step": lines[-1]["step"], TIME: lines[-1].get(TIME)} if lines else None


def _or_none(find: Callable[[], T]) -> T | None:
    """Return a fact, or None if it cannot be found: a run does not end because of its provenance."""
    try:
        return find()
    except Exception:
        return None
