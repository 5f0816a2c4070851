"""Segment rules, and the two ids of a token that follow from the segment ends.

A rule is data: its name and its resolved token ids are stored with the dataset, the checkpoint and the exported model.
This module does not import torch.
"""

import difflib
import json
from collections.abc import Callable, Iterable
from typing import Annotated, Protocol, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_bipe.errors import DataError
from megatron_bipe.types import BoolArray, IntArray, TokenArray

FULL_STOPS = frozenset(".。")
CLOSERS = frozenset("\"'”’»›)]}」』）")  # characters allowed between a full stop and the next sentence
FIXED_PREFIX = "fixed:"
FEW_IDS = 4  # up to this many comparisons are faster than a lookup per token
RULE_FORMS = "reference, sentence, newline, fixed:N, a JSON list of token ids, a JSON list of strings"


class Vocabulary(Protocol):
    """The part of a tokenizer that a rule needs."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, including special ones."""

    def text_of(self, token_id: int, /) -> str | None:
        """Return the text of one token inside a sequence; None for special, unused and partial-character tokens."""


class SegmentRule(BaseModel):
    """A rule that decides which tokens close a segment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    spec: str
    """The rule as the user gave it; lists are in compact JSON."""
    token_ids: tuple[Annotated[int, Field(ge=0)], ...]
    """The resolved ids, ascending; empty for `fixed:N`."""

    @property
    def described(self) -> str:
        """Description for messages."""
        listed = ", ".join(map(str, self.token_ids[:6])) + (", ..." if len(self.token_ids) > 6 else "")
        return f"{self.spec!r} (token ids {listed})" if self.token_ids else repr(self.spec)

    @property
    def fixed_length(self) -> int | None:
        """N of `fixed:N`; None for rules that depend on tokens."""
        return _fixed_length(self.spec)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.token_ids) != sorted(set(self.token_ids)):
            raise ValueError("token_ids must be in ascending order without duplicates")
        try:
            is_fixed = self.fixed_length is not None
        except DataError as error:
            raise ValueError(error.message) from error
        if is_fixed == bool(self.token_ids):
            what = f"rule {self.spec!r} has token_ids {self.token_ids}"
            raise ValueError(f"{what}; fixed:N must have none, and other rules must have some")
        return self


def resolve_rule(spec: str, vocabulary: Vocabulary) -> SegmentRule:
    """Resolve the name of a rule to token ids of one vocabulary.

    Source: He et al. 2024, section 3; `reference` gives LLaMA's ids 869 and 13, which the authors' code uses.

    Args:
        spec: one of `RULE_FORMS`.
        vocabulary: tokenizer of the data.

    Raises:
        DataError: there is no such rule, or the vocabulary has no token for it.
    """
    spec = spec.strip()
    if _fixed_length(spec) is not None:
        return SegmentRule(spec=spec, token_ids=())
    if spec.startswith("["):
        return _resolve_list(spec, vocabulary)
    if spec == "reference":
        return SegmentRule(spec=spec, token_ids=_ids_of_texts([" .", "\n"], spec, vocabulary))
    named: dict[str, Callable[[str], bool]] = {"newline": _has_newline, "sentence": _closes_sentence}
    if spec not in named:
        near = difflib.get_close_matches(spec, ["reference", *named], n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        remedy = f"{hint}Choose one of: {RULE_FORMS}"
        raise DataError(f"{spec!r} is not a segment rule", remedy=remedy, location="--segments")
    token_ids = tuple(token_id for token_id, text in _texts(vocabulary) if named[spec](text))
    if not token_ids:
        raise DataError(
            f"segment rule {spec!r}: none of the vocabulary's {vocabulary.vocab_size} tokens matches it",
            remedy="Choose another rule, or fixed:N",
            location="--segments",
        )
    return SegmentRule(spec=spec, token_ids=token_ids)


def segment_ends(tokens_T: TokenArray, rule: SegmentRule) -> BoolArray:
    """Return True for each token of a document that closes a segment.

    Args:
        tokens_T: ids of the document from its first token, any integer type.
        rule: resolved rule.
    """
    if rule.fixed_length is not None:
        return _every(rule.fixed_length, tokens_T.shape[-1])
    if len(rule.token_ids) <= FEW_IDS:
        ends = np.zeros(tokens_T.shape, dtype=np.bool_)
        for token_id in rule.token_ids:
            ends |= tokens_T == token_id
        return ends
    closes_V = np.zeros(max(rule.token_ids) + 2, dtype=np.bool_)
    closes_V[list(rule.token_ids)] = True
    # "clip" maps larger ids to the last entry, which is False.
    return np.take(closes_V, tokens_T, mode="clip")


def sequence_ends(ends: BoolArray, rule: SegmentRule) -> BoolArray:
    """Return the segment ends of sequences [..., T] for the model.

    For `fixed:N`, segments on disk are counted from the start of a document. This function counts them from the start
    of the sequence, so that ids depend only on the sequence. Other rules need no change.
    """
    if rule.fixed_length is None:
        return ends
    return np.broadcast_to(_every(rule.fixed_length, ends.shape[-1]), ends.shape)


def bilevel_ids(ends: BoolArray, clip: int) -> tuple[IntArray, IntArray]:
    """Return the intra- and inter-segment ids of sequences: (intra, inter), int64 [..., T], both from 0.

    Source: He et al. 2024, section 3; tests/golden holds ids from the authors' code.

    Args:
        ends: [..., T], True where a token closes a segment; every sequence starts a new segment.
        clip: largest intra id (rows of the intra embedding, minus one).
    """
    length = ends.shape[-1]
    position_T = np.arange(length, dtype=np.int32)  # half the memory traffic of int64; sequences are short enough
    starts = np.zeros(ends.shape, dtype=np.int32)
    inter = np.zeros(ends.shape, dtype=np.int64)
    if length > 1:
        before = ends[..., :-1]
        np.cumsum(before, axis=-1, dtype=np.int64, out=inter[..., 1:])
        # Mark each segment start with its position; the running maximum is the latest start up to each token.
        np.multiply(before, position_T[1:], out=starts[..., 1:])
        np.maximum.accumulate(starts, axis=-1, out=starts)
    intra = np.minimum(np.subtract(position_T, starts, out=starts), clip)
    return intra.astype(np.int64), inter


def _every(step: int, length: int) -> BoolArray:
    """Return bool [length], True at every `step`-th position."""
    ends_T = np.zeros(length, dtype=np.bool_)
    ends_T[step - 1 :: step] = True
    return ends_T


def _fixed_length(spec: str) -> int | None:
    if not spec.startswith(FIXED_PREFIX):
        return None
    digits = spec.removeprefix(FIXED_PREFIX)
    if not (digits.isascii() and digits.isdigit() and int(digits) > 0):
        raise DataError(
            f"segment rule {spec!r}: {digits!r} is not a positive integer",
            remedy="Write it like fixed:16",
            location="--segments",
        )
    return int(digits)


def _resolve_list(spec: str, vocabulary: Vocabulary) -> SegmentRule:
    try:
        items = json.loads(spec)
    except json.JSONDecodeError as error:
        raise DataError(
            f"segment rule {spec!r} is not a JSON list ({error.msg} at character {error.pos})",
            remedy='Write it like [13, 869] or ["\\n", " ."]',
            location="--segments",
        ) from error
    canonical = json.dumps(items, ensure_ascii=False, separators=(",", ":"))
    if items and all(type(item) is int for item in items):
        outside = [item for item in items if not 0 <= item < vocabulary.vocab_size]
        if outside:
            raise DataError(
                f"segment rule {canonical}: {outside} are outside a vocabulary of {vocabulary.vocab_size} ids",
                remedy=f"Use ids from 0 to {vocabulary.vocab_size - 1}",
                location="--segments",
            )
        return SegmentRule(spec=canonical, token_ids=tuple(sorted(set(items))))
    if items and all(isinstance(item, str) for item in items):
        return SegmentRule(spec=canonical, token_ids=_ids_of_texts(items, canonical, vocabulary))
    raise DataError(
        f"segment rule {canonical}: the list must contain only token ids or only strings",
        remedy='Write it like [13, 869] or ["\\n", " ."]',
        location="--segments",
    )


def _ids_of_texts(wanted: list[str], spec: str, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Return the ids of all tokens whose text is one of `wanted`; each text must have at least one token."""
    found: dict[str, list[int]] = {text: [] for text in wanted}
    for token_id, text in _texts(vocabulary):
        if text in found:
            found[text].append(token_id)
    absent = [text for text, ids in found.items() if not ids]
    if absent:
        raise DataError(
            f"segment rule {spec!r}: no single token of this vocabulary has the text {', '.join(map(repr, absent))}",
            remedy="Choose another rule (sentence, newline, fixed:N), or list token ids",
            location="--segments",
        )
    return tuple(sorted({token_id for ids in found.values() for token_id in ids}))


