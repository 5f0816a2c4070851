"""Export of models to folders that transformers loads: a run's checkpoint, or a model in the authors' layout."""

import json
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_bipe.checkpoint.find import Checkpoint
from megatron_bipe.checkpoint.verify import CheckpointWeights, read_run
from megatron_bipe.config import ModelConfig, RunConfig, StoredPrecision
from megatron_bipe.data.blend import Blend, open_blend
from megatron_bipe.data.collate import make_batch
from megatron_bipe.data.dataset import check_recorded_tokenizer
from megatron_bipe.data.manifest import TOKENIZER_FOLDER, DataRecord
from megatron_bipe.data.segments import (
    SegmentRule,
    Vocabulary,
    bilevel_ids,
    resolve_rule,
    segment_ends,
    sequence_ends,
)
from megatron_bipe.data.tokenizer import DEFINITIONS, Tokenizer, load_tokenizer
from megatron_bipe.errors import CheckpointError, ConfigError, DataError
from megatron_bipe.eval.eval_model import EvalModel
from megatron_bipe.eval.report import JSON_NAME, STEM
from megatron_bipe.eval.training_facts import recipe, training_facts
from megatron_bipe.hf.authors_checkpoint import PUBLISHED_SEPARATORS, AuthorsModel, read_authors_checkpoint
from megatron_bipe.hf.card import CardFacts, PerplexityPlot
from megatron_bipe.hf.export import ExportOptions, SampleBatch, export_model
from megatron_bipe.hf.hf_config import DataFields
from megatron_bipe.hf.load import build_from_llama, read_settings
from megatron_bipe.hf.tokenizer_files import TokenizerSource
from megatron_bipe.hf.weight_mapping import to_llama
from megatron_bipe.runtime.hardware import DTYPES, weights_dtype

_STORED = DTYPES | {"fp16": torch.float16}  # by --dtype
SEPARATOR_SHARE = 0.08  # about the share in the training data of the published models
_log = logging.getLogger(__name__)


class Published(NamedTuple):
    """A model in the authors' layout, with what is known about its training data."""

    folder: Path
    model: AuthorsModel
    tokenizer: Tokenizer | None
    rule: SegmentRule

    @property
    def fingerprint(self) -> str | None:
        return self.tokenizer.fingerprint if self.tokenizer else None

    def eval_model(self) -> EvalModel:
        """Return the model with its weights loaded."""
        weights, config = self.model.weights, self.model.config
        model = build_from_llama(to_llama(weights, config), config, self.folder)
        return EvalModel(self.folder.name, str(self.folder), model, config, self.fingerprint, self.rule)


def export_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    dtype: StoredPrecision | None = None,
    evaluation: Path | None = None,
    card: CardFacts | None = None,
    **options: Any,
) -> float:
    """Export a checkpoint, with its recipe on the model card; return the largest relative difference of the logits.

    Args:
        checkpoint: checkpoint to export.
        output: folder to make.
        dtype: precision of the stored weights; None: that of training.
        evaluation: folder with results of tools/evaluate.py perplexity, for the model card.
        card: languages and datasets for the model card, whose other facts are those of the run.
        options: further fields of `ExportOptions`.

    Raises:
        CheckpointError: as in `export_model` and `read_run`, or the evaluation is not one of this checkpoint.
        DataError: the run folder's tokenizer is not the one that it was trained with.
    """
    run, record = read_run(checkpoint)
    trained = weights_dtype(run.train.precision)
    blend = _training_data(run, record)
    special_in_text = _special_in_text(checkpoint.run_dir, record, blend)
    tokenizer = load_tokenizer(checkpoint.run_dir / TOKENIZER_FOLDER, special_in_text)
    check_recorded_tokenizer(tokenizer, record.tokenizer, checkpoint.run_dir / "data.json")
    card = (card or CardFacts())._replace(
        title=output.resolve().name,
        rows=training_facts(checkpoint, run, record),
        recipe=recipe(run),
        perplexity=_perplexity(evaluation, checkpoint) if evaluation else None,
    )
    return export_model(
        CheckpointWeights(checkpoint, trained),
        run.model,
        output,
        DataFields(
            record.rule.spec,
            record.rule.token_ids,
            record.tokenizer.fingerprint,
            tokenizer.special_ids,
            special_in_text,
        ),
        _training_sequences(run, record, blend),
        _source(tokenizer),
        ExportOptions(
            dtype=_STORED[dtype] if dtype else trained,
            card=card,
            **options,
        ),
    )


