"""Losses of a model on a dataset at one sequence length: in total, and by document and position in the sequence.

B batch · T positions of a sequence · P predictions of a sequence · K predictions in one call of the head · D width
V vocabulary · M documents · Q equal parts of a sequence
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from megatron_bipe.data.segments import bilevel_ids
from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.eval.eval_model import EvalModel
from megatron_bipe.eval.sequences import (
    DEFAULT_EMPTY_TEXTS,
    DEFAULT_PROTOCOL,
    EVAL_BATCH_TOKENS,
    EmptyTexts,
    EvalSequences,
    Protocol,
    SelectedText,
    Text,
    bits_per_byte,
    cut_sequences,
    read_sequence,
    select_text,
)
from megatron_bipe.model import NUM_PARTS, token_losses
from megatron_bipe.types import Batch, IntArray

FloatArray = npt.NDArray[np.float64]
HEAD_TOKENS = 2048  # tokens per call of the head: 260 MB of fp32 logits for LLaMA's vocabulary
NUM_RESAMPLES = 1000
INTERVAL = 0.95
LEAST_DOCUMENTS = 2  # with fewer there is no interval


class EvalSettings(NamedTuple):
    """Settings of an evaluation besides model, dataset and length."""

    protocol: Protocol = DEFAULT_PROTOCOL
    max_tokens: int | None = None
    """Evaluate on documents of at most `max_tokens` tokens together, spread over the dataset; None: on all."""
    empty_texts: EmptyTexts = DEFAULT_EMPTY_TEXTS
    """Whether documents of empty texts are evaluated."""
    batch_tokens: int = EVAL_BATCH_TOKENS
    """Maximum tokens per batch; a longer sequence forms its own batch."""
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    """Compute precision; losses are always computed in fp32 and summed in fp64."""

    def select(self, dataset: Text) -> Text:
        """Return the documents to evaluate on; those that are selected already are returned as they are."""
        if isinstance(dataset, SelectedText):
            return dataset
        return select_text(dataset, self.max_tokens, self.empty_texts)


class PerplexityResult(NamedTuple):
    """Result at one sequence length."""

    length_tokens: int
    perplexity: float
    """exp(nats_per_token); infinite on overflow."""
    nats_per_token: float
    """Mean loss as the protocol defines it."""
    bits_per_byte: float | None
    """Total loss divided by the raw text's UTF-8 bytes, see `sequences.bits_per_byte`."""
    num_sequences: int
    """Number of sequences; with protocol `full` the last one may be shorter."""
    num_predictions: int
    num_tokens_read: int
    num_tokens_dropped: int
    """Available tokens that the protocol does not use."""
    seconds: float


class DocumentLosses(NamedTuple):
    """Sums of the losses of all predictions at one sequence length."""

    length_tokens: int
    nats_MQ: FloatArray
    """Loss sums by document and sequence part of the predicted token."""
    counts_MQ: IntArray
    """Number of predictions in each."""

    @property
    def perplexity(self) -> float:
        return _exp(self.nats_MQ.sum() / self.counts_MQ.sum())

    @property
    def num_documents(self) -> int:
        """Number of documents with predictions."""
        return int((self.counts_MQ.sum(1) > 0).sum())

    @property
    def by_position(self) -> list[tuple[float, float]]:
        """(middle of the sequence part in tokens, perplexity there), for parts with predictions."""
        nats_Q, counts_Q = self.nats_MQ.sum(0), self.counts_MQ.sum(0)
        width = self.length_tokens / NUM_PARTS
        return [
            ((part + 0.5) * width, _exp(nats_Q[part] / counts_Q[part])) for part in np.flatnonzero(counts_Q).tolist()
        ]

    def interval(self) -> tuple[float, float] | None:
        """Return the bootstrap confidence interval of the perplexity, at the level `INTERVAL`.

        Each resample draws as many documents as the corpus has, with replacement; the draws are the same for every
        model and length. Return None if fewer than `LEAST_DOCUMENTS` have predictions.

        Source: Efron 1979, "Bootstrap methods: another look at the jackknife"; percentile interval.
        """
        nats_M, counts_M = self.nats_MQ.sum(1), self.counts_MQ.sum(1)
        num_documents = len(counts_M)
        if self.num_documents < LEAST_DOCUMENTS:
            return None
        generator = np.random.default_rng(0)
        means = np.empty(NUM_RESAMPLES)
        for resample in range(NUM_RESAMPLES):
            times_M = np.bincount(generator.integers(num_documents, size=num_documents), minlength=num_documents)
            drawn = times_M @ counts_M
            means[resample] = times_M @ nats_M / drawn if drawn else np.nan
        low, high = np.nanquantile(means, ((1 - INTERVAL) / 2, (1 + INTERVAL) / 2))
        return _exp(low), _exp(high)


