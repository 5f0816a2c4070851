"""Segment rules against vocabularies, and both ids against a plain loop and the authors' golden outputs."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from megatron_bipe.data.segments import SegmentRule, bilevel_ids, resolve_rule, segment_ends, sequence_ends
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.errors import DataError
from tests.helpers.errors import raises
from tests.helpers.paths import LLAMA, ORACLE

REPOSITORY = Path(__file__).parents[3]
GOLDEN = REPOSITORY / "tests" / "golden" / "bilevel_ids.npz"
FULL = ORACLE / "bilevel_ids" / "cases.npz"
REFERENCE = SegmentRule(spec="reference", token_ids=(13, 869))


class Words:
    """Vocabulary of given texts; None for tokens without one."""

    def __init__(self, *texts: str | None) -> None:
        self.texts = texts
        self.vocab_size = len(texts)

    def text_of(self, token_id: int) -> str | None:
        return self.texts[token_id]


WORDS = Words(None, " .", ".", "\n", "a", "..", '."', "a.", "\n\n", " \n", '"', " ", ".)", "b\n", "。", "\r", ".\n")


def loop_ids(ends: list[bool], clip: int) -> tuple[list[int], list[int]]:
    intra, inter, position, segment = [], [], 0, 0
    for end in ends:
        intra.append(min(position, clip))
        inter.append(segment)
        position, segment = (0, segment + 1) if end else (position + 1, segment)
    return intra, inter


def check_golden(path: Path, num_cases: int) -> None:
    with np.load(path) as arrays:
        cases = sorted({name.split("_")[0] for name in arrays.files})
        assert len(cases) == num_cases
        for case in cases:
            ends = segment_ends(arrays[f"{case}_ids"], REFERENCE)
            intra, inter = bilevel_ids(ends, clip=1023)
            np.testing.assert_array_equal(intra, arrays[f"{case}_intra"])
            np.testing.assert_array_equal(inter, arrays[f"{case}_inter"])
            np.testing.assert_array_equal(bilevel_ids(ends, clip=10**6)[0], arrays[f"{case}_intra_unclipped"])
            for row, (intra_T, inter_T) in enumerate(
                zip(intra, inter, strict=True)
            ):  # a single sequence, as in a batch
                alone = bilevel_ids(ends[row], clip=1023)
                assert np.array_equal(alone[0], intra_T) and np.array_equal(alone[1], inter_T)


def test_bilevel_ids_of_golden_cases_equal_the_authors() -> None:
    check_golden(GOLDEN, 11)


@pytest.mark.skipif(not FULL.exists(), reason="the full set of golden ids is not next to the repository")
def test_bilevel_ids_of_all_cases_equal_the_authors() -> None:
    check_golden(FULL, 25)


@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=40)), st.integers(0, 50))
def test_bilevel_ids_equal_a_plain_loop(ends: np.ndarray, clip: int) -> None:
    intra, inter = bilevel_ids(ends, clip)
    assert (intra.dtype, inter.dtype) == (np.int64, np.int64)
    assert intra.shape == inter.shape == ends.shape
    for position in np.ndindex(ends.shape[:-1]):
        expected = loop_ids(ends[position].tolist(), clip)
        assert (intra[position].tolist(), inter[position].tolist()) == expected


def test_bilevel_ids_leave_their_input_alone() -> None:
    ends = np.array([False, True, False])
    ends.flags.writeable = False
    bilevel_ids(ends, 5)


@given(
    st.lists(st.integers(0, 40), max_size=50),
    st.sampled_from(["<u2", "<i4", "<i8"]),
    st.sets(st.integers(0, 70_000) | st.integers(0, 40), min_size=1, max_size=6),
)
def test_segment_ends_by_ids_equal_a_plain_loop(tokens: list[int], dtype: str, ids: set[int]) -> None:
    rule = SegmentRule(spec="list", token_ids=tuple(sorted(ids)))
    ends = segment_ends(np.array(tokens, dtype), rule)
    assert ends.dtype == np.bool_
    assert ends.tolist() == [token in ids for token in tokens]


@given(st.integers(0, 40), st.integers(1, 45))
def test_segment_ends_of_a_fixed_length_equal_a_plain_loop(count: int, length: int) -> None:
    ends = segment_ends(np.zeros(count, "<u2"), SegmentRule(spec=f"fixed:{length}", token_ids=()))
    assert ends.tolist() == [(position + 1) % length == 0 for position in range(count)]


def test_sequence_ends_of_a_fixed_length_restart_with_the_sequence() -> None:
    stored = np.array([[True, False, False, True, False], [False, True, False, False, True]])
    ends = sequence_ends(stored, SegmentRule(spec="fixed:3", token_ids=()))
    assert ends.tolist() == [[False, False, True, False, False]] * 2


def test_sequence_ends_of_separators_are_those_stored() -> None:
    stored = np.array([[True, False], [False, True]])
    assert sequence_ends(stored, REFERENCE) is stored


@pytest.mark.parametrize(
    ("spec", "token_ids"),
    [
        ("reference", (1, 3)),
        ("newline", (3, 8, 9, 13, 16)),
        ("sentence", (1, 2, 3, 5, 6, 8, 9, 12, 14, 16)),
        (" reference ", (1, 3)),
        ("[4, 2, 4]", (2, 4)),
        ('["a", "\\n"]', (3, 4)),
        ("fixed:16", ()),
    ],
)
def test_resolve_rule_of_every_form_gives_the_ids(spec: str, token_ids: tuple[int, ...]) -> None:
    assert resolve_rule(spec, WORDS).token_ids == token_ids


def test_resolve_rule_takes_every_token_of_a_text() -> None:
    assert resolve_rule("reference", Words("\n", " .", None, "\n")).token_ids == (0, 1, 3)


def test_resolve_rule_writes_lists_in_one_way() -> None:
    assert resolve_rule("[ 2,\n 4 ]", WORDS) == resolve_rule("[2,4]", WORDS)
    assert resolve_rule('["\\u000a"]', WORDS).spec == '["\\n"]'


def test_segment_rule_fixed_length_is_that_of_its_spec() -> None:
    assert resolve_rule("fixed:16", WORDS).fixed_length == 16
    assert resolve_rule("newline", WORDS).fixed_length is None


@pytest.mark.parametrize(
    ("spec", "observed", "remedy"),
    [
        ("sentense", ["'sentense'"], "sentence?"),
        ("", ["''"], "reference"),
        ("fixed:0", ["fixed:0", "'0'"], "fixed:16"),
        ("fixed:-3", ["fixed:-3", "'-3'"], "fixed:16"),
        ("fixed:", ["fixed:", "''"], "fixed:16"),
        ("fixed:²", ["fixed:²", "'²'"], "fixed:16"),
        ("[1, 2", ["[1, 2", 5], "[13, 869]"),
        ("[]", ["[]"], "[13, 869]"),
        ('[1, "a"]', ['[1,"a"]'], "[13, 869]"),
        ("[true]", ["[true]"], "[13, 869]"),
        ("[1.5]", ["[1.5]"], "[13, 869]"),
        ("[17]", ["[17]", 17], "16"),
        ("[-1, 3]", ["[-1,3]", "[-1]", 17], "16"),
        ('["a", "zebra", "yak"]', ["'zebra', 'yak'"], "fixed:N"),
    ],
)
def test_resolve_rule_that_is_none_is_refused_with_the_reason(spec: str, observed: list[object], remedy: str) -> None:
    with raises(DataError, *observed, location="--segments", remedy=remedy):
        resolve_rule(spec, WORDS)


@pytest.mark.parametrize(
    ("texts", "spec", "observed"),
    [
        (("\n", "."), "reference", "' .'"),
        ((" .", "."), "reference", "'\\n'"),
        (("a", None), "newline", 2),
        (("a", '"'), "sentence", 2),
    ],
)
def test_resolve_rule_on_a_vocabulary_without_its_tokens_is_refused(
    texts: tuple[str | None, ...], spec: str, observed: object
) -> None:
    with raises(DataError, f"'{spec}'", observed, location="--segments", remedy="fixed:N"):
        resolve_rule(spec, Words(*texts))


@pytest.mark.parametrize(
    ("spec", "token_ids"),
    [("newline", ()), ("fixed:4", (1,)), ("newline", (2, 1)), ("newline", (1, 1)), ("newline", (-1,)), ("fixed:x", ())],
)
def test_segment_rule_that_contradicts_itself_is_refused(spec: str, token_ids: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError):
        SegmentRule(spec=spec, token_ids=token_ids)


@pytest.mark.skipif(not LLAMA.exists(), reason="the LLaMA tokenizer is not next to the repository")
@pytest.mark.parametrize("definition", ["tokenizer.json", "tokenizer.model"])
def test_resolve_rule_on_llamas_vocabulary_gives_the_published_ids(definition: str) -> None:
    llama = load_tokenizer(LLAMA / definition)
    assert resolve_rule("reference", llama).token_ids == (13, 869)
    assert resolve_rule("newline", llama).token_ids == (13,)
    sentence = resolve_rule("sentence", llama).token_ids
    assert {13, 869, 29889} < set(sentence)
    assert {"..", '."', ".)", " ."} < {llama.text_of(token_id) for token_id in sentence}
    letters = [token_id for token_id in sentence if any(char.isalnum() for char in llama.text_of(token_id) or "")]
    assert letters == []
