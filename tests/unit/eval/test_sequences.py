"""Sequences of each protocol against plain arithmetic."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bipe.errors import ConfigError, DataError
from megatron_bipe.eval.sequences import GROUP_DOCUMENTS, cut_sequences, select_text, spread_order
from tests.helpers.errors import raises


class Corpus:
    """What cutting needs of a dataset."""

    path = "corpus"

    def __init__(self, sizes):
        self.bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.num_tokens = int(self.bounds[-1])

    def document_bounds(self):
        return self.bounds


@given(num_tokens=st.integers(3, 400), length=st.integers(2, 50))
def test_cut_windows_full_predicts_every_token_but_the_first_once(num_tokens, length):
    if num_tokens <= length:
        return
    sequences = cut_sequences(Corpus([num_tokens]), num_tokens, length, "full")
    spans = zip((sequences.starts + 1).tolist(), sequences.num_predictions.tolist(), strict=True)
    predicted = [label for first, count in spans for label in range(first, first + count)]
    assert predicted == list(range(1, num_tokens))
    assert sequences.num_inputs.max() == length
    assert (sequences.num_inputs == sequences.num_predictions).all()
    assert sequences.num_tokens == num_tokens


@given(num_tokens=st.integers(3, 400), length=st.integers(2, 50))
def test_cut_windows_sliding_predicts_every_token_once_from_half_a_window(num_tokens, length):
    if num_tokens <= length:
        return
    sequences = cut_sequences(Corpus([num_tokens]), num_tokens, length, "sliding")
    predicted = []
    for start, size, context, count in zip(*(part.tolist() for part in sequences), strict=True):
        assert context + count == size <= length
        assert context == (0 if start == 0 else length - length // 2)
        predicted += range(start + context + 1, start + size + 1)
    assert predicted == list(range(1, num_tokens))
    assert sequences.num_tokens == num_tokens


@given(
    sizes=st.lists(st.integers(0, 3), min_size=1, max_size=3 * GROUP_DOCUMENTS).map(lambda sizes: sizes * 3),
    length=st.integers(2, 60),
)
def test_cut_windows_reference_equals_the_arithmetic_of_the_authors(sizes, length):
    wanted, first = [], 0
    for group in range(0, len(sizes), GROUP_DOCUMENTS):
        in_group = sum(sizes[group : group + GROUP_DOCUMENTS])
        kept = in_group // length * length - length
        wanted += [first + start for start in range(0, kept, length)]
        first += in_group
    corpus = Corpus(sizes)
    if not wanted:
        with raises(DataError, corpus.num_tokens, length, 2 * length, location="corpus", remedy="--lengths"):
            cut_sequences(corpus, corpus.num_tokens, length, "reference")
        return
    sequences = cut_sequences(corpus, corpus.num_tokens, length, "reference")
    assert sequences.starts.tolist() == wanted
    assert set(sequences.num_inputs) == {length} and set(sequences.num_predictions) == {length - 1}
    assert sequences.num_tokens == len(wanted) * length


def test_cut_windows_reference_drops_the_remainder_and_a_block_of_each_group_of_1000():
    corpus = Corpus([1] * 1000 + [1] * 999)  # groups of 1000 and 999 tokens
    sequences = cut_sequences(corpus, corpus.num_tokens, 300, "reference")
    assert sequences.starts.tolist() == [0, 300, 1000, 1300]


@pytest.mark.parametrize("protocol", ["full", "sliding", "reference"])
@pytest.mark.parametrize("length", [1, 0, -5])
def test_cut_windows_length_below_two_is_refused(protocol, length):
    with raises(ConfigError, length, location="--lengths"):
        cut_sequences(Corpus([100]), 100, length, protocol)


@pytest.mark.parametrize(("protocol", "needed"), [("full", 101), ("sliding", 101), ("reference", 200)])
def test_cut_windows_length_longer_than_the_corpus_names_what_is_needed(protocol, needed):
    corpus = Corpus([needed - 1])
    with raises(DataError, needed - 1, needed, 100, location="corpus", remedy="--lengths"):
        cut_sequences(corpus, corpus.num_tokens, 100, protocol)
    with raises(DataError, needed - 1, 10**20, location="corpus"):
        cut_sequences(corpus, corpus.num_tokens, 10**20, protocol)
    corpus = Corpus([needed])
    assert cut_sequences(corpus, corpus.num_tokens, 100, protocol).starts[0] == 0


def test_cut_windows_limit_shorter_than_a_window_names_the_option():
    with raises(DataError, 50, 500, "--max-tokens", 101, location="corpus", remedy="larger --max-tokens"):
        cut_sequences(Corpus([500]), 50, 100, "full")


SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any)


class Numbered(Corpus):
    """Documents that repeat their number."""

    rule = None
    manifest = SimpleNamespace(tokenizer=SimpleNamespace(special_ids={}))

    def __init__(self, sizes):
        super().__init__(sizes)
        self.numbers = np.repeat(np.arange(len(sizes)), sizes)

    def tokens(self, start, stop):
        return self.numbers[start:stop]

    ends = tokens


@given(sizes=SIZES, limit=st.integers(1, 200))
def test_select_text_is_whole_documents_in_order_within_the_limit(sizes, limit):
    dataset = Numbered(sizes)
    text = select_text(dataset, limit)
    tokens = text.tokens(0, text.num_tokens).tolist()
    bounds = text.document_bounds().tolist()
    assert len(tokens) == bounds[-1] == text.num_tokens <= limit
    chosen = [tokens[start] for start in bounds[:-1]] if text is not dataset else list(dict.fromkeys(tokens))
    assert chosen == sorted(set(chosen)) and tokens == [n for n in chosen for _ in range(min(sizes[n], limit))]
    documents = np.flatnonzero(sizes)
    ordered = documents[spread_order(documents.size)].tolist()
    assert sorted(ordered[: len(chosen)]) == chosen
    assert len(chosen) == len(ordered) or text.num_tokens + sizes[ordered[len(chosen)]] > limit
    for start in range(0, text.num_tokens, 3):
        stop = min(start + 7, text.num_tokens)
        assert text.tokens(start, stop).tolist() == tokens[start:stop] == text.ends(start, stop).tolist()


def test_select_text_is_spread_evenly_over_the_dataset():
    dataset = Numbered([5] * 1000)
    for limit in (50, 505, 2500):
        text = select_text(dataset, limit)
        chosen = text.tokens(0, text.num_tokens)[::5]
        assert text.num_tokens == limit
        parts = np.histogram(chosen, bins=10, range=(0, 1000))[0]
        assert parts.max() - parts.min() <= 2


def test_select_text_where_no_document_is_short_enough_begins_one():
    text = select_text(Numbered([50, 50]), 7)
    assert text.num_tokens == 7 and text.is_part_of_one
    assert not select_text(Numbered([50, 50]), 60).is_part_of_one


def test_select_text_drops_documents_of_special_tokens_alone(make_dataset):
    special = {"bos": 1, "eos": 2}
    documents = [[1, 5], [1], [1, 2], [5], [2, 1, 1], [1, 6, 2]]
    dataset = make_dataset(documents)
    dataset.manifest = dataset.manifest.model_copy(
        update={"tokenizer": dataset.manifest.tokenizer.model_copy(update={"special_ids": special})}
    )
    kept, dropped = select_text(dataset, None, "keep"), select_text(dataset, None, "drop")
    assert kept is dataset
    assert dropped.tokens(0, dropped.num_tokens).tolist() == [1, 5, 5, 2, 1, 1, 1, 6, 2]
    assert dropped.document_bounds().tolist() == [0, 2, 3, 6, 9]
    assert select_text(make_dataset([[5, 6], [7]], name="full"), None, "drop").num_tokens == 3
