"""Rules that involve several fields; all are checked before any process group starts."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_bipe.config.load import Sources
from megatron_bipe.config.model_schema import ModelConfig, RopeScaling
from megatron_bipe.config.schema import (
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_bipe.errors import ConfigError

_DEFAULTS = Sources()  # if the caller gives none


def validate_run(run: RunConfig, num_ranks: int, sources: Sources = _DEFAULTS) -> None:
    """Check a run configuration for a launch of `num_ranks` ranks.

    Args:
        run: the run configuration.
        num_ranks: ranks of the launch.
        sources: sources of its values, for the message.

    Raises:
        ConfigError: lists every violated rule with the observed values.
    """
    problems = [
        *_model(run.model),
        *_encoding(run.model, run.train.seq_len_tokens),
        *_data(run.data),
        *_valid_lengths(run),
        *_optimizer(run.optimizer, run.train),
        *_begin(run.train),
        *_layout(run, num_ranks),
        *_batches(run.train, max(1, run.parallel.data_ranks(num_ranks))),
    ]
    if problems:
        message = "; ".join(problems)
        raise ConfigError(message, location=sources.location(message))


def accumulation_steps(train: TrainConfig, data_ranks: int) -> int:
    """Return the micro-batches per optimizer step of each model replica."""
    return train.global_batch // (train.micro_batch * data_ranks)


def check_data(
    run: RunConfig,
    *,
    vocab_size: int,
    segments: str,
    fixed_length: int | None,
    examples_len_tokens: int | None = None,
    location: str,
) -> None:
    """Check a run against a dataset that it names.

    Args:
        run: the run configuration.
        vocab_size: number of ids of the dataset's tokenizer.
        segments: specification of the dataset's segment rule.
        fixed_length: tokens per segment if the rule fixes it.
        examples_len_tokens: sequence length that examples were made for; None: the dataset is text.
        location: the dataset folder, for the message.

    Raises:
        ConfigError: lists every mismatch.
    """
    problems = []
    model = run.model
    if vocab_size > model.vocab_size:
        problems.append(
            f"model.vocab_size={model.vocab_size} is smaller than the {vocab_size} ids of the dataset's tokenizer; "
            f"set model.vocab_size={vocab_size} or more"
        )
    if run.data.segments is not None and run.data.segments != segments:
        problems.append(
            f"data.segments={run.data.segments!r}, but the dataset was made with {segments!r}; "
            f"rebuild it with tools/preprocess.py --segments {run.data.segments!r}"
        )
    if examples_len_tokens not in (None, run.train.seq_len_tokens):
        problems.append(
            f"train.seq_len_tokens={run.train.seq_len_tokens}, but the examples of the dataset have "
            f"{examples_len_tokens} tokens; set train.seq_len_tokens={examples_len_tokens}, or rebuild it with "
            f"tools/prepare_task.py --length {run.train.seq_len_tokens}"
        )
    longest = fixed_length or min(run.train.seq_len_tokens, model.train_len_tokens)  # clipped beyond, as in the paper
    # Examples usually have longer sequences than pretraining, and a pretrained embedding keeps its size.
    rows = model.embedding_rows if model.bilevel and examples_len_tokens is None else None
    if rows is not None and rows < longest:
        problems.append(
            f"model.intra_size={model.intra_size} is smaller than the longest possible segment of {longest} tokens, "
            f"so all positions from {model.intra_size - 1} on would share one row; set model.intra_size={longest}"
        )
    if problems:
        raise ConfigError("; ".join(problems), location=location)


def _model(model: ModelConfig) -> Iterator[str]:
    if model.hidden_size % model.num_heads:
        yield f"model.hidden_size={model.hidden_size} is not a multiple of model.num_heads={model.num_heads}"
    elif model.relative.rotates and model.head_width % 2:
        yield (
            f"model.hidden_size / model.num_heads = {model.head_width} is odd, and model.encoding={model.encoding} "
            "rotates pairs of channels; choose an even head width"
        )
    if model.num_heads % model.kv_heads:
        yield f"model.num_heads={model.num_heads} is not a multiple of model.num_kv_heads={model.kv_heads}"
    if model.tied_output and model.zero_last_row:
        yield "model.tied_output=True trains the last row that model.zero_last_row=True keeps at zero; make one false"
    if model.log_scale and model.train_len_tokens < 2:
        yield f"model.log_scale divides by ln(model.train_len_tokens={model.train_len_tokens}), which must be 2 or more"


def _encoding(model: ModelConfig, seq_len_tokens: int) -> Iterator[str]:
    name, scaling = f"model.encoding={model.encoding}", model.rope_scaling
    if not model.bilevel and model.intra_encoding != "learned":
        yield f"model.intra_encoding={model.intra_encoding} has no meaning for {name}; remove it, or choose a bipe_ one"
    if model.parts.positions != "drawn" and model.position_range is not None:
        yield f"model.position_range has no meaning for {name}; set it to null"
    if model.parts.absolute == "sinusoidal" and model.hidden_size % 2:
        yield f"model.hidden_size={model.hidden_size} is odd, and sinusoidal needs pairs; choose an even one"
    longest = model.max_seq_len_tokens
    if longest is not None and seq_len_tokens > longest:
        key = "position_range" if model.parts.positions == "drawn" else "train_len_tokens"
        grows = longest == model.num_positions
        remedy = f"set model.{key}={seq_len_tokens} or more" if grows else "use shorter sequences"
        yield f"train.seq_len_tokens={seq_len_tokens} exceeds the {longest} that {name} encodes; {remedy}"
    if scaling is not None and not model.relative.rotates:
        yield f"model.rope_scaling has no meaning for {name}; set it to null"
    elif scaling is not None:
        yield from _scaling(model, scaling)


def _scaling(model: ModelConfig, scaling: RopeScaling) -> Iterator[str]:
    name = "model.rope_scaling"
    if scaling.type in ("ntk", "dynamic") and model.head_width == 2:
        yield f"{name}.type={scaling.type} scales all channel pairs but one, and heads of 2 channels have only one"
    for key in scaling.unused():
        yield f"{name}.{key} has no meaning for {name}.type={scaling.type}; remove it"
    if scaling.type != "yarn":
        return
    original = scaling.original_positions or model.train_len_tokens
    if scaling.beta_fast <= scaling.beta_slow:
        yield (
            f"{name}.beta_fast={scaling.beta_fast:g} does not exceed {name}.beta_slow={scaling.beta_slow:g}; "
            "beta_fast is the larger number of rotations"
        )
    if original <= 2 * math.pi * scaling.beta_slow:
        yield (
            f"no channel pair rotates {scaling.beta_slow:g} times in the {original} original positions of {name}, so "
            f"none would be scaled; lower {name}.beta_slow, or use type linear"
        )
    if scaling.original_positions is None and model.parts.positions != "tokens":
        counts, positions = {
            "segments": (
                "counts segments",
                f"the segments per training sequence: model.train_len_tokens={model.train_len_tokens} divided by the "
                "mean segment length, which tools/inspect_data.py stats prints",
            ),
            "drawn": ("draws positions", f"the range that they are drawn from, {model.drawn_range} as configured"),
        }[model.parts.positions]
        yield (
            f"{name}.type=yarn requires {name}.original_positions, because model.encoding={model.encoding} {counts}; "
            f"set it to {positions}"
        )


def _data(data: DataConfig) -> Iterator[str]:
    if data.valid and data.valid_path is not None:
        yield (
            f"data.valid_path={data.valid_path} and data.valid={_shown(data.valid)} both name validation sets; remove "
            "one, or name all sets in data.valid"
        )
    for name, folder in data.valid_sets.items():
        if folder in data.folders:
            key = f"data.valid.{name}" if data.valid else "data.valid_path"
            yield f"{key}={folder} is the training set; name a held-out dataset"
    repeated = [str(folder) for folder, count in Counter(data.folders).items() if count > 1]
    if repeated:
        yield f"data.path lists {', '.join(repeated)} more than once; list a dataset once, with the sum of its weights"


def _shown(sets: Mapping[str, Path]) -> str:
    return "{" + ", ".join(f"{name}: {folder}" for name, folder in sets.items()) + "}"


def _valid_lengths(run: RunConfig) -> Iterator[str]:
    lengths, name = run.train.valid_lengths, f"train.valid_lengths={list(run.train.valid_lengths)}"
    repeated = [str(length) for length, count in Counter(lengths).items() if count > 1]
    if repeated:
        yield f"{name} lists {', '.join(repeated)} more than once; list a length once"
    if 1 in lengths:
        yield f"{name}: a sequence of 1 token has no context to predict from; use lengths of at least 2"
    longest = run.model.max_seq_len_tokens
    beyond = [length for length in lengths if longest is not None and length > longest]
    if beyond:
        yield f"{name} exceeds the {longest} tokens that model.encoding={run.model.encoding} encodes; remove {beyond}"


def _optimizer(optimizer: OptimizerConfig, train: TrainConfig) -> Iterator[str]:
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr={optimizer.min_lr} exceeds optimizer.lr={optimizer.lr}"
    end = optimizer.decay_steps or train.steps
    if optimizer.warmup_steps > end:
        yield (
            f"optimizer.warmup_steps={optimizer.warmup_steps} exceeds the {end} steps of the schedule; "
            "lower it, or raise train.steps or optimizer.decay_steps"
        )

    if optimizer.decay == "inverse_sqrt" and optimizer.warmup_steps == 0:
        yield (
            "optimizer.decay=inverse_sqrt falls from the end of the warm-up on, and optimizer.warmup_steps=0; set "
            "optimizer.warmup_steps to 1 or more"
        )
    start = optimizer.decay_start
    if start is None:
        return
    if optimizer.decay in ("constant", "inverse_sqrt"):
        yield (
            f"optimizer.decay_start={start} has no meaning for optimizer.decay={optimizer.decay}; remove it, or choose "
            "polynomial, cosine or 1-sqrt"
        )
    elif start < optimizer.warmup_steps:
        yield (
            f"optimizer.decay_start={start} is before the end of the warm-up, optimizer.warmup_steps="
            f"{optimizer.warmup_steps}; raise it, or lower optimizer.warmup_steps"
        )
    elif start >= end:
        field = "optimizer.decay_steps" if optimizer.decay_steps else "train.steps"
        yield (
            f"optimizer.decay_start={start} is not before the end of the decay, {field}={end}; lower it, or raise "
            f"{field}"
        )


def _begin(train: TrainConfig) -> Iterator[str]:
    if train.init_from is not None and train.branch_from is not None:
        yield (
            f"train.init_from={train.init_from} and train.branch_from={train.branch_from} exclude each other; keep "
            "init_from for a new run with the weights of a model, or branch_from for one that continues another run"
        )


def _layout(run: RunConfig, num_ranks: int) -> Iterator[str]:
    parallel, model = run.parallel, run.model
    replica_ranks = parallel.tensor * parallel.context * parallel.pipeline
    if num_ranks % replica_ranks:
        yield (
            f"a launch of {num_ranks} ranks does not hold complete replicas of parallel.tensor={parallel.tensor} x "
            f"parallel.context={parallel.context} x parallel.pipeline={parallel.pipeline} = {replica_ranks} ranks; "
            f"start a multiple of {replica_ranks}"
        )
    tensor, context = ("tensor", parallel.tensor), ("context", parallel.context)
    sequence_axes = (tensor,) if parallel.sequence else ()
    sharded_sizes: list[tuple[str, int, tuple[tuple[str, int], ...]]] = [
        ("model.num_heads", model.num_heads, (tensor, context)),
        ("model.ffn_size", model.ffn_size, (tensor,)),
        ("model.vocab_size", model.vocab_size, (tensor,)),
        ("train.seq_len_tokens", run.train.seq_len_tokens, (context, *sequence_axes)),
        *(("train.valid_lengths", length, (context, *sequence_axes)) for length in run.train.valid_lengths),
    ]
    for name, size, axes in sharded_sizes:
        parts = {axis: ranks for axis, ranks in axes if ranks > 1}
        if size % math.prod(parts.values()):
            by = " x ".join(f"parallel.{axis}={ranks}" for axis, ranks in parts.items())
            yield f"{name}={size} is not a multiple of {by}, which shards it"
    yield from _shared_groups(model, parallel)
    if parallel.sequence and parallel.tensor == 1:
        yield (
            "parallel.sequence=True shards sequences over tensor-parallel ranks, but parallel.tensor=1; set "
            "parallel.sequence=false, or parallel.tensor=2 or more"
        )
    if parallel.pipeline > model.num_layers + 1:
        yield (
            f"parallel.pipeline={parallel.pipeline} exceeds {model.num_layers + 1}, one stage for each of the "
            f"model.num_layers={model.num_layers} blocks and one for the head; lower it"
        )


def _shared_groups(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Check the rules for key/value heads, of which ranks may hold replicas."""
    ranks, kv_heads = parallel.tensor * parallel.context, model.kv_heads
    if kv_heads % ranks and ranks % kv_heads:
        yield (
            f"model.num_kv_heads={kv_heads} is neither a multiple nor a divisor of parallel.tensor={parallel.tensor} x "
            f"parallel.context={parallel.context} = {ranks}, which share these heads"
        )
    elif (rows := 2 * kv_heads * model.head_width) % parallel.tensor:
        yield f"the {rows} rows of keys and values are not a multiple of parallel.tensor={parallel.tensor}"


def _batches(train: TrainConfig, data_ranks: int) -> Iterator[str]:
    at_once = train.micro_batch * data_ranks
    if train.global_batch % at_once:
        yield (
            f"train.global_batch={train.global_batch} is not a multiple of train.micro_batch={train.micro_batch} "
            f"x {data_ranks} data-parallel ranks = {at_once}; set train.global_batch to "
            f"{max(at_once, train.global_batch // at_once * at_once)}, or change train.micro_batch"
        )
