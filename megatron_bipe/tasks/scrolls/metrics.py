"""Scores of SCROLLS in percent; with several references the best score counts.

Source: Shaham et al. 2022, section 3.4; F1 and exact match on texts normalised as in SQuAD (Rajpurkar et al. 2016),
ROUGE from Google's `rouge_score` without stemming.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from rouge_score.rouge_scorer import RougeScorer

from megatron_bipe.tasks.scrolls.tasks import Metric

ROUGES = ("rouge1", "rouge2", "rougeL")
MAIN = {"f1": "f1", "exact_match": "exact_match", "rouge": "geometric_mean"}  # a task's own score by metric
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def score(metric: Metric, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the mean scores over all predictions of a task; `MAIN` names the task's own score.

    Args:
        metric: metric of the task.
        predictions: at least one.
        references: at least one per prediction.
    """
    if metric == "rouge":
        return _rouge(predictions, references)
    one = {"f1": f1, "exact_match": exact_match}[metric]
    return {metric: 100 * _mean([_best_score(one, *pair) for pair in zip(predictions, references, strict=True)])}


def normalise(text: str) -> str:
    """Lower-case a text and remove punctuation, articles and redundant white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """Return 1 if both texts are equal after normalisation, else 0."""
    return float(normalise(prediction) == normalise(reference))


def f1(prediction: str, reference: str) -> float:
    """Return the harmonic mean of word precision and recall, 0 to 1; 0 if no word is common, even if both are empty."""
    found, wanted = normalise(prediction).split(), normalise(reference).split()
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def _rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    scorer = RougeScorer(list(ROUGES), use_stemmer=False)
    scored = [scorer.score_multi(wanted, found) for found, wanted in zip(predictions, references, strict=True)]
    means = {kind: 100 * _mean([scores[kind].fmeasure for scores in scored]) for kind in ROUGES}
    product = means["rouge1"] * means["rouge2"] * means["rougeL"]
    return means | {"geometric_mean": product ** (1 / 3)}


def _best_score(one: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    return max(one(prediction, reference) for reference in references)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
