"""Answers of a model to a split of a SCROLLS task, their scores, and a folder with the results of all tasks.

DIR/TASK.json               scores and settings of the evaluation
DIR/TASK.predictions.json   {id: answer}, the format of the benchmark's evaluator
DIR/scrolls.csv             Task, ID, Prediction of all tasks evaluated on the split of the latest evaluation; the
                            submission file once it has all seven tasks

Scores are in percent; with several references the best score counts.

Source: Shaham et al. 2022, section 3.4; F1 and exact match on texts normalised as in SQuAD (Rajpurkar et al. 2016),
ROUGE from Google's `rouge_score` without stemming.
"""

import csv
import io
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rouge_score.rouge_scorer import RougeScorer
from tqdm import tqdm

from megatron_bipe.errors import DataError
from megatron_bipe.eval.generation import Generator, Limits, generate_batches
from megatron_bipe.io import write_atomically
from megatron_bipe.tasks.scrolls.tasks import TASKS, Metric, Prompter, Question, Task
from megatron_bipe.text_table import text_table

SUBMISSION_NAME = "scrolls.csv"
COLUMNS = ("Task", "ID", "Prediction")
ROUGES = ("rouge1", "rouge2", "rougeL")
MAIN = {"f1": "f1", "exact_match": "exact_match", "rouge": "geometric_mean"}  # a task's own score by metric
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def result_names(task: Task) -> tuple[str, str]:
    return f"{task.name}.json", f"{task.name}.predictions.json"


def answer(
    generator: Generator,
    task: Task,
    asked: Sequence[Question],
    length_tokens: int,
    batch_tokens: int,
) -> dict[str, str]:
    """Generate the model's answer to each question, by its id; progress is shown on a terminal.

    Args:
        generator: model fine-tuned for the task.
        task: the task.
        asked: inputs; `have_outputs` checks them before anything is generated.
        length_tokens: sequence length for prompt and answer together, as in training.
        batch_tokens: as in `Limits`.

    Raises:
        DataError: there are no questions, the sequence is too short for any prompt, or as in `have_outputs`.
    """
    have_outputs(asked)
    if not asked:
        raise DataError(f"the split has no examples of {task.name}", remedy="Use another split", location="--data")
    prompts = Prompter(task, length_tokens, generator.tokenizer).prompts([question.input for question in asked])
    with tqdm(total=len(asked), desc=task.name, unit=" answers", disable=None) as bar:
        found = generate_batches(generator, prompts, Limits(task.form.answer_tokens, batch_tokens), bar.update)
    return {question.id: generator.tokenizer.decode(ids).strip() for question, ids in zip(asked, found, strict=True)}


def have_outputs(asked: Sequence[Question]) -> bool:
    """Return True if answers can be scored, False for a test split.

    Raises:
        DataError: only some inputs have outputs.
    """
    without = [question.id for question in asked if not question.outputs]
    if 0 < len(without) < len(asked):
        raise DataError(
            f"{len(without)} of {len(asked)} inputs have no output; the first of them is {without[0]!r}",
            remedy="Download the file again",
            location="--data",
        )
    return not without


def score_answers(task: Task, asked: Sequence[Question], answers: Mapping[str, str]) -> dict[str, float] | None:
    """Return scores in percent, the task's own as `score`; None without outputs to compare with.

    Raises:
        DataError: as in `have_outputs`.
    """
    if not have_outputs(asked):
        return None
    scores = score(task.metric, [answers[question.id] for question in asked], [q.outputs for q in asked])
    return scores | {"score": scores[MAIN[task.metric]]}


def write_results(folder: Path, task: Task, about: Mapping[str, Any], answers: Mapping[str, str]) -> list[Path]:
    """Write a task's two files and rewrite the file of all tasks.

    Args:
        folder: folder of results, created by `prepare_output`.
        task: the task.
        about: JSON fields that include `split`, `scores` and `limit`.
        answers: answers by id.
    """
    results, predictions = (folder / name for name in result_names(task))
    write_atomically(predictions, _json(answers))
    write_atomically(results, _json({"task": task.name, "metric": MAIN[task.metric], **about}))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    splits = {name: result.split for name, result in _results(folder).items()}
    for name, each in _read_all(folder, 1).items():
        if splits.get(name) == about["split"]:
            writer.writerows((name, id_, prediction) for id_, prediction in each.items())
    write_atomically(folder / SUBMISSION_NAME, text.getvalue().encode())
    return [results, predictions, folder / SUBMISSION_NAME]


def results_table(folder: Path) -> str:
    """Return a row per task with results; with the benchmark's mean if all tasks used one full split.

    Raises:
        DataError: the folder's results cannot be read.
    """
    found = _results(folder)
    rows = [("task", "split", "examples", "metric", "score")]
    for name, result in found.items():
        shown = "no outputs" if result.score is None else f"{result.score:.2f}"
        part = " spread evenly" if result.limited else ""
        rows.append((name, result.split, f"{result.num_examples:,}{part}", result.metric, shown))
    scores = [result.score for result in found.values() if result.score is not None and not result.limited]
    if len(scores) == len(TASKS) and len({result.split for result in found.values()}) == 1:
        rows.append(("mean", "", "", "", f"{sum(scores) / len(scores):.2f}"))
    return text_table(rows, head=1)


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


class _Result(NamedTuple):
    split: str
    num_examples: int
    metric: str
    score: float | None  # percent
    limited: bool  # to the first examples of the split


def _results(folder: Path) -> dict[str, _Result]:
    found = {}
    for name, content in _read_all(folder, 0).items():
        try:
            scores = content["scores"]
            score_percent = None if scores is None else float(scores["score"])
            about = content["split"], content["num_examples"], content["metric"]
            found[name] = _Result(*about, score_percent, content["limit"] is not None)
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(folder, f"{name}: {error!r}") from error
    return found


def _read_all(folder: Path, kind: int) -> dict[str, Any]:
    """Return one file of every task in the folder, in the benchmark's order; `kind` 0: scores, 1: predictions."""
    paths = {name: folder / result_names(task)[kind] for name, task in TASKS.items()}
    found = {}
    for name, path in paths.items():
        try:
            if path.exists():
                found[name] = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise _unreadable(folder, f"{name}: {error}") from error
    return found


def _unreadable(folder: Path, why: str) -> DataError:
    what = f"results of an earlier evaluation cannot be read: {why}"
    return DataError(what, remedy="Remove them, or choose another --output", location=folder)


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


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
