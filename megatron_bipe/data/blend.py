"""A weighted blend of datasets as an endless stream of training samples. A single dataset is a blend of one.

A pattern with a fixed number of slots, repeated endlessly, decides which dataset a sample comes from; that dataset's
`SampleOrder` decides which of its sequences the sample is. Start-up time and memory therefore do not grow with the
corpus, each dataset has its own epochs, and the complete state is the number of consumed samples. Torch-free.
"""

import hashlib
import heapq
import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_bipe.config import DataConfig
from megatron_bipe.data.dataset import TokenDataset, describe_special_in_text, special_in_text_differs
from megatron_bipe.data.manifest import BlendMember, DataRecord
from megatron_bipe.data.prompt_answer import open_dataset
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.data.shuffle import SampleOrder
from megatron_bipe.errors import ConfigError, DataError
from megatron_bipe.types import BoolArray, IntArray, TokenArray

PATTERN_SLOTS = 10_000  # weights in hundredths of a percent are exact


class Blend:
    """Sequences of several datasets, and the order in which training reads them.

    Sequences are numbered consecutively: those of the first dataset, then those of the second, and so on.

    Args:
        datasets: at least one.
        weights: one positive weight per dataset, in any unit; None: proportional to their numbers of tokens.
        seq_len_tokens: T, the length of a sequence.
        seed: seed of the shuffle; every epoch of every dataset has its own permutation.

    Raises:
        DataError: a dataset is shorter than a sequence, or its tokenizer, segment rule, content or treatment of
            special tokens in the text differs.
        ConfigError: a weight is too small for one slot of the pattern.
    """

    def __init__(
        self, datasets: Sequence[TokenDataset], weights: Sequence[float] | None, seq_len_tokens: int, seed: int
    ) -> None:
        _check_compatible(datasets)
        self.datasets = tuple(datasets)
        self._seq_len_tokens = seq_len_tokens
        self._dtype = np.result_type(*(dataset.dtype for dataset in datasets))
        counts = [dataset.num_sequences(seq_len_tokens) for dataset in datasets]
        self._firsts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)  # [datasets + 1]
        # The first dataset uses the run's own seed, so that its order is the same with and without a blend. The other
        # seeds are larger than those of runs, so that equal datasets do not yield the same sequences at the same time.
        self._orders = [SampleOrder(count, seed + (member << 64)) for member, count in enumerate(counts)]
        weights = weights or [dataset.num_tokens for dataset in datasets]
        self.slots = count_slots(weights, [dataset.path for dataset in datasets])
        self._member_S = spread(self.slots)
        self._rank_S = _ranks(self._member_S)

    @property
    def num_sequences(self) -> int:
        return int(self._firsts[-1])

    @property
    def record(self) -> DataRecord:
        """The record that a model trained on this blend keeps; that of a single dataset is the dataset's own."""
        records = [dataset.manifest.record for dataset in self.datasets]
        if len(records) == 1:
            return records[0]
        members = tuple(
            BlendMember(path=str(dataset.path), fingerprint=record.fingerprint, slots=slots)
            for dataset, record, slots in zip(self.datasets, records, self.slots, strict=True)
        )
        text = json.dumps([[member.fingerprint, member.slots] for member in members], separators=(",", ":"))
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        special_in_text = _with_known_option(self.datasets).manifest.special_in_text
        changes = {"fingerprint": fingerprint, "blend": members, "special_in_text": special_in_text}
        return records[0].model_copy(update=changes)

    def sequence_indices(self, first_sample: int, count: int) -> IntArray:
        """Return the sequence number of each sample in [first_sample, first_sample + count), int64 [count].

        Any `PATTERN_SLOTS` consecutive samples contain each dataset exactly as often as it has slots. Among the first n
        samples, the number of each dataset's samples differs by less than one from its share of n.
        """
        if first_sample < 0 or count < 0:
            raise ValueError(f"cannot take {count} samples from {first_sample}: both must be at least 0")
        cycle, slot = divmod(first_sample, PATTERN_SLOTS)
        slots_B = np.arange(slot, slot + count)
        member_B = self._member_S[slots_B % PATTERN_SLOTS]
        indices_B = np.empty(count, dtype=np.int64)
        for member, rows in _by_member(member_B):
            further, its_slot = divmod(int(slots_B[rows[0]]), PATTERN_SLOTS)
            # The samples of one dataset among these are consecutive in its own order.
            start = (cycle + further) * self.slots[member] + int(self._rank_S[its_slot])
            indices_B[rows] = self._firsts[member] + self._orders[member].sequence_indices(start, rows.size)
        return indices_B

    def sequences(self, indices_B: IntArray, seq_len_tokens: int) -> tuple[TokenArray, BoolArray]:
        """Read sequences by number, as `TokenDataset.sequences` does, with one call per dataset."""
        if seq_len_tokens != self._seq_len_tokens:
            raise ValueError(f"sequences of {seq_len_tokens} tokens from a blend made for {self._seq_len_tokens}")
        indices_B = np.asarray(indices_B, dtype=np.int64)
        tokens = np.empty((indices_B.size, seq_len_tokens + 1), dtype=self._dtype)
        ends = np.empty((indices_B.size, seq_len_tokens), dtype=np.bool_)
        for dataset, rows, own_indices in self._by_dataset(indices_B):
            tokens[rows], ends[rows] = dataset.sequences(own_indices, seq_len_tokens)
        return tokens, ends

    def answers(self, indices_B: IntArray) -> IntArray | None:
        """Return the labels that count in the loss, as `TokenDataset.answers` does."""
        if self.datasets[0].manifest.examples is None:  # then all datasets contain text
            return None
        indices_B = np.asarray(indices_B, dtype=np.int64)
        answers_B2 = np.empty((indices_B.size, 2), dtype=np.int64)
        for dataset, rows, own_indices in self._by_dataset(indices_B):
            own_answers = dataset.answers(own_indices)
            assert own_answers is not None  # then all datasets contain examples
            answers_B2[rows] = own_answers
        return answers_B2

    def _by_dataset(self, indices_B: IntArray) -> Iterator[tuple[TokenDataset, IntArray, IntArray]]:
        """Yield each dataset that holds some of these sequences, their rows, and their numbers within the dataset."""
        if indices_B.size and not 0 <= indices_B.min() <= indices_B.max() < self.num_sequences:
            what = f"sequences {indices_B.min()} to {indices_B.max()}"
            raise IndexError(f"{what} are not in a blend of {self.num_sequences}")
        member_B = np.searchsorted(self._firsts, indices_B, side="right") - 1
        for member, rows in _by_member(member_B):
            yield self.datasets[member], rows, indices_B[rows] - self._firsts[member]


