"""Several datasets with weights as one endless row of training samples. One dataset is a blend of one.

Which dataset a sample comes from is laid down once, for a pattern of a fixed number of slots that repeats for ever;
which of its windows it is, the dataset's own `SampleOrder` says. So start-up and memory do not grow with the corpus,
every dataset has epochs of its own, and the whole state is the number of samples consumed. Torch-free.
"""

import hashlib
import heapq
import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_bipe.config.schema import DataConfig
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import BlendMember, DataRecord
from megatron_bipe.data.prompt_answer import open_dataset
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.data.shuffle import SampleOrder
from megatron_bipe.errors import ConfigError, DataError
from megatron_bipe.types import BoolArray, IntArray, TokenArray

PATTERN_SLOTS = 10_000  # weights in hundredths of a percent come out exactly


class Blend:
    """Windows of several datasets, and the order in which training takes them.

    Windows are numbered through: those of the first dataset, then those of the second, and so on.

    Args:
        datasets: at least one.
        weights: of each, positive, in any unit; None: in proportion to their tokens.
        seq_len_tokens: T, length of a window.
        seed: of the shuffle; every epoch of every dataset has a permutation of its own.

    Raises:
        DataError: a dataset is shorter than a window, or of another tokenizer, segment rule or kind than the first.
        ConfigError: a weight is too small for one slot of the pattern.
    """

    def __init__(
        self, datasets: Sequence[TokenDataset], weights: Sequence[float] | None, seq_len_tokens: int, seed: int
    ) -> None:
        _check_alike(datasets)
        self.datasets = tuple(datasets)
        self._seq_len_tokens = seq_len_tokens
        self._dtype = np.result_type(*(dataset.dtype for dataset in datasets))
        counts = [dataset.num_sequences(seq_len_tokens) for dataset in datasets]
        self._firsts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)  # [datasets + 1]
        # The first dataset's seed is the run's own, so that a dataset alone is in the order it always had; the others'
        # are beyond what runs are given, so that equal datasets do not give the same windows side by side.
        self._orders = [SampleOrder(count, seed + (position << 64)) for position, count in enumerate(counts)]
        weights = weights or [dataset.num_tokens for dataset in datasets]
        self.slots = slot_counts(weights, [dataset.path for dataset in datasets])
        self._member_S = spread(self.slots)
        self._rank_S = _ranks(self._member_S)

    @property
    def num_sequences(self) -> int:
        """Windows of all datasets."""
        return int(self._firsts[-1])

    @property
    def record(self) -> DataRecord:
        """What a model trained on this blend remembers of it; one dataset alone is remembered as itself."""
        records = [dataset.manifest.record for dataset in self.datasets]
        if len(records) == 1:
            return records[0]
        members = tuple(
            BlendMember(path=str(dataset.path), fingerprint=record.fingerprint, slots=slots)
            for dataset, record, slots in zip(self.datasets, records, self.slots, strict=True)
        )
        text = json.dumps([[member.fingerprint, member.slots] for member in members], separators=(",", ":"))
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        return records[0].model_copy(update={"fingerprint": fingerprint, "blend": members})

    def sequence_indices(self, first_sample: int, count: int) -> IntArray:
        """Windows of samples [first_sample, first_sample + count), int64 [count].

        Any `PATTERN_SLOTS` samples in a row hold each dataset exactly as often as it has slots; the first n samples,
        less than one away from its share of n.
        """
        if first_sample < 0 or count < 0:
            raise ValueError(f"{count} samples from {first_sample}")
        cycle, slot = divmod(first_sample, PATTERN_SLOTS)
        slots_B = np.arange(slot, slot + count)
        member_B = self._member_S[slots_B % PATTERN_SLOTS]
        windows_B = np.empty(count, dtype=np.int64)
        for member, rows in _by_member(member_B):
            further, its_slot = divmod(int(slots_B[rows[0]]), PATTERN_SLOTS)
            # A dataset's samples among these are consecutive ones of its own order.
            start = (cycle + further) * self.slots[member] + int(self._rank_S[its_slot])
            windows_B[rows] = self._firsts[member] + self._orders[member].sequence_indices(start, rows.size)
        return windows_B

    def sequences(self, indices_B: IntArray, seq_len_tokens: int) -> tuple[TokenArray, BoolArray]:
        """Windows by number, as `TokenDataset.windows`; each dataset is asked once for all of its own.

        Raises:
            DataError: a dataset holds ids outside its vocabulary.
        """
        if seq_len_tokens != self._seq_len_tokens:
            raise ValueError(f"windows of {seq_len_tokens} tokens from a blend of windows of {self._seq_len_tokens}")
        indices_B = np.asarray(indices_B, dtype=np.int64)
        tokens = np.empty((indices_B.size, seq_len_tokens + 1), dtype=self._dtype)
        ends = np.empty((indices_B.size, seq_len_tokens), dtype=np.bool_)
        for dataset, rows, own_indices in self._shared_out(indices_B):
            tokens[rows], ends[rows] = dataset.sequences(own_indices, seq_len_tokens)
        return tokens, ends

    def answers(self, indices_B: IntArray) -> IntArray | None:
        """Which labels count, as `TokenDataset.answers`: of examples the answers, of text all."""
        if self.datasets[0].manifest.examples is None:  # and so is none of the others
            return None
        indices_B = np.asarray(indices_B, dtype=np.int64)
        answers_B2 = np.empty((indices_B.size, 2), dtype=np.int64)
        for dataset, rows, own_indices in self._shared_out(indices_B):
            own_answers = dataset.answers(own_indices)
            assert own_answers is not None  # it is of examples, too
            answers_B2[rows] = own_answers
        return answers_B2

    def _shared_out(self, indices_B: IntArray) -> Iterator[tuple[TokenDataset, IntArray, IntArray]]:
        """Each dataset that has some of these windows, their rows, and their numbers in it."""
        if indices_B.size and not 0 <= indices_B.min() <= indices_B.max() < self.num_sequences:
            raise IndexError(f"windows {indices_B.min()} to {indices_B.max()} of {self.num_sequences}")
        member_B = np.searchsorted(self._firsts, indices_B, side="right") - 1
        for member, rows in _by_member(member_B):
            yield self.datasets[member], rows, indices_B[rows] - self._firsts[member]


