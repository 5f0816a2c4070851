"""The validations of a run: which sequences of a set each one reads at which length, and what follows from the losses.

A validation of text reads what `tools/evaluate.py perplexity --protocol full --max-tokens N` reads, with N =
train.valid_samples x train.seq_len_tokens, so that both report the same loss of the same weights. Neither the layout
nor the number of ranks decides what is read.

W sequences · B sequences of a batch · T positions · Q equal parts of a sequence
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from megatron_bipe.config import RunConfig
from megatron_bipe.data.collate import SequenceSource, label_weight, make_batch, with_row_weights
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.prompt_answer import PADDING
from megatron_bipe.engine.interface import LossSums
from megatron_bipe.errors import BipeError, ConfigError, DataError
from megatron_bipe.eval.sequences import Text, bits_per_byte, cut_sequences, read_sequence, select_text
from megatron_bipe.parallel import Mesh
from megatron_bipe.types import Batch, BoolArray, IntArray, TokenArray


class ValidResult(NamedTuple):
    """Loss on one set at one sequence length."""

    name: str
    """Name of the set."""
    length_tokens: int
    nats: float
    """Mean over all labels that count."""
    nats_by_position: list[float]
    """Means over 16 equal parts of the sequence; NaN for one without a label that counts."""
    bits_per_byte: float | None
    """None if the bytes of the text are unknown."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats, 700))  # larger values overflow a float


class TextSequences:
    """The sequences of a text at one length, as protocol `full` cuts them; the last one is padded, without weight.

    The layers are causal, so that padding changes no loss before it.

    Raises:
        DataError: the text is shorter than a sequence.
    """

    def __init__(self, text: Text, length_tokens: int) -> None:
        self._text = text
        self._cut = cut_sequences(text, text.num_tokens, length_tokens, "full")

    @property
    def num_sequences(self) -> int:
        return int(self._cut.starts.size)

    def sequences(self, indices_B: IntArray, seq_len_tokens: int) -> tuple[TokenArray, BoolArray]:
        """Read sequences by number: tokens [B, T + 1], and segment ends [B, T]."""
        tokens = np.full((indices_B.size, seq_len_tokens + 1), PADDING, dtype=np.int64)
        ends = np.zeros((indices_B.size, seq_len_tokens), dtype=np.bool_)
        for row, index in enumerate(indices_B.tolist()):
            start, count = int(self._cut.starts[index]), int(self._cut.num_inputs[index])
            tokens[row, : count + 1], ends[row, :count] = read_sequence(self._text, start, count)
        return tokens, ends

    def answers(self, indices_B: IntArray) -> IntArray:
        """Return the labels [0, stop) of each sequence that are tokens of the text, int64 [B, 2]."""
        counts_B = self._cut.num_predictions[indices_B]
        return np.stack([np.zeros_like(counts_B), counts_B], axis=1)

    def bits_per_byte(self, mean_nats: float) -> float | None:
        return bits_per_byte(self._text, self._cut, mean_nats * int(self._cut.num_predictions.sum()))


