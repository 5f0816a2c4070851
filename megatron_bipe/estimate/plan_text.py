"""The text of a plan: layouts, the command of the best one, duration, cost, checkpoints, data and learning rate."""

import shlex
from typing import Any

from megatron_bipe.checkpoint.find import branch_step, num_own_steps
from megatron_bipe.config import RunConfig, accumulation_steps
from megatron_bipe.estimate.dry_run import describe_data
from megatron_bipe.estimate.goodput import HOUR_S
from megatron_bipe.estimate.layouts import GIB, Cluster, Layout, Search, chosen_settings
from megatron_bipe.estimate.run_plan import RunPlan
from megatron_bipe.text_table import text_table
from megatron_bipe.train.schedule import learning_rate

_PLOT_COLUMNS, _PLOT_ROWS = 60, 8


def describe_plan(plan: RunPlan, command: str, num_rows: int) -> str:
    """Return the text of a plan.

    Args:
        plan: the plan.
        command: the command that starts the best layout.
        num_rows: number of layouts in the table.
    """
    run, cluster = plan.request.run, plan.request.cluster
    parts = [
        "# Cluster\n" + _cluster(cluster),
        "# Layouts\n" + layout_table(plan.search, cluster, num_rows),
        *(
            ["# Layouts that are not usable\n" + _unusable(plan.search, cluster)]
            if _unusable(plan.search, cluster)
            else []
        ),
        "# Best layout\n" + command,
        "# Length\n" + _length(plan),
        "# Checkpoints\n" + _checkpoints(plan),
        "# Data\n" + describe_data(run),
        "# Learning rate\n" + schedule_plot(run),
    ]
    return "\n".join(parts)


def best_command(plan: RunPlan, config: list[str], check: list[str]) -> str:
    """Return the command that trains with the best layout, and the options that check it without GPUs.

    Args:
        plan: the plan.
        config: options that name the configuration: `--config` and `--set`.
        check: options of `--dry-run` for the cluster.
    """
    best, own = plan.best, chosen_settings(plan.request.run)
    changed = {key: value for key, value in chosen_settings(best.run).items() if value != own[key]}
    settings = [word for key, value in changed.items() for word in ("--set", f"{key}={str(value).lower()}")]
    words = ["deepspeed", "pretrain.py", "--ds_config", f"ds_configs/zero{best.zero}.json", *config, *settings]
    faster = "ZeRO 0 is faster, but sums gradients in bf16\n" if plan.search.fitting[0].zero < best.zero else ""
    return f"{faster}{shlex.join(words)}\nTo check it without GPUs, add: {shlex.join(check)}\n"


def layout_table(search: Search, cluster: Cluster, num_rows: int) -> str:
    """Return the fastest layouts as a table."""
    head = ("tensor", "context", "pipeline", "data", "sequence", "ZeRO", "recompute", "micro-batch", "accumulated")
    rows = [_row(layout, cluster) for layout in search.fitting[:num_rows]]
    table = text_table([(*head, "GiB", "ms", "bubble", "exchange", "tokens/s", "MFU"), *rows], left=[4, 6])
    return (
        f"{search.num_layouts:,} layouts, {len(search.fitting):,} of them usable; the fastest, each with its best "
        f"micro-batch and recomputation:\n{table}\n"
    )


def _row(layout: Layout, cluster: Cluster) -> tuple[str, ...]:
    parallel, step = layout.run.parallel, layout.step
    data_ranks = parallel.data_ranks(cluster.num_gpus)
    exchange_s = step.micro_batch_communication_s + step.update_communication_s
    sizes = (parallel.tensor, parallel.context, parallel.pipeline, data_ranks)
    return (
        *map(str, sizes),
        "yes" if parallel.sequence else "no",
        str(layout.zero),
        parallel.recompute,
        str(layout.run.train.micro_batch),
        f"{accumulation_steps(layout.run.train, data_ranks)}",
        f"{layout.memory_bytes / GIB:.1f}",
        f"{1000 * step.total_s:.1f}",
        f"{step.bubble_s / step.total_s:.1%}",
        f"{exchange_s / step.total_s:.1%}",
        f"{step.tokens_per_second:,.0f}",
        f"{step.mfu:.1%}",
    )


