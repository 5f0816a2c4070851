"""Search of all parallel layouts of a run on a number of GPUs: which are valid, fit in memory, and how fast they are.

A layout divides the GPUs into tensor x context x pipeline x data ranks, with or without sequence parallelism, and has a
ZeRO stage. For each one the fastest micro-batch and recomputation that fit are chosen. Rules are those of
`validate_run` and `engine_config`; memory and time are those of `--dry-run`.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from megatron_bipe.config import ParallelConfig, RunConfig, engine_config, load_run_config, validate_run
from megatron_bipe.errors import ConfigError
from megatron_bipe.estimate.memory import stage_memories
from megatron_bipe.estimate.step_time import StepTime, costs_of, measured_slowdown, predict_step, unpredictable
from megatron_bipe.runtime.gpus import Gpu
from megatron_bipe.runtime.hardware import choose_compile

GIB = 2**30
RECOMPUTE: tuple[str, ...] = get_args(ParallelConfig.model_fields["recompute"].annotation)
_CHOSEN = ("tensor", "context", "pipeline", "sequence", "recompute")  # fields of `parallel` that a search chooses


class Cluster(NamedTuple):
    """The GPUs that a run is planned for."""

    num_gpus: int
    gpu: Gpu
    margin: float = 0.1
    """Fraction of a GPU's memory that must stay free, since the needed memory is estimated."""
    mfu: float | None = None
    """Model FLOPs utilization measured on one GPU; None: computation takes the predicted time."""

    @property
    def num_nodes(self) -> int:
        return math.ceil(self.num_gpus / self.gpu.gpus_per_machine)

    @property
    def usable_bytes(self) -> float:
        """Memory of a GPU that a layout may need."""
        return self.gpu.memory_gib * GIB * (1 - self.margin)


class Layout(NamedTuple):
    """A layout that fits, with its best micro-batch and recomputation."""

    run: RunConfig
    zero: int
    memory_bytes: float
    """Memory of the rank that needs most."""
    step: StepTime

    @property
    def order(self) -> tuple[float, ...]:
        """Sort key: time; of equal times, the layout with the simpler settings and with less memory is first."""
        parallel = self.run.parallel
        ranks = parallel.tensor * parallel.context * parallel.pipeline
        return self.step.total_s, ranks, self.zero, RECOMPUTE.index(parallel.recompute), self.memory_bytes


class TooLarge(NamedTuple):
    """A layout that does not fit, with the micro-batch and the recomputation that need least memory."""

    run: RunConfig
    zero: int
    memory_bytes: float


class Search(NamedTuple):
    """Result of a search."""

    fitting: list[Layout]
    """The fastest first."""
    too_large: list[TooLarge]
    """The one that needs least memory first."""
    invalid: Counter[str]
    """Number of layouts by the rule that they break."""

    @property
    def num_layouts(self) -> int:
        return len(self.fitting) + len(self.too_large) + self.invalid.total()


def search_layouts(
    run: RunConfig, cluster: Cluster, ds_values: Mapping[int, dict[str, Any]], fixed: Mapping[str, Any]
) -> Search:
    """Search all layouts of a run, whose own layout, micro-batch and recomputation do not matter.

    Args:
        run: the run configuration, its precision resolved.
        cluster: the GPUs.
        ds_values: content of the DeepSpeed JSON file by ZeRO stage.
        fixed: values that all layouts must have, see `given_settings`.

    Raises:
        ConfigError: the DeepSpeed settings disagree with the run, or the time of its steps cannot be predicted.
    """
    _check_run(run, cluster, ds_values)
    slowdown = 1.0 if cluster.mfu is None else measured_slowdown(run, cluster.gpu, cluster.mfu)
    search = Search([], [], Counter())
    for layout_run, ds_config in _valid_layouts(run, cluster.num_gpus, ds_values, fixed, search.invalid):
        found = _best_setting(layout_run, ds_config, cluster, _settings(layout_run, cluster, fixed), slowdown)
        if isinstance(found, Layout):
            search.fitting.append(found)
        else:
            search.too_large.append(found)
    search.fitting.sort(key=lambda layout: layout.order)
    search.too_large.sort(key=lambda layout: layout.memory_bytes)
    return search


def has_valid_layout(
    run: RunConfig, num_gpus: int, ds_values: Mapping[int, dict[str, Any]], fixed: Mapping[str, Any]
) -> bool:
    """Return True if any layout is valid; arguments as in `search_layouts`."""
    return any(True for _ in _valid_layouts(run, num_gpus, ds_values, fixed, Counter()))