class Validation(NamedTuple):
    """One set at one sequence length; all of its sequences are read."""

    name: str
    length_tokens: int
    source: SequenceSource
    indices_W: IntArray
    """Sequences of the source, in order."""

    def batches(self, run: RunConfig, mesh: Mesh) -> Iterator[Batch[Tensor]]:
        """Yield this rank's part of the sequences.

        All ranks get equally many batches of one shape. Where the sequences do not fill them, the last sequence is
        repeated with weight 0. A batch has about as many tokens as a micro-batch of training, and at least a sequence.
        """
        train, num_sequences = run.train, self.indices_W.size
        together = max(1, train.micro_batch * train.seq_len_tokens // self.length_tokens)
        micro_batch = min(together, -(-num_sequences // mesh.data_ranks))
        padding = -num_sequences % (mesh.data_ranks * micro_batch)
        shape = (mesh.data_ranks, -1, micro_batch)
        local = np.pad(self.indices_W, (0, padding), "edge").reshape(shape)[mesh.data_rank]
        counts = np.pad(np.ones(num_sequences, np.float32), (0, padding)).reshape(shape)[mesh.data_rank]
        is_text = isinstance(self.source, TextSequences)
        weight = 1.0 if is_text else label_weight(self.source, self.indices_W, self.length_tokens)
        for indices_B, counts_B in zip(local, counts, strict=True):
            batch = make_batch(self.source, indices_B, self.length_tokens, run.model.intra_clip, weight)
            yield with_row_weights(batch, counts_B) if padding else batch

    def result(self, sums: LossSums) -> ValidResult:
        nats = sums.mean_nats
        per_byte = self.source.bits_per_byte(nats) if isinstance(self.source, TextSequences) else None
        return ValidResult(self.name, self.length_tokens, nats, sums.nats_by_position, per_byte)


def make_validations(run: RunConfig, datasets: Mapping[str, TokenDataset]) -> list[Validation]:
    """Return the validations of a run, by set and then by length, in the order of the configuration.

    Args:
        run: the run configuration.
        datasets: the opened sets by name.

    Raises:
        DataError: the only set that has too few tokens for a sequence of the longest length.
        ConfigError: lists all problems, if there are several, or lengths are configured for prompts and answers.
    """
    found, problems = list[Validation](), list[BipeError]()
    for name, dataset in datasets.items():
        try:
            found += _of_examples(run, name, dataset) if dataset.manifest.examples else _of_text(run, name, dataset)
        except BipeError as error:
            problems.append(error)
    raise_together(problems, "the validation sets cannot be used", "data.valid")
    return found


def raise_together(problems: Sequence[BipeError], what: str, location: str | Path) -> None:
    """Raise the only problem as it is; several as one ConfigError that lists them."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        listed = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems, start=1))
        raise ConfigError(f"{what}, for {len(problems)} reasons: {listed}", location=location)


def main_result(results: Sequence[ValidResult], seq_len_tokens: int) -> ValidResult:
    """Return the result that stands for all: the first set's at the training length, or else at its first length."""
    own = [result for result in results if result.name == results[0].name]
    return next((result for result in own if result.length_tokens == seq_len_tokens), own[0])


def _of_text(run: RunConfig, name: str, dataset: TokenDataset) -> list[Validation]:
    train = run.train
    text = select_text(dataset, run.valid_tokens)
    longest = max(run.valid_lengths)
    if text.num_tokens <= longest:
        is_part = text is not dataset
        part = f", of which train.valid_samples={train.valid_samples} selects {text.num_tokens}" if is_part else ""
        raise DataError(
            f"the dataset has {dataset.num_tokens} tokens{part}; a sequence of {longest} and its last label need "
            f"{longest + 1}",
            remedy="Use shorter sequences (train.valid_lengths, or train.seq_len_tokens without them), or "
            f"{'a larger train.valid_samples' if is_part else 'more text'}",
            location=dataset.path,
        )
    sources = [(length, TextSequences(text, length)) for length in run.valid_lengths]
    return [Validation(name, length, source, np.arange(source.num_sequences)) for length, source in sources]


def _of_examples(run: RunConfig, name: str, dataset: TokenDataset) -> list[Validation]:
    """Return the validation of prompts and answers, which have one length; the examples are spread evenly."""
    train = run.train
    if run.valid_lengths != (train.seq_len_tokens,):
        raise ConfigError(
            f"train.valid_lengths={list(train.valid_lengths)}, but the dataset contains prompts and answers, which "
            f"have the length train.seq_len_tokens={train.seq_len_tokens}",
            remedy="Remove train.valid_lengths",
            location=dataset.path,
        )
    num_sequences = dataset.num_sequences(train.seq_len_tokens)
    count = min(train.valid_samples, num_sequences)
    indices_W = np.linspace(0, num_sequences - 1, count).astype(np.int64)
    return [Validation(name, train.seq_len_tokens, dataset, indices_W)]