def read_published(folder: Path, tokenizer_folder: Path | None, segments: str | None) -> Published:
    """Read a model in the authors' layout.

    Args:
        folder: the model's folder.
        tokenizer_folder: its tokenizer; None: the one next to the weights, if there is one.
        segments: its segment rule; None: the authors' rule.

    Raises:
        BipeError: the model or the tokenizer cannot be read, or the rule needs a tokenizer.
    """
    model = read_authors_checkpoint(folder)
    has_tokenizer = tokenizer_folder or any((folder / name).is_file() for name in DEFINITIONS)
    tokenizer = load_tokenizer(tokenizer_folder or folder) if has_tokenizer else None
    return Published(folder, model, tokenizer, _rule(segments or "reference", tokenizer, model.config.vocab_size))


def export_published(published: Published, output: Path, overwrite: bool) -> float:
    """Export a model in the authors' layout; return the largest relative difference of the logits.

    Raises:
        CheckpointError: as in `export_model`.
    """
    _, model, tokenizer, rule = published
    settings = read_settings(published.folder)
    named = {role: settings.get(f"{role}_token_id") for role in ("bos", "eos")}
    special_ids = tokenizer.special_ids if tokenizer else {role: i for role, i in named.items() if isinstance(i, int)}
    origin = f"the BiPE authors' layout, folder `{published.folder.resolve().name}`"
    return export_model(
        model.weights,
        model.config,
        output,
        DataFields(rule.spec, rule.token_ids, published.fingerprint, special_ids),
        random_sequences(model.config, rule, model.config.train_len_tokens),
        _source(tokenizer) if tokenizer else None,
        ExportOptions(
            dtype=model.dtype,
            overwrite=overwrite,
            card=CardFacts(title=output.resolve().name, rows={"Converted from": origin}),
        ),
    )