def open_blend(data: DataConfig, seq_len_tokens: int, seed: int) -> Blend:
    """Open the training data that a run names.

    Raises:
        DataError: a dataset is missing or damaged, or `Blend` raises it.
        ConfigError: `Blend` raises it.
    """
    return Blend([open_dataset(folder) for folder in data.folders], data.weights, seq_len_tokens, seed)


def count_slots(weights: Sequence[float], names: Sequence[str | Path]) -> tuple[int, ...]:
    """Return the number of pattern slots of each weight, `PATTERN_SLOTS` in total, rounded by largest remainder.

    Args:
        weights: positive and finite, in any unit.
        names: name of each weight's dataset, for the message.

    Raises:
        ConfigError: weights are too small for a single slot; the message names all of them.
    """
    exact = [Fraction(weight) for weight in weights]
    unit = sum(exact) / PATTERN_SLOTS
    quotas = [weight / unit for weight in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(counts)), key=lambda member: counts[member] - quotas[member])
    for member in by_remainder[: PATTERN_SLOTS - sum(counts)]:
        counts[member] += 1
    too_small = [
        f"{name} with weight {weight:g} has a share of {float(quota / PATTERN_SLOTS):.2g}"
        for name, weight, quota, count in zip(names, weights, quotas, counts, strict=True)
        if not count
    ]
    if too_small:
        raise ConfigError(
            f"{'; '.join(too_small)}; the smallest share of a dataset in a blend is {1 / PATTERN_SLOTS:g}",
            remedy="Raise its weight, or remove the dataset",
            location="data.path",
        )
    return tuple(counts)


