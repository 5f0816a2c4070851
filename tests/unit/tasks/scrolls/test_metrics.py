"""Scores against the official implementation's own examples, and common differences between implementations."""

import pytest

pytest.importorskip("rouge_score", reason="rouge_score is not installed")

from megatron_bipe.tasks.scrolls.evaluate import MAIN, exact_match, f1, normalise, score

# Inputs and results are those in the documentation of the benchmark's metric (tau/scrolls, metrics/scrolls.py).
PREDICTIONS = ["exact match example", "hello there", "general kenobi"]
REFERENCES = [["exact match example"], ["hello", "hi there"], ["commander kenobi"]]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("rouge", {"rouge1": 72.2222, "rouge2": 33.3333, "rougeL": 72.2222, "geometric_mean": 55.8136}),
        ("exact_match", {"exact_match": 33.3333}),
        ("f1", {"f1": 72.2222}),
    ],
)
def test_scores_are_those_of_the_official_examples(metric, expected):
    found = score(metric, PREDICTIONS, REFERENCES)
    assert {name: round(value, 4) for name, value in found.items()} == expected
    assert MAIN[metric] in found


def test_rouge_is_without_stemming_and_takes_the_best_reference_for_each_kind():
    assert score("rouge", ["runs"], [["running"]])["rouge1"] == 0
    # One reference has the better unigrams, the other the better bigram.
    found = score("rouge", ["a b c d"], [["d c b a", "a b x y z w"]])
    assert found["rouge1"] == pytest.approx(100)
    assert found["rouge2"] == pytest.approx(100 * 2 * (1 / 3) * (1 / 5) / (1 / 3 + 1 / 5))


def test_rouge_geometric_mean_is_of_the_means():
    found = score("rouge", ["x y", "q"], [["x y"], ["r"]])
    assert found == {"rouge1": 50, "rouge2": 50, "rougeL": 50, "geometric_mean": pytest.approx(50)}


def test_texts_are_normalised_as_squad_does():
    assert normalise("The  U.S.A., an 'answer' -- a thing\n") == "usa answer thing"
    assert normalise("theatre another") == "theatre another"
    assert exact_match("The Answer.", "answer") == 1
    assert exact_match("answers", "answer") == 0


def test_f1_counts_repeated_words_once_each_and_is_0_where_nothing_is_shared():
    assert f1("x x y", "x y y") == pytest.approx(2 / 3)
    assert f1("the", "a") == 0  # both are empty once normalised: SQuAD 2's 1 is not SCROLLS's
    assert f1("", "x") == 0
    assert score("f1", [""], [["x", ""]]) == {"f1": 0}