def open_blend(data: DataConfig, seq_len_tokens: int, seed: int) -> Blend:
    """Open the training data that a run names.

    Raises:
        DataError: a dataset is missing or damaged; else as `Blend`.
        ConfigError: as `Blend`.
    """
    return Blend([open_dataset(folder) for folder in data.folders], data.weights, seq_len_tokens, seed)


def slot_counts(weights: Sequence[float], names: Sequence[str | Path]) -> tuple[int, ...]:
    """Slots of the pattern for each weight, together `PATTERN_SLOTS`: shares rounded by largest remainder.

    Args:
        weights: positive and finite, in any unit.
        names: what the weights belong to, for the message.

    Raises:
        ConfigError: names every weight that comes out as no slot at all.
    """
    exact = [Fraction(weight) for weight in weights]
    unit = sum(exact) / PATTERN_SLOTS
    quotas = [weight / unit for weight in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda position: counts[position] - quotas[position])
    for position in by_remainder[: PATTERN_SLOTS - sum(counts)]:
        counts[position] += 1
    lost = [
        f"{name} with weight {weight:g} has a share of {float(quota / PATTERN_SLOTS):.2g}"
        for name, weight, quota, count in zip(names, weights, quotas, counts, strict=True)
        if not count
    ]
    if lost:
        raise ConfigError(
            f"{'; '.join(lost)}; the least share of a dataset in a blend is {1 / PATTERN_SLOTS:g}",
            remedy="Raise its weight, or leave it out",
            location="data.path",
        )
    return tuple(counts)


def spread(counts: Sequence[int]) -> IntArray:
    """Which dataset each slot of a pattern belongs to, int64 [slots], each dataset's slots spread evenly.

    Number k of the c slots that a dataset has of S lies in [floor(k S / c), ceil((k + 1) S / c)), its own c-th of the
    pattern. Of the datasets whose next slot may come, the one whose must come earliest is taken; that always works out.

    Args:
        counts: slots of each dataset, positive.

    Source: Baruah et al. 1996, "Proportionate progress: a notion of fairness in resource allocation".
    """
    num_slots = sum(counts)
    pattern = np.empty(num_slots, dtype=np.int64)
    coming = [(0, position, 0) for position in range(len(counts))]  # (earliest slot, dataset, number)
    ready: list[tuple[int, int, int]] = []  # (slot it must come before, dataset, number)
    for slot in range(num_slots):
        while coming and coming[0][0] <= slot:
            _, position, number = heapq.heappop(coming)
            heapq.heappush(ready, (-(-(number + 1) * num_slots // counts[position]), position, number))
        _, position, number = heapq.heappop(ready)
        pattern[slot] = position
        if number + 1 < counts[position]:
            heapq.heappush(coming, ((number + 1) * num_slots // counts[position], position, number + 1))
    return pattern


def _ranks(member_S: IntArray) -> IntArray:
    """For each slot, how many of its dataset's slots lie before it, int64 [slots]."""
    ranks = np.empty_like(member_S)
    for _, slots in _by_member(member_S):
        ranks[slots] = np.arange(slots.size)
    return ranks


def _by_member(member_B: IntArray) -> Iterator[tuple[int, IntArray]]:
    """Each dataset that occurs, and its rows in ascending order."""
    for member in np.unique(member_B).tolist():
        yield member, np.flatnonzero(member_B == member)


def _shown(rule: SegmentRule) -> str:
    """The rule with all of what it came out as, shortened only where it is long."""
    ids = ", ".join(map(str, rule.token_ids))
    digest = hashlib.sha256(ids.encode()).hexdigest()[:12]
    return f"{rule.spec} (token ids: {ids if len(ids) <= 40 else f'{len(rule.token_ids)}, SHA-256 {digest}'})"


def _content(dataset: TokenDataset) -> str:
    return "text" if dataset.manifest.examples is None else "examples"


def _check_alike(datasets: Sequence[TokenDataset]) -> None:
    """Refuse datasets whose tokens or segments mean different things."""
    first = datasets[0]
    problems = []
    for other in datasets[1:]:
        pairs = {
            "tokenizer": (first.manifest.tokenizer.fingerprint, other.manifest.tokenizer.fingerprint),
            "segment rule": (_shown(first.rule), _shown(other.rule)),
            "content": (_content(first), _content(other)),
        }
        problems += [
            f"{what} of {first.path} is {one}, that of {other.path} is {another}"
            for what, (one, another) in pairs.items()
            if one != another
        ]
    if problems:
        raise DataError(
            "the datasets of a blend must have the same tokenizer and segment rule, and all be of text or all of "
            f"examples: {'; '.join(problems)}",
            remedy="Make them with the same --tokenizer and --segments, or leave the others out",
            location="data.path",
        )
