"""Check a launch before training: hosts, versions, data, disks, clocks and network, in about a minute.

Start it with the launcher and the options of pretrain.py. It trains nothing; rank 0 prints a table of all checks. The
exit code of all ranks is 0, or 1 if a check has failed.

deepspeed tools/preflight.py --ds_config ds_configs/zero2.json [--config examples/NAME.yaml] [--set KEY=VALUE ...]
"""

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bipe.config import RunConfig, Sources, engine_config, load_run_config, read_ds_config, validate_run
from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime.child_processes import watch_launcher
from megatron_bipe.runtime.exit_handling import log_to_stderr, run_rank, write_stderr
from megatron_bipe.runtime.launcher_env import Launch

if TYPE_CHECKING:
    from megatron_bipe.parallel import Mesh
    from megatron_bipe.runtime.preflight_facts import Bounded

# Options of pretrain.py that change nothing here.
_IGNORED = ("--dry-run", "--gpu", "--network", "--gpus-per-node", "--stop-step", "--stop-at", "--profile")


def main(args: argparse.Namespace, launch: Launch) -> None:
    """Check the launch, and end this process with the exit code."""
    os._exit(preflight(args, launch))  # a normal exit would wait for threads that wait for other ranks


def preflight(args: argparse.Namespace, launch: Launch) -> int:
    """Check the launch, and return the exit code, the same on all ranks."""
    log_to_stderr(launch.rank)

    from megatron_bipe.runtime.preflight import Plan, run_preflight
    from megatron_bipe.runtime.preflight_checks import Report

    watch_launcher()
    mesh, device_problem = _join(launch)

    @functools.cache
    def load() -> tuple[RunConfig, dict[str, Any]]:
        from megatron_bipe.train.run_folder import resolve_precision

        run = load_run_config(args.config, args.set)
        validate_run(run, launch.num_ranks, Sources(args.config, args.set))
        run, _ = resolve_precision(run, mesh.device, args.allow)
        return run, engine_config(run, read_ds_config(args.ds_config), launch.num_ranks, args.ds_config)

    def conclude(report: Report) -> None:
        sys.stdout.write(str(report))
        sys.stdout.flush()
        if args.json:
            try:
                args.json.write_text(report.as_json(), encoding="utf-8")
            except OSError as error:
                write_stderr(f"{args.json} could not be written: {error}")

    plan = Plan(load, _checkpoint_space, device_problem, args.timeout_s, int(args.write_mib * 2**20))
    return run_preflight(mesh, plan, conclude)


def _join(launch: Launch) -> "tuple[Mesh, str]":
    """Return this rank, and why it has no device, which is reported like other problems of single ranks."""
    import torch

    from megatron_bipe.parallel import Mesh
    from megatron_bipe.runtime.distributed_init import join_launch

    try:
        return join_launch(launch), ""
    except ConfigError as error:
        cpu = torch.device("cpu")
        return Mesh(launch.rank, launch.local_rank, launch.num_ranks, launch.num_local_ranks, cpu), str(error)


def _checkpoint_space(run: RunConfig) -> "tuple[int, Bounded]":
    """Return the bytes of a checkpoint, and the free bytes with those that the next one needs."""
    from megatron_bipe.checkpoint.disk_space import plan_disk
    from megatron_bipe.model import count_parameters
    from megatron_bipe.runtime.preflight_facts import Bounded

    plan = plan_disk(run, sum(count_parameters(run.model)))
    return plan.checkpoint_bytes, Bounded(plan.free_bytes, plan.next_bytes)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line (None: of this process); the deepspeed launcher adds `--local_rank`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", type=Path, required=True, help="DeepSpeed configuration, see ds_configs/")
    parser.add_argument("--config", type=Path, help="run configuration, see examples/ (default: 151M BiPE-RoPE)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one field")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument(
        "--timeout-s", type=float, default=60.0, help="longest wait for other ranks in each step (default: %(default)g)"
    )
    parser.add_argument(
        "--write-mib", type=float, default=256.0, help="size of the file that each host writes (default: %(default)g)"
    )
    parser.add_argument("--allow", nargs="+", default=[], help=argparse.SUPPRESS)
    for option in (*_IGNORED, "--local_rank"):
        parser.add_argument(option, nargs="?", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_rank(main, parse_args())
