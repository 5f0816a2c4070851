"""The scores of SCROLLS, in percent; of several references the best one counts.

Source: Shaham et al. 2022, section 3.4; F1 and exact match on texts normalised as by SQuAD's (Rajpurkar et al. 2016),
ROUGE by Google's `rouge_score` without stemming.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from rouge_score.rouge_scorer import RougeScorer

from megatron_bipe.tasks.scrolls.tasks import Metric

ROUGES = ("rouge1", "rouge2", "rougeL")
MAIN = {"f1": "f1", "exact_match": "exact_match", "rouge": "geometric_mean"}  # of the scores of a metric, the task's
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def score(metric: Metric, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of all predictions of a task; `MAIN` says which is the task's.

    Args:
        metric: of the task.
        predictions: at least one.
        references: of each prediction, at least one.
    """
    if metric == "rouge":
        return _rouge(predictions, references)
    one = {"f1": f1, "exact_match": exact_match}[metric]
    return {metric: 100 * _mean([_best(one, *pair) for pair in zip(predictions, references, strict=True)])}


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and white space that separates nothing."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """1 where both are the same once normalised, else 0."""
    return float(normalise(prediction) == normalise(reference))


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words, 0 to 1; 0 where none is shared, even if there are none."""
    found, wanted = normalise(prediction).split(), normalise(reference).split()
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def _rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    scorer = RougeScorer(list(ROUGES), use_stemmer=False)
    scored = [scorer.score_multi(wanted, found) for found, wanted in zip(predictions, references, strict=True)]
    means = {kind: 100 * _mean([scores[kind].fmeasure for scores in scored]) for kind in ROUGES}
    product = means["rouge1"] * means["rouge2"] * means["rougeL"]
    return means | {"geometric_mean": product ** (1 / 3)}


def _best(one: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    return max(one(prediction, reference) for reference in references)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
