"""Train a language model with DeepSpeed, or continue a run.

deepspeed pretrain.py --ds_config ds_configs/zero2.json [--config examples/NAME.yaml] [--set KEY=VALUE ...]
"""

import argparse
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_bipe.config import (
    ALLOWABLE,
    Sources,
    engine_config,
    load_run_config,
    read_ds_config,
    validate_run,
    zero_stage,
)
from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime.child_processes import watch_launcher
from megatron_bipe.runtime.distributed_init import find_gloo_interface, join_launch
from megatron_bipe.runtime.environment import has_gpu_driver, prepare_cuda
from megatron_bipe.runtime.exit_handling import log_to_stderr, run_rank
from megatron_bipe.runtime.launcher_env import Launch
from megatron_bipe.runtime.preemption import EXIT_RESUMABLE, StopRequest, parse_duration

_log = logging.getLogger("pretrain")


def main(args: argparse.Namespace, launch: Launch) -> None:
    """Train the configured run, or describe it with `--dry-run`; exit with `EXIT_RESUMABLE` if it was preempted.

    The configuration is checked before torch and DeepSpeed are imported, so that its errors appear at once.
    """
    stop_request = StopRequest(parse_duration(args.stop_at, "--stop-at") if args.stop_at else math.inf)
    log_to_stderr(launch.rank)
    _check_counts(args)
    run = load_run_config(args.config, args.set)
    num_ranks = args.dry_run or launch.num_ranks
    validate_run(run, num_ranks, Sources(args.config, args.set))
    ds_values = read_ds_config(args.ds_config)
    if has_gpu_driver():
        prepare_cuda(run)

    from megatron_bipe.engine.ds_settings import check_settings, ignored_settings
    from megatron_bipe.estimate.dry_run import describe
    from megatron_bipe.runtime.gpus import named_gpu, with_network
    from megatron_bipe.runtime.hardware import Choices, choose_compile, own_gpu
    from megatron_bipe.train.alerts import webhook_of
    from megatron_bipe.train.launch import train_run
    from megatron_bipe.train.provenance import Given
    from megatron_bipe.train.run_folder import end_summary, resolve_precision, start_summary
    from megatron_bipe.train.start_check import check_start, start_warnings
    from megatron_bipe.train.trackers import check_trackers

    watch_launcher()
    mesh = join_launch(launch, run).with_layout(run.parallel)
    find_gloo_interface(mesh)  # raises an error if other hosts cannot reach it
    planned_gpu = named_gpu(args.gpu, "--gpu") if args.gpu else None
    run, precision = resolve_precision(run, mesh.device, args.allow, planned_gpu)
    check_settings(ds_values, args.ds_config)
    ds_config = engine_config(run, ds_values, num_ranks, args.ds_config)
    on_gpu = planned_gpu is not None or mesh.device.type == "cuda"
    choices = Choices(precision, choose_compile(run, zero_stage(ds_config), on_gpu=on_gpu))
    if mesh.is_main:
        check_trackers(run)
        webhook_of(run)  # raises an error if it is not one
        ignored = ignored_settings(ds_values, run.train.precision)
        _log_warnings(f"without effect in {args.ds_config}: {setting}" for setting in ignored)
    if args.dry_run is not None:
        if mesh.is_main:
            gpu = with_network(planned_gpu or own_gpu(mesh.device), args.network, args.gpus_per_node)
            sys.stdout.write(describe(run, ds_config, num_ranks, choices, gpu))
            check_start(run, mesh._replace(num_ranks=num_ranks), args.allow)
            _log_warnings(start_warnings(run))
        return
    if mesh.is_main:
        _log_lines(start_summary(run, ds_config, mesh, choices))
    stop_step = min(run.train.steps, args.stop_step or run.train.steps)
    given = Given(args.ds_config, ds_values, choices, args.allow, stop_step, args.profile)
    if not train_run(run, mesh, ds_config, given, stop_request):
        sys.exit(EXIT_RESUMABLE)
    if mesh.is_main:
        _log_lines(end_summary(run, stop_step))


def _log_lines(text: str) -> None:
    for line in text.splitlines():
        _log.info(line)


def _log_warnings(texts: Iterable[str]) -> None:
    for text in texts:
        _log.warning(text)


def _check_counts(args: argparse.Namespace) -> None:
    plans = (("--network", args.network), ("--gpus-per-node", args.gpus_per_node))
    for option, value in (("--stop-step", args.stop_step), ("--dry-run", args.dry_run or None), *plans):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}", remedy="Give an integer of 1 or more", location=option)
    for option, value in (("--gpu", args.gpu), *plans):
        if value is not None and args.dry_run is None:
            raise ConfigError(
                f"{option} {value} plans a run and does not choose a device; it needs --dry-run",
                remedy="Add --dry-run [RANKS], or remove it",
                location=option,
            )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line (None: of this process); the deepspeed launcher adds `--local_rank`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", type=Path, required=True, help="DeepSpeed configuration, see ds_configs/")
    parser.add_argument("--config", type=Path, help="run configuration, see examples/ (default: 151M BiPE-RoPE)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one field")
    parser.add_argument(
        "--dry-run", nargs="?", type=int, const=0, metavar="RANKS", help="describe and check the run, and exit"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="plan --dry-run for this GPU, e.g. H100 (default: this machine's)"
    )
    parser.add_argument("--network", type=int, metavar="GBIT", help="Gbit/s of a GPU to other machines (default: 400)")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs of a machine for --dry-run (default: 8)")
    parser.add_argument("--allow", nargs="+", default=[], metavar="NAME", help=f"allow changes: {', '.join(ALLOWABLE)}")
    parser.add_argument("--stop-step", type=int, help="save and exit after this step; the schedule is unchanged")
    parser.add_argument("--stop-at", metavar="TIME", help="save and exit after this time (23h50m), with exit code 75")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="profile this many updates")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_rank(main, parse_args())