def random_sequences(config: ModelConfig, rule: SegmentRule, seq_len_tokens: int, rows: int = 2) -> SampleBatch:
    """Return fixed tokens, intra ids and inter ids [rows, seq_len], with separators as frequent as in text."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, config.vocab_size, (rows, seq_len_tokens))
    separators = [token for token in rule.token_ids if token < config.vocab_size]
    if separators:
        chosen = generator.random(tokens.shape) < SEPARATOR_SHARE
        tokens = np.where(chosen, generator.choice(separators, tokens.shape), tokens)
    ends = np.broadcast_to(segment_ends(tokens, rule), tokens.shape)  # fixed:N gives one row for all
    intra, inter = bilevel_ids(sequence_ends(ends, rule), config.intra_clip)
    return torch.from_numpy(tokens), torch.from_numpy(intra), torch.from_numpy(inter)


def _training_data(run: RunConfig, record: DataRecord) -> Blend | None:
    """Open the data that the run was trained on; None if it is no longer there."""
    try:
        blend = open_blend(run.data, run.train.seq_len_tokens, run.train.seed)
    except (ConfigError, DataError) as error:
        _log.info("Comparing on random tokens, since the training data cannot be read: %s", error)
        return None
    if blend.record.fingerprint == record.fingerprint:
        return blend
    folders = ", ".join(map(str, run.data.folders))
    _log.info("%s: no longer the data of this run; comparing on random tokens", folders)
    return None


def _special_in_text(run_dir: Path, record: DataRecord, blend: Blend | None) -> bool:
    """Return `special_in_text` of the training data; runs of earlier versions do not record it, but their data does."""
    special_in_text = record.special_in_text
    if special_in_text is None and blend is not None:
        special_in_text = blend.record.special_in_text
    if special_in_text is None:
        _log.warning(
            "%s does not record whether its data was made with --special-in-text: the exported tokenizer encodes names "
            "of special tokens in a text as plain characters",
            run_dir,
        )
    return bool(special_in_text)


def _training_sequences(run: RunConfig, record: DataRecord, blend: Blend | None) -> SampleBatch:
    """Return two sequences of the training data with their position ids, or random ones without the data."""
    if blend is None:
        return random_sequences(run.model, record.rule, run.train.seq_len_tokens)
    sequences = np.arange(min(2, blend.num_sequences))
    try:
        batch = make_batch(blend, sequences, run.train.seq_len_tokens, run.model.intra_clip)
    except DataError as error:
        _log.info("Comparing on random tokens, since the training data cannot be read: %s", error)
        return _training_sequences(run, record, None)
    return batch.tokens_BT, batch.intra_BT, batch.inter_BT


def _source(tokenizer: Tokenizer) -> TokenizerSource:
    encode, special_in_text = tokenizer.encode_batch, tokenizer.special_in_text
    return TokenizerSource(tokenizer.definition, tokenizer.to_json(), tokenizer.special_ids, encode, special_in_text)


def _perplexity(folder: Path, checkpoint: Checkpoint) -> PerplexityPlot:
    """Return the results of `evaluate.py perplexity` for this checkpoint, for the model card."""
    source = f"{checkpoint.run_dir}@{checkpoint.step}"
    try:
        report = json.loads((folder / JSON_NAME).read_text("utf-8"))
        png = (folder / f"{STEM}.png").read_bytes()
        found = {_resolved(model["source"]): model["results"] for model in report["models"]}
        data = f"`{report['data']['name']}` (fingerprint `{report['data']['fingerprint']}`)"
        about = f"Perplexity on {data}, {report['protocol']} protocol, in {report['dtype']}."
        results = found.get(_resolved(source))
        rows = [(f"{r['length_tokens']:,}", f"{r['perplexity'] or math.inf:,.2f}") for r in results or []]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the results of the evaluation cannot be read: {error}",
            remedy="Name the --output of tools/evaluate.py perplexity",
            location=folder,
        ) from error
    if results is None:
        raise CheckpointError(
            f"the evaluation is of {', '.join(found)}, not of {source}",
            remedy=f"Make one with tools/evaluate.py perplexity --model {source}",
            location=folder,
        )
    lengths, values = zip(*rows, strict=True) if rows else ((), ())
    lines = [("sequence length", *lengths), ("---",) * (len(rows) + 1), ("perplexity", *values)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return PerplexityPlot(png, f"{about}\n\n{table}")


def _resolved(source: str) -> str:
    run_dir, _, step = source.rpartition("@")
    return f"{Path(run_dir).resolve()}@{step}"


class _IdsOnly:
    """Vocabulary of known size without the tokens' texts."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def text_of(self, _token_id: int) -> None:
        """Return None: no token's text is known."""


def _rule(spec: str, tokenizer: Vocabulary | None, vocab_size: int) -> SegmentRule:
    """Return the segment rule; without a tokenizer, `reference` resolves to the authors' ids."""
    if tokenizer is not None:
        return resolve_rule(spec, tokenizer)
    if spec == "reference":
        return SegmentRule(spec=spec, token_ids=PUBLISHED_SEPARATORS)
    try:
        return resolve_rule(spec, _IdsOnly(vocab_size))
    except DataError as error:
        raise DataError(
            f"{error.message}; there is no tokenizer to resolve it with",
            remedy="Give --tokenizer, or use reference, fixed:N or a list of ids",
            location="--segments",
        ) from error