def _cluster(cluster: Cluster) -> str:
    gpu, mfu = cluster.gpu, cluster.mfu
    compute = "predicted" if mfu is None else f"scaled to {mfu:.1%} MFU on one GPU"
    return (
        f"{cluster.num_gpus:,} x {gpu.name}, {cluster.num_nodes:,} node{'s' * (cluster.num_nodes != 1)} of "
        f"{gpu.gpus_per_machine}; "
        f"{gpu.link_bytes_s / 1e9:g} GB/s in a node, {gpu.network_bytes_s * 8 / 1e9:g} Gbit/s per GPU between nodes\n"
        f"memory: {cluster.usable_bytes / GIB:.1f} of {gpu.memory_gib:.1f} GiB are planned with, a margin of "
        f"{cluster.margin:.0%}\ntime of computation: {compute}; nothing was measured here\n"
    )


def _unusable(search: Search, cluster: Cluster) -> str:
    counts = [(count, f"invalid: {rule}") for rule, count in search.invalid.most_common()]
    if search.too_large:
        least, most = (layout.memory_bytes / GIB for layout in (search.too_large[0], search.too_large[-1]))
        between = f"{least:.1f} GiB" if least == most else f"{least:.1f} to {most:.1f} GiB"
        text = f"does not fit with any micro-batch and recomputation: {between} of {cluster.usable_bytes / GIB:.1f}"
        counts.insert(0, (len(search.too_large), text))
    return "".join(f"{count:6,}  {text}\n" for count, text in counts)


def _length(plan: RunPlan) -> str:
    run, begin = plan.request.run, branch_step(plan.request.run)
    tokens_per_step = run.train.global_batch * run.train.seq_len_tokens
    per_parameter = run.train.steps * tokens_per_step / plan.num_parameters
    branch = (
        f"a branch: steps {begin + 1:,} to {run.train.steps:,}, after {run.train.branch_from}; tokens per parameter "
        "count all steps\n"
    )
    return branch * bool(begin) + (
        f"{num_own_steps(run):,} steps x {tokens_per_step:,} tokens = {plan.tokens:,} tokens, "
        f"{per_parameter:,.1f} for each of {plan.num_parameters:,} parameters, {plan.flops:.3g} FLOPs\n"
        f"{plan.step_hours:,.1f} hours of steps; {plan.hours:,.1f} hours with checkpoints, failures and restarts, "
        f"without validation = {plan.gpu_hours:,.0f} GPU-hours{_price(plan)}\n"
    )


def _price(plan: RunPlan) -> str:
    price = plan.request.price_per_gpu_hour
    return "" if price is None else f" x {price:g} = {plan.gpu_hours * price:,.0f}"


def _checkpoints(plan: RunPlan) -> str:
    found, facts, train = plan.checkpoints, plan.request.assumptions, plan.request.run.train
    every = f"{train.save_every:,} steps" if train.save_every else "the end only"
    return (
        f"{found.num_bytes / 1e9:,.1f} GB each, written in {found.write_s:,.1f} s; training stalls for "
        f"{found.stall_s:,.1f} s\n"
        f"a failure every {found.mtbf_s / HOUR_S:,.1f} hours, {found.failures:.2g} in the run; it takes "
        f"{facts.detect_s:g} s to detect it and {facts.restart_s:g} s to restart\n"
        f"best interval (Young, Daly): {found.interval_s:,.0f} s of steps, --set train.save_every={found.save_every}, "
        f"for a goodput of {found.goodput:.2%}; with train.save_every={every}: {found.configured_goodput:.2%}\n"
        "assumed: failures of nodes, time to detect and to restart, stall, rate of writing "
        f"({facts.node_mtbf_hours:,.0f} hours per node, {facts.write_gb_s:g} GB/s)\n"
    )


