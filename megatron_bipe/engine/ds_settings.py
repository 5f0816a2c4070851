"""Checks a DeepSpeed JSON file key by key: DeepSpeed itself ignores keys that it does not know.

A key is one of these: set by the run (`config/deepspeed.py`), passed on, ignored because another part of this project
does its work, or refused because it would change what the run configuration states. Keys and values of most sections
are checked by DeepSpeed's own models, so that they are those of the installed version.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

from megatron_bipe.config import AUTO, Precision, flatten, nearest, offloads, validation_problems, zero_stage
from megatron_bipe.errors import ConfigError

_MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
}
_SWITCH, _NUMBER, _COUNT, _NAME = (bool,), (int, float), (int,), (str,)
_VALUES: dict[str, tuple[type, ...]] = {  # keys without a model, and the types of their values
    "train_batch_size": _COUNT,
    "train_micro_batch_size_per_gpu": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "gradient_clipping": _NUMBER,
    "communication_data_type": _NAME,
    "prescale_gradients": _SWITCH,
    "gradient_predivide_factor": _NUMBER,
    "disable_allgather": _SWITCH,
    "disable_python_gc": _SWITCH,
    "zero_allow_untested_optimizer": _SWITCH,
    "zero_force_ds_cpu_optimizer": _SWITCH,
    "data_types.grad_accum_dtype": _NAME,
    "flops_profiler.enabled": _SWITCH,
    "flops_profiler.recompute_fwd_factor": _NUMBER,
    "flops_profiler.profile_step": _COUNT,
    "flops_profiler.module_depth": _COUNT,
    "flops_profiler.top_modules": _COUNT,
    "flops_profiler.detailed": _SWITCH,
    "flops_profiler.output_file": (str, type(None)),
    "steps_per_print": _NUMBER,
    "wall_clock_breakdown": _SWITCH,
    "memory_breakdown": _SWITCH,
    "dump_state": _SWITCH,
    "dataloader_drop_last": _SWITCH,
}
_DATA_TYPES = ("fp16", "bf16", "fp32")
_KINDS: dict[tuple[type, ...], str] = {_SWITCH: "true or false", _NUMBER: "a number", _COUNT: "an integer"}
_QUIET = "DeepSpeed's log is off; pretrain.py --profile shows times and memory"
_IGNORED = {  # accepted, because files for other trainers have them; reported unless off
    "steps_per_print": "train.log_every of the run sets the interval of progress lines",
    "wall_clock_breakdown": _QUIET,
    "memory_breakdown": _QUIET,
    "dump_state": _QUIET,
    "dataloader_drop_last": "the order of samples is that of the run",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "tools/export_hf.py writes the weights",
    "zero_optimization.load_from_fp32_weights": "checkpoints always hold fp32 weights",
    "zero_optimization.elastic_checkpoint": "checkpoints do not depend on the layout",
    "zero_optimization.allgather_bucket_size": "DeepSpeed gathers each parameter group in one collective",
    "zero_optimization.allgather_partitions": "DeepSpeed always gathers the updated weights",
}
_PRECISION, _OURS = "train.precision of the run sets it", "no part of this project uses it"
_REFUSED = {
    "optimizer": "",  # reported by config/deepspeed.py
    "scheduler": "",
    "bfloat16": "its present name is bf16",
    "amp": _PRECISION,
    "torch_autocast": _PRECISION,
    "data_types.param_dtype": _PRECISION,
    "data_types.buffer_dtype": _PRECISION,
    "data_types.keep_in_fp32_modules": _PRECISION,
    "bf16.bf16_master_weights_and_grads": "weights and gradients are accumulated in fp32",
    "bf16.bf16_optimizer_states": "the optimizer state is kept in fp32",
    "gradient_allreduce_op": "gradients are averaged over ranks",
    "managed_gradient_accumulation": "train.global_batch and train.micro_batch of the run set the accumulation",
    "sparse_gradients": "all gradients are dense",
    "activation_checkpointing": "parallel.recompute of the run chooses what is recomputed",
    "pipeline": "parallel.pipeline of the run sets the stages",
    "tensor_parallel": "parallel.tensor of the run sets it",
    "sequence_parallel_size": "parallel.context of the run sets it",
    "seq_parallel_communication_data_type": "parallel.context of the run shards sequences without it",
    "expert_parallel": "the model has no experts",
    "use_data_before_expert_parallelism": "the model has no experts",
    "checkpoint": "the section checkpoint of the run sets it",
    "nebula": "the section checkpoint of the run sets it",
    "datastates_ckpt": "the section checkpoint of the run sets it",
    "aio": "it is for states on NVMe, from which checkpoints cannot be read",
    "elasticity": "a run resumes on any number of ranks, with the batch size of train.global_batch",
    "autotuning": "--dry-run estimates layouts instead",
    "vocabulary_size": "model.vocab_size of the run sets it",
    "log_level": _QUIET,
    "timers": "the progress line of the run shows the throughput",
    "compile": _OURS,
    "compression_training": _OURS,
    "curriculum_learning": _OURS,
    "data_efficiency": _OURS,
    "eigenvalue": _OURS,
    "graph_harvesting": _OURS,
    "hybrid_engine": _OURS,
    "progressive_layer_drop": _OURS,
    "quantize_training": _OURS,
    "sparse_attention": _OURS,
    "weight_quantization": _OURS,
}
_ALWAYS_ON = {  # detection of bad steps needs both
    "bf16.check_grad_overflow": "a step with a gradient that is not finite must not change the weights",
    "zero_optimization.compute_grad_norm": "clipping and the detection of bad steps need the norm",
}


def check_settings(ds_values: dict[str, Any], location: str | Path) -> None:
    """Check all keys and values of a DeepSpeed JSON file; `config.engine_config` then compares them with the run.

    Raises:
        ConfigError: lists every unknown key with the nearest known one, and every key that is not used.
    """
    problems = [*_unknown_keys(ds_values), *_refused_keys(ds_values)]
    for section, model in _MODELS.items():
        if isinstance(values := ds_values.get(section), dict):
            problems += _model_problems(section, model, values)
    problems += _wrong_values(ds_values)
    problems += _useless_offload(ds_values)
    problems += _refused_rescaling(ds_values)
    if problems:
        remedy = "Correct or remove these keys; ds_configs/ has complete files"
        raise ConfigError("; ".join(problems), remedy=remedy, location=location)


def ignored_settings(ds_values: dict[str, Any], precision: Precision) -> list[str]:
    """Return a reason for each setting that has no effect in this precision; those that are off are not listed."""
    found = flatten(ds_values)
    lines = [f"{key}: {reason}" for key, reason in _IGNORED.items() if found.get(key) not in (None, False, AUTO)]
    if zero_stage(ds_values) != 3:
        keys = [key for key in found if key.startswith("zero_optimization.stage3_") and key not in _IGNORED]
        lines += [f"{key}: it is for ZeRO 3" for key in keys]
    sums_here = precision == "bf16" and not offloads(ds_values)[0]  # `engine.gradients` averages the gradients
    if zero_stage(ds_values) == 1 and (sums_here or found.get("zero_optimization.reduce_scatter") is not False):
        lines += [f"{key}: ZeRO averages gradients without it" for key in _rescaled(found)]
    if len(found.keys() & {f"fp16.{name}" for name in DeepSpeedFP16Config.model_fields}) > 1:
        lines.append("fp16: the run computes in bf16 or fp32, without a loss scale")
    return lines


def _rescaled(found: dict[str, Any]) -> list[str]:
    """Return the keys, among flat settings, that change how gradients are divided before and after their sum."""
    defaults = {"prescale_gradients": False, "gradient_predivide_factor": 1.0}
    return [key for key, value in defaults.items() if found.get(key, value) not in (value, None, AUTO)]


def _unknown_keys(ds_values: dict[str, Any]) -> Iterator[str]:
    known = {*_VALUES, *_REFUSED, *_MODELS, *_IGNORED}
    known |= {key.partition(".")[0] for key in known}
    nested = {f"{section}.{name}" for section, model in _MODELS.items() for name in model.model_fields}
    without_model = {key.partition(".")[0] for key in known if "." in key} - _MODELS.keys()
    keys = [*ds_values]
    for section in without_model:
        values = ds_values.get(section)
        keys += [f"{section}.{name}" for name in values] if isinstance(values, dict) else []
    for key in keys:
        if key not in known:
            yield f"unknown key {key!r}, did you mean {nearest(key, sorted(known | nested))!r}?"


def _refused_keys(ds_values: dict[str, Any]) -> Iterator[str]:
    found = ds_values | flatten(ds_values)
    for key, reason in _REFUSED.items():
        if reason and not _is_off(found.get(key)):
            yield f"{key} is not used: {reason}"
    for key, reason in _ALWAYS_ON.items():
        if found.get(key) is False:
            yield f"{key}=false: {reason}"


def _model_problems(section: str, model: type[BaseModel], values: dict[str, Any]) -> list[str]:
    replaced = {
        name: extra.get("new_param")
        for name, field in model.model_fields.items()
        if isinstance(extra := field.json_schema_extra, dict) and extra.get("deprecated") and name in values
    }
    try:
        model(**{key: value for key, value in values.items() if key not in replaced})
    except ValidationError as error:
        problems = validation_problems(error, model, section)
    except (AssertionError, TypeError, ValueError) as error:  # of DeepSpeed's own rules
        problems = [f"{section}: {error}"]
    else:
        problems = []
    return [f"{section}.{name} is deprecated; use {section}.{new}" for name, new in replaced.items()] + problems


def _wrong_values(ds_values: dict[str, Any]) -> Iterator[str]:
    sections = {key.partition(".")[0] for key in _VALUES if "." in key} | _MODELS.keys()
    for section in sorted(sections & ds_values.keys()):
        if not isinstance(ds_values[section], dict):
            yield f"{section}={json.dumps(ds_values[section])}: a section must be a JSON object"
    found = flatten(ds_values)
    for key, types in _VALUES.items():
        value = found.get(key)
        fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if key in found and value not in (None, AUTO) and not fits:
            yield f"{key}={json.dumps(value)} must be {_KINDS.get(types, 'a string')}"
    data_type, divisor = (found.get(key) for key in ("communication_data_type", "gradient_predivide_factor"))
    if isinstance(data_type, str) and data_type.lower() not in (*_DATA_TYPES, AUTO):
        yield f"communication_data_type={json.dumps(data_type)} must be one of {', '.join(_DATA_TYPES)}"
    if isinstance(divisor, int | float) and not isinstance(divisor, bool) and divisor <= 0:
        yield f"gradient_predivide_factor={divisor} must be greater than 0"


def _useless_offload(ds_values: dict[str, Any]) -> Iterator[str]:
    stage, found = _stage(ds_values), flatten(ds_values)
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = found.get(f"zero_optimization.{name}.device")
        if isinstance(stage, int) and stage < lowest and device not in (None, "none"):
            yield f"zero_optimization.{name} has no effect with stage {stage}; it needs stage {lowest} or more"


def _refused_rescaling(ds_values: dict[str, Any]) -> Iterator[str]:
    """Yield settings at which DeepSpeed's ZeRO 2 and 3 would fail with an assertion."""
    found = flatten(ds_values)
    if _stage(ds_values) in (2, 3) and found.get("zero_optimization.reduce_scatter") is not False:
        for key in _rescaled(found):
            yield f"{key}={json.dumps(found[key])} needs zero_optimization.reduce_scatter=false, or ZeRO 0 or 1"


def _stage(ds_values: dict[str, Any]) -> Any:
    """Return the ZeRO stage of a file whose sections have not been checked."""
    return zero_stage(ds_values) if isinstance(ds_values.get("zero_optimization"), dict) else 0


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled") is False or all(map(_is_off, value.values()))
    return not value
