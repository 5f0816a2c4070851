"""Plan of a run on a number of GPUs: its best layout, duration, cost, checkpoints, and what a budget allows."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_bipe.checkpoint.find import num_own_steps
from megatron_bipe.config import RunConfig
from megatron_bipe.errors import ConfigError
from megatron_bipe.estimate.goodput import HOUR_S, Assumptions, CheckpointPlan, plan_checkpoints
from megatron_bipe.estimate.layouts import GIB, Cluster, Layout, Search, TooLarge, has_valid_layout, search_layouts
from megatron_bipe.estimate.memory import stage_memories
from megatron_bipe.model import count_parameters, train_flops_per_token
from megatron_bipe.runtime.gpus import GPUS

_MORE_GPUS = (2, 4, 8, 16, 32, 64)  # multiples that are tried if the given number is too small
OFFLOAD = (2, 3)  # ZeRO stages that have a file for CPU offloading


class Request(NamedTuple):
    """What is planned."""

    run: RunConfig
    """Its precision is resolved."""
    cluster: Cluster
    ds_values: Mapping[int, dict[str, Any]]
    """Content of the DeepSpeed JSON file by ZeRO stage."""
    fixed: Mapping[str, Any]
    """Settings that the search does not change, see `given_settings`."""
    assumptions: Assumptions = Assumptions()
    price_per_gpu_hour: float | None = None

    def with_gpus(self, num_gpus: int) -> "Request":
        return self._replace(cluster=self.cluster._replace(num_gpus=num_gpus))


class RunPlan(NamedTuple):
    """A run with its best layout."""

    request: Request
    search: Search
    num_parameters: int
    checkpoints: CheckpointPlan

    @property
    def best(self) -> Layout:
        """The proposed layout: the fastest one that sums gradients in fp32, which ZeRO 0 does not in bf16."""
        return _proposed(self.search)

    @property
    def tokens(self) -> int:
        """Tokens that the run reads; of a branch, those after the step that it begins with."""
        train = self.request.run.train
        return num_own_steps(self.request.run) * train.global_batch * train.seq_len_tokens

    @property
    def flops(self) -> float:
        run = self.request.run
        return train_flops_per_token(run.model, run.train.seq_len_tokens) * self.tokens

    @property
    def step_hours(self) -> float:
        """Time of all steps of the run."""
        return num_own_steps(self.request.run) * self.best.step.total_s / HOUR_S

    @property
    def hours(self) -> float:
        """The same with checkpoints, failures and restarts, but without validation."""
        return self.step_hours / self.checkpoints.goodput

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.request.cluster.num_gpus

    def steps_in(self, hours: float) -> int:
        """Return the number of steps that are done in this time, at the goodput of the full run."""
        return int(hours * HOUR_S * self.checkpoints.goodput / self.best.step.total_s)


def plan_run(request: Request) -> RunPlan:
    """Return the plan of a run.

    Raises:
        ConfigError: the run is not valid, or no layout is valid or fits; the remedy names what would fit.
    """
    search = search_layouts(request.run, request.cluster, request.ds_values, request.fixed)
    if not search.fitting:
        raise _nothing_fits(request, search) if search.too_large else _nothing_valid(request, search)
    num_parameters, step_s = sum(count_parameters(request.run.model)), _proposed(search).step.total_s
    checkpoints = plan_checkpoints(request.run, num_parameters, step_s, request.cluster.num_nodes, request.assumptions)
    return RunPlan(request, search, num_parameters, checkpoints)


def gpus_for_budget(plan: RunPlan, hours: float) -> RunPlan | None:
    """Return the plan on the smallest power-of-two multiple of the GPUs that does all steps in this time, if any."""
    if plan.hours <= hours:
        return plan
    for factor in _MORE_GPUS:
        try:
            larger = plan_run(plan.request.with_gpus(factor * plan.request.cluster.num_gpus))
        except ConfigError:
            continue
        if larger.hours <= hours:
            return larger
    return None


def _proposed(search: Search) -> Layout:
    return next((layout for layout in search.fitting if layout.zero > 0), search.fitting[0])


def layout_text(run: RunConfig, num_gpus: int, zero: int) -> str:
    """Return a layout with its settings in one line."""
    parallel = run.parallel
    sequence = " with sequence parallelism" if parallel.sequence else ""
    return (
        f"{parallel.tensor} tensor{sequence} x {parallel.context} context x {parallel.pipeline} pipeline x "
        f"{parallel.data_ranks(num_gpus)} data ranks, ZeRO {zero}, parallel.recompute={parallel.recompute}, "
        f"train.micro_batch={run.train.micro_batch}"
    )


def _nothing_valid(request: Request, search: Search) -> ConfigError:
    cluster = request.cluster
    rules = "; ".join(rule for rule, _ in search.invalid.most_common(3))
    fewer = next((count for count in range(cluster.num_gpus - 1, 0, -1) if _is_usable(request, count)), None)
    remedy = f"Use {fewer} GPUs" if fewer else "Change what these rules name"
    return ConfigError(
        f"no layout of {cluster.num_gpus} GPUs is valid: {rules or 'the given settings do not divide them'}",
        remedy=remedy + (", or free the settings that --set fixes" if request.fixed else ""),
        location="--gpus",
    )


def _is_usable(request: Request, num_gpus: int) -> bool:
    """Return True if this number of GPUs is one of complete nodes and has a valid layout."""
    per_node = request.cluster.gpu.gpus_per_machine
    is_complete = num_gpus <= per_node or num_gpus % per_node == 0
    return is_complete and has_valid_layout(request.run, num_gpus, request.ds_values, request.fixed)


def _nothing_fits(request: Request, search: Search) -> ConfigError:
    cluster, closest = request.cluster, search.too_large[0]
    needed_gib = closest.memory_bytes / GIB
    ways = [*_other_memory(cluster, closest), *_more_gpus(request), *_offloading(request, search)]
    if request.fixed:
        ways.append("settings that --set does not fix")
    return ConfigError(
        f"none of {search.num_layouts:,} layouts fits: the closest needs {needed_gib:.1f} GiB of "
        f"{cluster.usable_bytes / GIB:.1f} ({cluster.gpu.memory_gib:.1f} of one {cluster.gpu.name}, less a margin of "
        f"{cluster.margin:.0%}): {layout_text(closest.run, cluster.num_gpus, closest.zero)}",
        remedy=f"These would fit: {'; '.join(ways)}" if ways else "Use a smaller model or shorter sequences",
        location="--gpus",
    )


def _other_memory(cluster: Cluster, closest: TooLarge) -> list[str]:
    """Return a smaller margin, if it suffices, and the GPU with the least memory that suffices."""
    own_bytes = cluster.gpu.memory_gib * GIB
    if closest.memory_bytes <= own_bytes:
        return [f"--margin {int(1000 * (1 - closest.memory_bytes / own_bytes)) / 1000:g}"]
    larger = [gpu for gpu in GPUS if closest.memory_bytes <= gpu.memory_gib * GIB * (1 - cluster.margin)]
    return [f'--gpu "{min(larger, key=lambda gpu: gpu.memory_gib).name}"'] if larger else []


def _more_gpus(request: Request) -> list[str]:
    for factor in _MORE_GPUS:
        num_gpus = factor * request.cluster.num_gpus
        cluster = request.cluster._replace(num_gpus=num_gpus)
        if search_layouts(request.run, cluster, request.ds_values, request.fixed).fitting:
            return [f"--gpus {num_gpus}"]
    return []


def _offloading(request: Request, search: Search) -> list[str]:
    """Return the files for CPU offloading with which a layout fits; the time of their steps is not predicted."""
    found = []
    for zero in OFFLOAD:
        layouts = [layout for layout in search.too_large if layout.zero == zero]
        if not layouts:
            continue
        offload: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
        ds_config = {"zero_optimization": request.ds_values[zero]["zero_optimization"] | offload}
        stages = stage_memories(layouts[0].run, ds_config, request.cluster.num_gpus, on_gpu=True)
        if stages[0].device <= request.cluster.usable_bytes:
            text = layout_text(layouts[0].run, request.cluster.num_gpus, zero)
            found.append(f"ds_configs/zero{zero}_offload.json ({text}), whose time is not predicted")
    return found[:1]
