"""Combines the run configuration and a DeepSpeed JSON file into the dictionary that starts the engine.

The JSON file holds engine settings only. Values that belong to the run are "auto" or absent there; a literal that
disagrees with the run is an error that names both, because silently preferring one would hide the other.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_bipe.config.schema import AUTO, RunConfig
from megatron_bipe.config.validate import accumulation_steps
from megatron_bipe.errors import ConfigError

_OWNED_SECTIONS = ("optimizer", "scheduler")
_OFFLOAD = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
_SECTIONS = (
    "zero_optimization",
    "bf16",
    "fp16",
    "data_types",
    "timers",
    "timers.throughput",
    *_OFFLOAD,
)  # that are read here
_QUIET = 2**31  # the training loop prints its own progress


def read_ds_config(path: Path) -> dict[str, Any]:
    """Return the content of the DeepSpeed JSON file as written.

    Raises:
        ConfigError: the file is missing, is not a JSON object, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise ConfigError(
            "there is no such DeepSpeed configuration", remedy="Choose one of ds_configs/", location=path
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the file is not valid JSON: {error}", remedy="Correct it; ds_configs/ has valid ones", location=path
        ) from None
    if not isinstance(values, dict):
        raise ConfigError("a DeepSpeed configuration must be a JSON object", location=path)
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; of two equal keys, JSON parsers keep the last one."""
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"the key {', '.join(map(repr, repeated))} appears twice in one object")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def zero_stage(ds_config: dict[str, Any]) -> Any:
    """Return the ZeRO stage as written; 0, the default of DeepSpeed, if it is absent."""
    return ds_config.get("zero_optimization", {}).get("stage", 0)


def engine_config(run: RunConfig, ds_config: dict[str, Any], num_ranks: int, location: str | Path) -> dict[str, Any]:
    """Fill every "auto" of `ds_config` from the run, whose precision is resolved (see `train.run_folder`).

    Returns:
        A new dictionary without any "auto", for `deepspeed.initialize`.

    Raises:
        ConfigError: lists every literal that disagrees with the run, and every "auto" that no field fills.
    """
    result: dict[str, Any] = json.loads(json.dumps(ds_config))
    if wrong := [key for key in _SECTIONS if not isinstance(_get(result, key, {}), dict)]:
        seen = ", ".join(f"{key}={json.dumps(_get(result, key))}" for key in wrong)
        raise ConfigError(
            f"{seen}: a section must be a JSON object", remedy="Write it as in ds_configs/", location=location
        )
    problems = [
        f"the section {section!r} belongs to the run configuration; remove it and use `optimizer:` there"
        for section in _OWNED_SECTIONS
        if section in result
    ]
    stage = zero_stage(result)
    for key, (owner, value) in _owned(run, num_ranks, stage).items():
        seen = _get(result, key)
        if key != "steps_per_print" and seen not in (None, AUTO) and seen != value:
            problems.append(f'{key}={seen!r}, but {owner} of the run requires {value!r}; write "auto"')
        _set(result, key, value)
    problems += [
        f'{key}="auto", which no field of the run replaces; write a value, or remove it' for key in _autos(result)
    ]
    if run.parallel.pipeline > 1 and stage in (2, 3):
        problems.append(
            f"parallel.pipeline={run.parallel.pipeline} with zero_optimization.stage={stage}: the pipeline engine "
            "cannot shard gradients; use ds_configs/zero1.json, or parallel.pipeline=1"
        )
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        problems.append(f"zero_optimization.stage={stage!r} is not one of 0, 1, 2, 3")
    if stage == 2 and run.parallel.replica_ranks(num_ranks) == 1:
        # There is no communication to overlap, and DeepSpeed would wait for the device in every micro-batch.
        _set(result, "zero_optimization.overlap_comm", False)
    for key in _OFFLOAD:
        if _get(result, f"{key}.device") == "nvme":
            problems.append(f'{key}.device="nvme": checkpoints cannot be read from NVMe; use "cpu"')
    if problems:
        raise ConfigError("; ".join(problems), location=location)
    return result


def _owned(run: RunConfig, num_ranks: int, stage: int) -> dict[str, tuple[str, Any]]:
    """Map each DeepSpeed key that the run owns to (the setting that determines it, its value)."""
    train = run.train
    assert train.precision != AUTO, "resolved by resolve_precision"
    # Gradients are accumulated in fp32 over micro-batches; DeepSpeed supports this from ZeRO 1 on.
    accumulation_dtype = "bf16" if train.precision == "bf16" and stage == 0 else "fp32"
    by_precision, by_stage = (
        f"train.precision={train.precision}",
        f"train.precision={train.precision} with ZeRO {stage}",
    )
    accumulation = accumulation_steps(train, run.parallel.data_ranks(num_ranks))
    bf16_zero_1: dict[str, tuple[str, Any]] = {
        # Otherwise the fp32 sums are rounded to bf16 for the exchange at every update, even on a single rank.
        "communication_data_type": (by_stage, "fp32"),
        # Add each gradient to its fp32 sum at once, so that no bf16 copy is kept until the end of backward.
        "bf16.immediate_grad_update": (by_stage, True),
    }
    return (bf16_zero_1 if train.precision == "bf16" and stage == 1 else {}) | {
        # DeepSpeed counts context-parallel ranks as data-parallel, so each sequence counts once for each of them.
        "train_batch_size": ("train.global_batch x parallel.context", train.global_batch * run.parallel.context),
        "train_micro_batch_size_per_gpu": ("train.micro_batch", train.micro_batch),
        "gradient_accumulation_steps": ("train.global_batch / (train.micro_batch x data-parallel ranks)", accumulation),
        "gradient_clipping": ("optimizer.grad_clip", run.optimizer.grad_clip),
        "bf16.enabled": (by_precision, train.precision == "bf16"),
        "data_types.grad_accum_dtype": (by_stage, accumulation_dtype),
        "fp16.enabled": (by_precision, False),
        # DeepSpeed's timer waits for the device twice in every micro-batch.
        "timers.throughput.enabled": ("the progress log", False),
        "steps_per_print": ("the progress log", _QUIET),  # any value is accepted: the loop has its own interval
    }


def offloads(ds_config: dict[str, Any]) -> tuple[bool, bool]:
    """Return whether the optimizer state and the weights are offloaded to host memory, in this order."""
    optimizer, weights = (_get(ds_config, f"{key}.device") == "cpu" for key in _OFFLOAD)
    return optimizer, weights


def _get(values: dict[str, Any], dotted: str, absent: Any = None) -> Any:
    for part in dotted.split("."):
        if not isinstance(values, dict) or part not in values:
            return absent
        values = values[part]
    return values


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, leaf = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[leaf] = value


def _autos(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _autos(value, f"{prefix}{key}.")
        elif value == AUTO:
            yield prefix + key