def _texts(vocabulary: Vocabulary) -> Iterable[tuple[int, str]]:
    for token_id in range(vocabulary.vocab_size):
        text = vocabulary.text_of(token_id)
        if text is not None:
            yield token_id, text


def _has_newline(text: str) -> bool:
    return "\n" in text


def _closes_sentence(text: str) -> bool:
    closing = all(char in FULL_STOPS or char in CLOSERS or char.isspace() for char in text)
    return closing and any(char in FULL_STOPS or char == "\n" for char in text)


def fixed_length_ends(bounds_D1: IntArray, length: int, start: int, stop: int) -> BoolArray:
    """Return True for every `length`-th token of each document, among the tokens [start, stop) of a dataset.

    Args:
        bounds_D1: first token of each document, and the end of the last.
        length: tokens per segment.
        start: first token.
        stop: end of the tokens.
    """
    ends_T = np.zeros(stop - start, dtype=np.bool_)
    first = max(int(np.searchsorted(bounds_D1, start, side="right")) - 1, 0)
    last = int(np.searchsorted(bounds_D1, stop, side="left"))
    begins_D, limits_D = bounds_D1[first:last], np.minimum(bounds_D1[first + 1 : last + 1], stop)
    closed_D = np.maximum(start - begins_D, 0) // length  # segments that end before `start`
    first_ends_D = begins_D + (closed_D + 1) * length - 1
    counts_D = np.maximum((limits_D - first_ends_D - 1) // length + 1, 0)
    nth = np.arange(int(counts_D.sum())) - np.repeat(np.cumsum(counts_D) - counts_D, counts_D)
    ends_T[np.repeat(first_ends_D, counts_D) + nth * length - start] = True
    return ends_T
