"""Model under evaluation, with the recorded facts about its training data: loading, and checks against a dataset.

Users name a model by an exported folder, or by a run folder as `RUN_DIR[@STEP]`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from megatron_bipe.checkpoint.find import Checkpoint, find_model
from megatron_bipe.checkpoint.verify import CheckpointWeights, read_run, read_weights
from megatron_bipe.config import ModelConfig
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.data.tokenizer import DEFINITIONS, load_tokenizer
from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.hf.load import build_from_llama, load_exported
from megatron_bipe.hf.weight_mapping import to_llama
from megatron_bipe.runtime.hardware import weights_dtype

_log = logging.getLogger(__name__)


class EvalModel(NamedTuple):
    """A model under evaluation."""

    name: str
    source: str
    """Path that the model was loaded from, for messages."""
    model: nn.Sequential
    """(tokens, intra, inter) int64 [B, T] -> logits [B, T, V]."""
    config: ModelConfig
    tokenizer_fingerprint: str | None
    """Fingerprint of the training data's tokenizer; None: not recorded."""
    rule: SegmentRule | None
    """Segment rule of the training data; None: not recorded."""
    special_in_text: bool | None = None
    """See `data.manifest.Manifest.special_in_text`."""


def load_eval_model(spec: str) -> EvalModel:
    """Load the model that `spec` names: an exported folder or `RUN_DIR[@STEP]`.

    Raises:
        CheckpointError: there is no such model, or it is incomplete or damaged.
    """
    checkpoint = find_model(spec)
    if checkpoint is None:
        return load_exported_model(Path(spec))
    return _load_checkpoint(checkpoint, read_weights(checkpoint), spec)


def load_eval_models(
    specs: Sequence[str], datasets: Sequence[TokenDataset], lengths_tokens: Sequence[int]
) -> list[EvalModel]:
    """Load models, each as `load_eval_model`, and check that they can be evaluated on the datasets at the lengths.

    Raises:
        BipeError: as in `load_eval_model`, `check_compatible`, `TokenDataset.check_special_in_text` and `check_length`.
    """
    eval_models = [load_eval_model(spec) for spec in specs]
    for eval_model in eval_models:
        for dataset in datasets:
            check_compatible(eval_model, dataset)
            dataset.check_special_in_text(eval_model.special_in_text, eval_model.source)
        check_length(eval_model, max(lengths_tokens))
    return eval_models


def load_with_master_weights(spec: str) -> tuple[EvalModel, Mapping[str, Tensor]]:
    """Load the model that `spec` names, and its weights; for a run the optimizer's fp32 master weights.

    Raises:
        CheckpointError: as for `load_eval_model`.
    """
    checkpoint = find_model(spec)
    if checkpoint is None:
        eval_model = load_exported_model(Path(spec))
        return eval_model, named_weights(eval_model)
    weights = CheckpointWeights(checkpoint, torch.float32)
    return _load_checkpoint(checkpoint, weights, spec), weights


def named_weights(eval_model: EvalModel) -> dict[str, Tensor]:
    """Return the model's weights by the training model's names; a tied output is named once."""
    return {name: weight.detach() for name, weight in eval_model.model.named_parameters()}


def _load_checkpoint(checkpoint: Checkpoint, weights: Mapping[str, Tensor], spec: str) -> EvalModel:
    run, record = read_run(checkpoint)
    config, dtype = run.model, weights_dtype(run.train.precision)
    rounded = {name: weight.to(dtype) for name, weight in weights.items()}
    model = build_from_llama(to_llama(rounded, config), config, checkpoint.folder)
    run_name = checkpoint.run_dir.resolve().name
    name = f"{run_name} step {checkpoint.step:,}" if checkpoint.run_dir != Path(spec) else run_name
    source = f"{checkpoint.run_dir}@{checkpoint.step}"
    return EvalModel(name, source, model, config, record.tokenizer.fingerprint, record.rule, record.special_in_text)


def load_exported_model(folder: Path) -> EvalModel:
    """Load an exported folder, or a stock LLaMA with its tokenizer, for evaluation.

    Raises:
        CheckpointError: from `load_exported`, or for an invalid segment rule.
    """
    loaded = load_exported(folder)
    known = loaded.data or {}
    try:
        rule = SegmentRule(spec=known["segments_spec"], token_ids=known["token_ids"]) if known else None
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise CheckpointError(
            f"the segment rule is invalid: {reason}",
            remedy='Fix "segments" in config.json, or export the checkpoint again',
            location=folder,
        ) from error
    return EvalModel(
        folder.resolve().name,
        str(folder),
        loaded.model,
        loaded.config,
        known.get("tokenizer_fingerprint") if loaded.data else _fingerprint_of(folder),
        rule,
        known.get("special_in_text"),
    )


def _fingerprint_of(folder: Path) -> str | None:
    """Return the fingerprint of the tokenizer in the folder, with which datasets are made; None without one."""
    if not any((folder / name).is_file() for name in DEFINITIONS):
        return None
    return load_tokenizer(folder).fingerprint


def check_compatible(eval_model: EvalModel, dataset: TokenDataset) -> None:
    """Refuse a dataset whose token ids or segments differ in meaning from the model's training data.

    Models without a segment encoding accept any segment rule. If a model does not record a fact, a warning is logged.

    Raises:
        DataError: another tokenizer or another segment rule; the message names both.
        CheckpointError: the model's token embedding is smaller than the dataset's vocabulary.
    """
    made_with = dataset.manifest.tokenizer.fingerprint  # or with an export's files, which are others with the same ids
    if eval_model.tokenizer_fingerprint is None:
        _log.warning("%s does not record its tokenizer: using the dataset's unchecked", eval_model.source)
    elif made_with != eval_model.tokenizer_fingerprint and made_with != _fingerprint_of(Path(eval_model.source)):
        dataset.check_tokenizer(eval_model.tokenizer_fingerprint, eval_model.source)
    vocab_size = dataset.manifest.tokenizer.vocab_size
    if vocab_size > eval_model.config.vocab_size:
        raise CheckpointError(
            f"the model has {eval_model.config.vocab_size} token ids, but the dataset {dataset.path} has {vocab_size}",
            remedy="Evaluate on a dataset made with the model's tokenizer",
            location=eval_model.source,
        )
    if not eval_model.config.bilevel:
        return
    if eval_model.rule is None:
        _log.warning("%s does not record its segment rule: using the dataset's unchecked", eval_model.source)
    else:
        dataset.check_rule(eval_model.rule, eval_model.source)


def check_length(eval_model: EvalModel, length_tokens: int) -> None:
    """Raise ConfigError if sequences of this length exceed what the model's encoding supports."""
    longest = eval_model.config.max_seq_len_tokens
    if longest is not None and length_tokens > longest:
        raise ConfigError(
            f"a sequence of {length_tokens} tokens exceeds the {longest} that the model's encoding, "
            f"{eval_model.config.encoding}, supports",
            remedy=f"Use --lengths of at most {longest}, or remove the model",
            location=eval_model.source,
        )
