"""A model's answers to a split of a SCROLLS task, their scores, and a folder that gathers those of all tasks.

DIR/TASK.json               scores and how they came about
DIR/TASK.predictions.json   {id: answer}, as the benchmark's evaluator takes it
DIR/scrolls.csv             Task, ID, Prediction of all tasks that are there of the split that was answered last: what
                            is submitted once all seven are
"""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_bipe.errors import DataError
from megatron_bipe.eval.generation import Generator, Limits, generate
from megatron_bipe.eval.text_table import text_table
from megatron_bipe.io import write_atomically
from megatron_bipe.tasks.scrolls.files import Question
from megatron_bipe.tasks.scrolls.metrics import MAIN, score
from megatron_bipe.tasks.scrolls.tasks import TASKS, Prompter, Task

SUBMISSION_NAME = "scrolls.csv"
COLUMNS = ("Task", "ID", "Prediction")


def result_names(task: Task) -> tuple[str, str]:
    """Files of a task: scores, and predictions."""
    return f"{task.name}.json", f"{task.name}.predictions.json"


def answer(
    generator: Generator,
    task: Task,
    asked: Sequence[Question],
    length_tokens: int,
    batch_tokens: int,
    advance: Callable[[int], object] | None = None,
) -> dict[str, str]:
    """The model's answer to each question, by its id.

    Args:
        generator: a model fine-tuned for the task.
        task: that it is.
        asked: inputs; whether they can be scored is found out before anything is generated.
        length_tokens: window that prompts and answers share, as in training.
        batch_tokens: as `Limits` has it.
        advance: told the answers that have been given.

    Raises:
        DataError: nothing is asked, the window is too short for any prompt, or as `have_outputs`.
    """
    have_outputs(asked)
    if not asked:
        raise DataError(f"the split has no examples of {task.name}", remedy="Name another", location="--data")
    prompts = Prompter(task, length_tokens, generator.tokenizer).prompts([question.input for question in asked])
    found = generate(generator, prompts, Limits(task.form.answer_tokens, batch_tokens), advance)
    return {question.id: generator.tokenizer.decode(ids).strip() for question, ids in zip(asked, found, strict=True)}


def have_outputs(asked: Sequence[Question]) -> bool:
    """Whether answers can be scored; in a test split they cannot.

    Raises:
        DataError: some inputs have outputs, and others not.
    """
    without = [question.id for question in asked if not question.outputs]
    if 0 < len(without) < len(asked):
        raise DataError(
            f"{len(without)} of {len(asked)} inputs have no output, {without[0]!r} the first",
            remedy="Fetch the file again",
            location="--data",
        )
    return not without


def score_answers(task: Task, asked: Sequence[Question], answers: Mapping[str, str]) -> dict[str, float] | None:
    """Scores in percent, the task's own as `score`; None where there are no outputs to compare with.

    Raises:
        DataError: as `have_outputs`.
    """
    if not have_outputs(asked):
        return None
    scores = score(task.metric, [answers[question.id] for question in asked], [q.outputs for q in asked])
    return scores | {"score": scores[MAIN[task.metric]]}


def write_results(folder: Path, task: Task, about: Mapping[str, Any], answers: Mapping[str, str]) -> list[Path]:
    """Write a task's two files, and the file of all tasks anew.

    Args:
        folder: of the results; made by `prepare_output`.
        task: whose they are.
        about: JSON, `split`, `scores` and `limit` in it.
        answers: by id.
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
    """A row for each task that the folder has results of; the benchmark's mean where it has all, of one whole split.

    Raises:
        DataError: what is there are no results.
    """
    found = _results(folder)
    rows = [("task", "split", "examples", "metric", "score")]
    for name, result in found.items():
        shown = "no outputs" if result.score is None else f"{result.score:.2f}"
        part = "the first " if result.limited else ""
        rows.append((name, result.split, f"{part}{result.num_examples:,}", result.metric, shown))
    scores = [result.score for result in found.values() if result.score is not None and not result.limited]
    if len(scores) == len(TASKS) and len({result.split for result in found.values()}) == 1:
        rows.append(("mean", "", "", "", f"{sum(scores) / len(scores):.2f}"))
    return text_table(rows)


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
    """What the folder has of each task, in the benchmark's order."""
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
    return DataError(what, remedy="Remove them, or name another --output", location=folder)


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