def with_settings(run: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Return the run with these fields of `parallel`, others at their defaults, and with `micro_batch`, if given."""
    chosen = {name: settings[name] for name in _CHOSEN if name in settings}
    parallel = ParallelConfig().model_copy(update={"timeout_s": run.parallel.timeout_s, **chosen})
    train = run.train.model_copy(update={"micro_batch": settings.get("micro_batch", run.train.micro_batch)})
    return run.model_copy(update={"parallel": parallel, "train": train})


def given_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Return those settings that a search chooses and that `--set` options give: they are not changed."""
    given = load_run_config(None, overrides)
    fixed = {name: getattr(given.parallel, name) for name in _CHOSEN if name in given.parallel.model_fields_set}
    if "micro_batch" in given.train.model_fields_set:
        fixed["micro_batch"] = given.train.micro_batch
    return fixed


def chosen_settings(run: RunConfig) -> dict[str, Any]:
    """Return the settings of a run that a search chooses, by their keys."""
    chosen = {f"parallel.{name}": getattr(run.parallel, name) for name in _CHOSEN}
    return {**chosen, "train.micro_batch": run.train.micro_batch}


def rule_of(error: ConfigError) -> str:
    """Return the first rule that a layout breaks, without the layout's own numbers."""
    first = re.split(r"[;,] ", error.message)[0]
    first = re.sub(r"train\.micro_batch=\d+ x \d+ ", "train.micro_batch x ", first)
    first = re.sub(r"(parallel\.\w+|zero_optimization\.stage)=\w+", r"\1", first)
    return re.sub(r" = \d+$", "", first)


def _check_run(run: RunConfig, cluster: Cluster, ds_values: Mapping[int, dict[str, Any]]) -> None:
    """Raise errors that do not depend on the layout."""
    for zero, values in ds_values.items():
        engine_config(with_settings(run, {"micro_batch": 1}), values, 1, f"ds_configs/zero{zero}.json")
    setting = unpredictable(run, {})
    if setting and run.train.precision != "bf16":
        raise ConfigError(
            f"the time of a step is not predicted {setting}",
            remedy="--set train.precision=bf16",
            location="train.precision",
        )
    if setting and cluster.mfu is None:
        raise ConfigError(
            f"the time of a step is not predicted {setting}",
            remedy="Give a utilization that was measured on one GPU",
            location="--mfu",
        )


def _valid_layouts(
    run: RunConfig,
    num_gpus: int,
    ds_values: Mapping[int, dict[str, Any]],
    fixed: Mapping[str, Any],
    invalid: Counter[str],
) -> Iterator[tuple[RunConfig, dict[str, Any]]]:
    """Yield the run and the DeepSpeed settings of each valid layout; count the others by the rule that they break."""
    for axes in _divisions(num_gpus):
        if any(fixed.get(name, value) != value for name, value in axes.items()):
            continue
        tried = with_settings(run, {"recompute": "none", "micro_batch": 1, **fixed, **axes})
        for zero, values in ds_values.items():
            try:
                validate_run(tried, num_gpus)
                ds_config = engine_config(tried, values, num_gpus, "")
                choose_compile(tried, zero, on_gpu=True)
            except ConfigError as error:
                invalid[rule_of(error)] += 1
            else:
                yield tried, ds_config


def _divisions(num_gpus: int) -> Iterator[dict[str, Any]]:
    """Yield all divisions of the GPUs into tensor x context x pipeline x data ranks."""
    divisors = [size for size in range(1, num_gpus + 1) if num_gpus % size == 0]
    for tensor, context, pipeline in itertools.product(divisors, repeat=3):
        if num_gpus % (tensor * context * pipeline) == 0:
            for sequence in (False, True) if tensor > 1 else (False,):
                yield {"tensor": tensor, "context": context, "pipeline": pipeline, "sequence": sequence}


def _settings(run: RunConfig, cluster: Cluster, fixed: Mapping[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """Yield each recomputation with the micro-batches to try: powers of two that divide a replica's sequences."""
    sequences = run.train.global_batch // run.parallel.data_ranks(cluster.num_gpus)
    sizes = [2**power for power in range(sequences.bit_length()) if sequences % 2**power == 0]
    for recompute in RECOMPUTE:
        if fixed.get("recompute", recompute) == recompute:
            yield recompute, [fixed["micro_batch"]] if "micro_batch" in fixed else sizes


def _best_setting(
    run: RunConfig,
    ds_config: dict[str, Any],
    cluster: Cluster,
    settings: Iterator[tuple[str, list[int]]],
    slowdown: float,
) -> Layout | TooLarge:
    """Return the fastest setting of a layout that fits, or else the one that needs least memory."""
    zero = ds_config.get("zero_optimization", {}).get("stage", 0)
    fitting: list[Layout] = []
    too_large: list[TooLarge] = []
    for recompute, sizes in settings:
        parallel = run.parallel.model_copy(update={"recompute": recompute})
        for micro_batch in reversed(sizes):
            train = run.train.model_copy(update={"micro_batch": micro_batch})
            tried = run.model_copy(update={"parallel": parallel, "train": train})
            stages = stage_memories(tried, ds_config, cluster.num_gpus, on_gpu=True)
            needed = max(stage.device for stage in stages)
            if needed > cluster.usable_bytes:
                too_large.append(TooLarge(tried, zero, needed))
                continue
            costs = costs_of(tried, ds_config)._replace(slowdown=slowdown)
            step = predict_step(tried, ds_config, cluster.num_gpus, cluster.gpu, costs)
            fitting.append(Layout(tried, zero, needed, step))
            if run.parallel.pipeline == 1:  # a smaller micro-batch only adds work for each of them
                break
        if any(layout.run.train.micro_batch == sizes[-1] for layout in fitting):  # more recomputation only adds work
            break
    if fitting:
        return min(fitting, key=lambda layout: layout.order)
    return min(too_large, key=lambda layout: layout.memory_bytes)