def evaluate_perplexity(
    eval_model: EvalModel,
    dataset: Text,
    length_tokens: int,
    settings: EvalSettings,
    progress: Callable[[int], object] | None = None,
) -> PerplexityResult:
    """Return the perplexity over all sequences of one length.

    Memory holds the activations of one batch and the logits of `HEAD_TOKENS` tokens, whatever the length.

    Args:
        eval_model: moved to the device and precision of `settings`, in place.
        dataset: a dataset accepted by `check_compatible`, or documents that `settings` selects from one.
        length_tokens: sequence length.
        settings: protocol, limits, device and precision.
        progress: called after each batch with its number of tokens.

    Raises:
        ConfigError: an impossible length or setting.
        DataError: the dataset is shorter than a sequence, or damaged.
        CheckpointError: the model's loss is not finite.
    """
    text = settings.select(dataset)
    sequences = cut_sequences(text, text.num_tokens, length_tokens, settings.protocol)
    started = time.perf_counter()
    losses = sequence_losses(eval_model, text, sequences, settings, progress)
    total_nats = sum(float(losses_BP.sum()) for _, losses_BP in losses)
    seconds = time.perf_counter() - started
    return _result(text, length_tokens, sequences, total_nats, seconds)


def evaluate_documents(
    eval_model: EvalModel,
    dataset: Text,
    length_tokens: int,
    settings: EvalSettings,
    progress: Callable[[int], object] | None = None,
) -> DocumentLosses:
    """Sum the losses by document and sequence part; arguments and errors are those of `evaluate_perplexity`."""
    text = settings.select(dataset)
    sequences = cut_sequences(text, text.num_tokens, length_tokens, settings.protocol)
    bounds = text.document_bounds()
    num_documents = len(bounds) - 1
    nats = np.zeros(num_documents * NUM_PARTS)
    counts = np.zeros(num_documents * NUM_PARTS, dtype=np.int64)
    for rows, losses_BP in sequence_losses(eval_model, text, sequences, settings, progress):
        offsets = sequences.num_context[rows[0]] + np.arange(losses_BP.shape[1])
        predicted_BP = sequences.starts[rows][:, None] + offsets + 1
        document_BP = np.searchsorted(bounds, predicted_BP, side="right") - 1
        part_P = offsets * NUM_PARTS // length_tokens
        cells = (document_BP * NUM_PARTS + part_P).ravel()
        nats += np.bincount(cells, losses_BP.ravel(), minlength=nats.size)
        counts += np.bincount(cells, minlength=counts.size)
    shape = (num_documents, NUM_PARTS)
    return DocumentLosses(length_tokens, nats.reshape(shape), counts.reshape(shape))


