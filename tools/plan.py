"""Plan a run on a number of GPUs before it starts: layouts, time, cost, checkpoints, data; no GPU is needed.

All parallel layouts and ZeRO stages are tried. Those that are valid and fit in memory are sorted by the predicted time
of a step. Times and memory are those of `pretrain.py --dry-run`; nothing is measured.

Examples:
    python tools/plan.py --config examples/bipe_rope_1.6b.yaml --gpus 64 --gpu h100
    python tools/plan.py --config examples/bipe_rope_1.6b.yaml --gpus 64 --gpu h100 --budget-hours 12
    python tools/plan.py --compare runs/bipe_rope_1.6b --gpu h100
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _cli import check_output_file, command
from megatron_bipe.config import Sources, load_run_config, read_ds_config, validate_run, zero_stage
from megatron_bipe.errors import ConfigError
from megatron_bipe.io import write_atomically
from megatron_bipe.runtime.gpus import Gpu, named_gpu, with_network

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
ZERO_STAGES = (0, 1, 2, 3)
MAY_BE_0 = ("detect_s", "restart_s", "margin")  # other numbers must be more than 0
BELOW_1 = ("margin", "mfu")


@command
def main(argv: Sequence[str] | None) -> None:
    given = _parser().parse_args(argv)
    _check(given)
    if given.json is not None:
        check_output_file(given.json, overwrite=given.overwrite)
    gpu = with_network(named_gpu(given.gpu, "--gpu"), given.network, given.gpus_per_node)
    assert gpu is not None
    text, values = _compared(given, gpu) if given.compare else _planned(given, gpu)
    sys.stdout.write(text)
    if given.json is not None:
        write_atomically(given.json, json.dumps(values, indent=2).encode() + b"\n")


def _planned(given: argparse.Namespace, gpu: Gpu) -> tuple[str, dict[str, Any]]:
    """Return the plan as text and as values for JSON."""
    nodes, rest = divmod(given.gpus, gpu.gpus_per_machine)
    if nodes and rest:
        raise ConfigError(
            f"--gpus {given.gpus} is not a multiple of the {gpu.gpus_per_machine} GPUs of a node",
            remedy=f"Use {nodes * gpu.gpus_per_machine} or {(nodes + 1) * gpu.gpus_per_machine}, or --gpus-per-node",
            location="--gpus",
        )
    run = load_run_config(given.config, given.set)

    import torch

    from megatron_bipe.estimate.goodput import Assumptions
    from megatron_bipe.estimate.layouts import Cluster, given_settings, with_settings
    from megatron_bipe.estimate.plan_text import best_command, describe_budget, describe_plan, plan_values
    from megatron_bipe.estimate.run_plan import Request, gpus_for_budget, plan_run
    from megatron_bipe.train.run_folder import resolve_precision

    validate_run(with_settings(run, {"micro_batch": 1}), 1, Sources(given.config, given.set))
    run, _ = resolve_precision(run, torch.device("cpu"), planned_gpu=gpu)
    ds_values = {zero: read_ds_config(DS_CONFIGS / f"zero{zero}.json") for zero in ZERO_STAGES}
    assumed = {name: value for name in Assumptions._fields if (value := getattr(given, name)) is not None}
    cluster = Cluster(given.gpus, gpu, given.margin, given.mfu)
    fixed = given_settings(given.set)
    plan = plan_run(Request(run, cluster, ds_values, fixed, Assumptions(**assumed), given.price_per_gpu_hour))
    text = describe_plan(plan, best_command(plan, _config_options(given), _check_options(given)), given.top)
    values = plan_values(plan)
    if given.budget_hours is not None:
        larger = gpus_for_budget(plan, given.budget_hours)
        text += f"\n# Budget\n{describe_budget(plan, given.budget_hours, larger)}"
        values["budget"] = {
            "hours": given.budget_hours,
            "steps": plan.steps_in(given.budget_hours),
            "gpus_for_all_steps": larger and larger.request.cluster.num_gpus,
        }
    return text, values


def _compared(given: argparse.Namespace, gpu: Gpu) -> tuple[str, dict[str, Any]]:
    """Return what was planned for a run and what it measured, as text and as values for JSON."""
    from megatron_bipe.estimate.goodput import Assumptions
    from megatron_bipe.monitor.history import read_history
    from megatron_bipe.monitor.plan_comparison import (
        compare_with_plan,
        comparison_text,
        num_ranks_of,
        saved_zero_stage,
    )

    history = read_history(given.compare)
    num_ranks, ds_values = num_ranks_of(history), history.ds_settings
    if given.ds_config is not None:
        ds_values = read_ds_config(given.ds_config)
    elif ds_values is None:  # a run of an earlier version
        zero = saved_zero_stage(history)
        if zero is None:
            raise ConfigError(
                "the run records neither its DeepSpeed settings nor a checkpoint, which would record its ZeRO stage",
                remedy="Give its DeepSpeed file with --ds_config",
                location=given.compare,
            )
        ds_values = read_ds_config(DS_CONFIGS / f"zero{zero}.json")
    write_gb_s = given.write_gb_s or Assumptions().write_gb_s
    rows = compare_with_plan(history, ds_values, gpu, write_gb_s * 1e9)
    head = (
        f"{given.compare}: {history.num_steps:,} steps, {num_ranks} ranks, ZeRO {zero_stage(ds_values)}; "
        f"planned for {gpu.name}, checkpoints at {write_gb_s:g} GB/s\n"
    )
    return head + comparison_text(rows), {row.figure: row._asdict() | {"ratio": row.ratio} for row in rows}


def _config_options(given: argparse.Namespace) -> list[str]:
    config = ["--config", str(given.config)] if given.config else []
    return [*config, *(word for item in given.set for word in ("--set", item))]


def _check_options(given: argparse.Namespace) -> list[str]:
    words = ["--dry-run", str(given.gpus), "--gpu", given.gpu]
    for option, value in (("--network", given.network), ("--gpus-per-node", given.gpus_per_node)):
        words += [option, str(value)] if value is not None else []
    return words


def _check(given: argparse.Namespace) -> None:
    for name, value in vars(given).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            least_is_0, below_1 = name in MAY_BE_0, name in BELOW_1
            if not (value > 0 or (least_is_0 and value == 0)) or not math.isfinite(value) or (below_1 and value >= 1):
                option = f"--{name.replace('_', '-')}"
                least = "0 or more" if least_is_0 else "more than 0"
                raise ConfigError(
                    f"{option} is {value:g}", remedy=f"Give {least}{' and less than 1' * below_1}", location=option
                )
    for option, is_missing in (("--gpus", given.gpus is None), ("--gpu", given.gpu is None)):
        if is_missing and not (given.compare and option == "--gpus"):
            raise ConfigError(f"{option} is not given", remedy="Add it; --help has examples", location=option)
    if given.compare and (given.config or given.set or given.gpus):
        raise ConfigError(
            "--compare takes the configuration and the number of GPUs from the run",
            remedy="Remove --config, --set and --gpus",
            location="--compare",
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, help="run configuration, see examples/ (default: 151M BiPE-RoPE)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one field; those of parallel, and train.micro_batch, are then not varied",
    )
    add("--gpus", type=int, metavar="N", help="number of GPUs")
    add("--gpu", metavar="NAME", help="kind of GPU, such as h100")
    add("--gpus-per-node", type=int, metavar="N", help="GPUs of a machine (default: 8)")
    add("--network", type=int, metavar="GBIT", help="Gbit/s of a GPU to other machines (default: 400)")
    add("--budget-hours", type=float, metavar="H", help="say what fits in this time")
    add("--price-per-gpu-hour", type=float, metavar="P", help="price of a GPU for an hour, in any currency")
    add("--mfu", type=float, metavar="M", help="utilization measured on one GPU, such as 0.45 (default: predicted)")
    add("--margin", type=float, default=0.1, help="part of the memory that must stay free (default: %(default)s)")
    add("--top", type=int, default=10, metavar="N", help="layouts to show (default: %(default)s)")
    add("--node-mtbf-hours", type=float, metavar="H", help="mean time between failures of a node (default: 5696)")
    add("--detect-s", type=float, metavar="S", help="from a failure to the end of the launch (default: 60)")
    add("--restart-s", type=float, metavar="S", help="from there to the first step (default: 120)")
    add("--stall-s", type=float, metavar="S", help="stall per checkpoint written in the background (default: 1)")
    add("--write-gb-s", type=float, metavar="R", help="GB/s at which checkpoints are written (default: 5)")
    add("--compare", type=Path, metavar="RUN_DIR", help="show what is planned for this run, and what it measured")
    add("--ds_config", type=Path, metavar="FILE", help="for --compare: its DeepSpeed file (default: as recorded)")
    add("--json", type=Path, metavar="FILE", help="also write all figures as JSON")
    add("--overwrite", action="store_true", help="replace FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