def schedule_plot(run: RunConfig) -> str:
    """Return the learning rate over the steps as a plot of characters."""
    steps = run.train.steps
    columns = min(_PLOT_COLUMNS, steps)
    at = [round(column * (steps - 1) / max(1, columns - 1)) for column in range(columns)]
    rates = [learning_rate(run.optimizer, steps, step) for step in at]
    heights = [round(rate / run.optimizer.lr * (_PLOT_ROWS - 1)) for rate in rates]
    lines = ["".join("*" if height == row else " " for height in heights) for row in reversed(range(_PLOT_ROWS))]
    labels = [f"{run.optimizer.lr:.1e}", *[""] * (_PLOT_ROWS - 2), "0"]
    plot = "".join(f"{label:>8} |{line.rstrip()}\n" for label, line in zip(labels, lines, strict=True))
    last = f"step {steps:,}"
    return f"{plot}{'':8} +{'-' * columns}\n{'':10}0{last:>{max(len(last) + 1, columns - 1)}}\n"


def describe_budget(plan: RunPlan, hours: float, larger: RunPlan | None) -> str:
    """Return what a budget of hours allows.

    Args:
        plan: the plan.
        hours: the budget.
        larger: the plan on the fewest GPUs that do all steps in this time; None: none is known.
    """
    run, steps = plan.request.run, plan.steps_in(hours)
    tokens_per_step, begin, own = (
        run.train.global_batch * run.train.seq_len_tokens,
        branch_step(run),
        num_own_steps(run),
    )
    share = f"{steps:,} of {own:,} steps" if steps < own else f"all {own:,} steps"
    fits = f"{hours:g} hours: {share}"
    if steps >= own:
        return f"{fits} ({plan.hours:,.1f} hours); up to {steps:,} steps would fit\n"
    tokens, last = steps * tokens_per_step, begin + steps
    per_parameter = last * tokens_per_step / plan.num_parameters
    fewer = f"--set train.steps={last}, {tokens:,} tokens, {per_parameter:,.1f} per parameter"
    if larger is None:
        return f"{fits} ({fewer}); no multiple of these GPUs up to 64 times does all of them in this time\n"
    gpus, needed = larger.request.cluster.num_gpus, f"{larger.hours:,.1f} hours, {larger.gpu_hours:,.0f} GPU-hours"
    return f"{fits} ({fewer}); all of them need {gpus:,} GPUs ({needed})\n"


def plan_values(plan: RunPlan) -> dict[str, Any]:
    """Return the figures of a plan for JSON."""
    cluster = plan.request.cluster
    return {
        "gpus": cluster.num_gpus,
        "gpu": cluster.gpu.name,
        "gpus_per_node": cluster.gpu.gpus_per_machine,
        "network_bytes_s": cluster.gpu.network_bytes_s,
        "memory_limit_bytes": cluster.usable_bytes,
        "best": _layout_values(plan.best, cluster),
        "layouts": [_layout_values(layout, cluster) for layout in plan.search.fitting],
        "too_large": [
            {**chosen_settings(layout.run), "zero": layout.zero, "memory_bytes": layout.memory_bytes}
            for layout in plan.search.too_large
        ],
        "invalid": dict(plan.search.invalid.most_common()),
        "parameters": plan.num_parameters,
        "tokens": plan.tokens,
        "flops": plan.flops,
        "step_hours": plan.step_hours,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "price": None if plan.request.price_per_gpu_hour is None else plan.gpu_hours * plan.request.price_per_gpu_hour,
        "checkpoints": plan.checkpoints._asdict(),
        "assumptions": plan.request.assumptions._asdict(),
    }


def _layout_values(layout: Layout, cluster: Cluster) -> dict[str, Any]:
    return {
        **chosen_settings(layout.run),
        "data": layout.run.parallel.data_ranks(cluster.num_gpus),
        "zero": layout.zero,
        "memory_bytes": layout.memory_bytes,
        "step_s": layout.step.total_s,
        "step": layout.step._asdict(),
    }