def sequence_losses(
    eval_model: EvalModel,
    dataset: Text,
    sequences: EvalSequences,
    settings: EvalSettings,
    progress: Callable[[int], object] | None = None,
) -> Iterator[tuple[IntArray, FloatArray]]:
    """Yield row numbers of sequences [B] and the losses of their predictions in nats [B, P], batch by batch.

    Arguments and errors are those of `evaluate_perplexity`, which sums the losses.
    """
    if settings.batch_tokens < 1:
        raise ConfigError(
            f"a batch has {settings.batch_tokens} tokens", remedy="Use 1 or more", location="--batch-tokens"
        )
    model = eval_model.model.to(device=settings.device, dtype=settings.dtype).eval()
    longest = int(sequences.num_inputs.max())
    for rows in _group_rows(sequences, max(1, settings.batch_tokens // longest)):
        batch = _read_batch(dataset, sequences, rows, eval_model.config.intra_clip)
        num_context = int(sequences.num_context[rows[0]])
        losses_BP = _losses(model, Batch(*(ids.to(settings.device) for ids in batch[:4])), num_context)
        total_nats = losses_BP.sum()
        if not math.isfinite(total_nats):
            raise CheckpointError(
                f"the loss is {total_nats} in the batch of {longest}-token sequences that starts at token "
                f"{sequences.starts[rows[0]]}",
                remedy="Use --dtype fp32, or evaluate another step: the weights may be damaged or have diverged",
                location=eval_model.source,
            )
        if progress:
            progress(batch.tokens_BT.numel())
        yield rows, losses_BP


def _group_rows(sequences: EvalSequences, num_together: int) -> Iterator[IntArray]:
    """Yield row numbers of sequences of equal size and context, at most `num_together` at a time."""
    kinds, kind_of = np.unique(np.stack([sequences.num_inputs, sequences.num_context]), axis=1, return_inverse=True)
    for kind in reversed(range(kinds.shape[1])):
        rows = np.flatnonzero(kind_of == kind)
        yield from np.split(rows, range(num_together, rows.size, num_together))


def _read_batch(dataset: Text, sequences: EvalSequences, rows: IntArray, clip: int) -> Batch[Tensor]:
    """Read sequences of equal size with their ids; the labels are [B, P] with P <= T."""
    num_inputs, first_label = int(sequences.num_inputs[rows[0]]), int(sequences.num_context[rows[0]]) + 1
    end = first_label + int(sequences.num_predictions[rows[0]])
    reach = max(num_inputs, end)
    read = [read_sequence(dataset, start, num_inputs, reach) for start in sequences.starts[rows].tolist()]
    tokens, ends = (np.stack(arrays) for arrays in zip(*read, strict=True))
    intra, inter = bilevel_ids(ends, clip)
    arrays = (tokens[:, :num_inputs], intra, inter, tokens[:, first_label:end])
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


@torch.inference_mode()
def _losses(model: nn.Sequential, batch: Batch[Tensor], num_context: int) -> FloatArray:
    """Return losses in nats [B, P]; the first label is predicted at token `num_context`.

    The head runs on slices, because full logits would exceed all other memory.
    """
    hidden_BTD, positions_BT = model[:-1]((batch.tokens_BT, batch.intra_BT, batch.inter_BT))
    num_predictions = batch.labels_BT.shape[1]
    hidden_parts = hidden_BTD[:, num_context : num_context + num_predictions].flatten(0, 1).split(HEAD_TOKENS)
    label_parts = batch.labels_BT.flatten().split(HEAD_TOKENS)
    parts = []
    for hidden_KD, labels_K in zip(hidden_parts, label_parts, strict=True):
        logits_KV = model[-1]((hidden_KD, positions_BT))
        parts.append(token_losses(logits_KV, labels_K).double().cpu())
    return torch.cat(parts).view(batch.labels_BT.shape).numpy()


def _result(
    text: Text,
    length_tokens: int,
    sequences: EvalSequences,
    total_nats: float,
    seconds: float,
) -> PerplexityResult:
    num_predictions = int(sequences.num_predictions.sum())
    # `reference` is defined as the mean of the blocks' means, which equals this mean, since all blocks have equal size.
    # The authors repeat a batch's mean eight times, once per block, and accelerate truncates the repetitions of the
    # last, smaller batch to its number of blocks; on one process, their result therefore equals this mean, too.
    nats = total_nats / num_predictions
    return PerplexityResult(
        length_tokens=length_tokens,
        perplexity=_exp(nats),
        nats_per_token=nats,
        bits_per_byte=bits_per_byte(text, sequences, total_nats),
        num_sequences=int(sequences.starts.size),
        num_predictions=num_predictions,
        num_tokens_read=sequences.num_tokens,
        num_tokens_dropped=text.num_tokens - sequences.num_tokens,
        seconds=seconds,
    )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