def spread(counts: Sequence[int]) -> IntArray:
    """Assign each slot of a pattern to a dataset, int64 [slots], so that each dataset's slots are spread evenly.

    With S slots in total, slot k of a dataset with c slots (c > 0) lies in [floor(k S / c), ceil((k + 1) S / c)), the
    k-th of c equal parts. Each slot goes to the eligible dataset with the earliest deadline; that always succeeds.

    Source: Baruah et al. 1996, "Proportionate progress: a notion of fairness in resource allocation".
    """
    num_slots = sum(counts)
    pattern = np.empty(num_slots, dtype=np.int64)
    waiting = [(0, member, 0) for member in range(len(counts))]  # (earliest slot, dataset, k)
    eligible: list[tuple[int, int, int]] = []  # (deadline, dataset, k)
    for slot in range(num_slots):
        while waiting and waiting[0][0] <= slot:
            _, member, k = heapq.heappop(waiting)
            heapq.heappush(eligible, (-(-(k + 1) * num_slots // counts[member]), member, k))
        _, member, k = heapq.heappop(eligible)
        pattern[slot] = member
        if k + 1 < counts[member]:
            heapq.heappush(waiting, ((k + 1) * num_slots // counts[member], member, k + 1))
    return pattern


def _ranks(member_S: IntArray) -> IntArray:
    """Return, for each slot, the number of earlier slots of the same dataset, int64 [slots]."""
    ranks = np.empty_like(member_S)
    for _, slots in _by_member(member_S):
        ranks[slots] = np.arange(slots.size)
    return ranks


def _by_member(member_B: IntArray) -> Iterator[tuple[int, IntArray]]:
    """Yield each dataset that occurs, and its rows in ascending order."""
    for member in np.unique(member_B).tolist():
        yield member, np.flatnonzero(member_B == member)


def _describe_rule(rule: SegmentRule) -> str:
    """Describe a rule with its token ids; a long list is given by its length and checksum."""
    ids = ", ".join(map(str, rule.token_ids))
    digest = hashlib.sha256(ids.encode()).hexdigest()[:12]
    return f"{rule.spec} (token ids: {ids if len(ids) <= 40 else f'{len(rule.token_ids)}, SHA-256 {digest}'})"


def _content(dataset: TokenDataset) -> str:
    return "text" if dataset.manifest.examples is None else "examples"


def _with_known_option(datasets: Sequence[TokenDataset]) -> TokenDataset:
    """Return the first dataset that records `special_in_text`, or else the first one."""
    return next((dataset for dataset in datasets if dataset.manifest.special_in_text is not None), datasets[0])


def _check_compatible(datasets: Sequence[TokenDataset]) -> None:
    first, known = datasets[0], _with_known_option(datasets)
    problems = []
    for other in datasets[1:]:
        pairs = {
            "tokenizer": (first.manifest.tokenizer.fingerprint, other.manifest.tokenizer.fingerprint),
            "segment rule": (_describe_rule(first.rule), _describe_rule(other.rule)),
            "content": (_content(first), _content(other)),
        }
        problems += [
            f"{what} of {first.path} is {one}, that of {other.path} is {another}"
            for what, (one, another) in pairs.items()
            if one != another
        ]
        if special_in_text_differs(known.manifest.special_in_text, other.manifest.special_in_text):
            made = [f"{each.path} {describe_special_in_text(each.manifest.special_in_text)}" for each in (known, other)]
            problems.append(f"{made[0]}, {made[1]}")
    if problems:
        raise DataError(
            "the datasets of a blend must have the same tokenizer and segment rule, must all contain text or all "
            "contain examples, and must all be made with or all without --special-in-text: " + "; ".join(problems),
            remedy="Make them with the same --tokenizer, --segments and --special-in-text, or remove those that differ",
            location="data.path",
        )
