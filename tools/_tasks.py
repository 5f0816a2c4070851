"""Commands of `evaluate.py` that score the answers of a fine-tuned model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from _cli import check_model_folder, parse_range
from _device import add_device_options, pick_device, pick_dtype
from megatron_bipe.errors import ConfigError
from megatron_bipe.eval.options import PROMPT_BATCH_TOKENS
from megatron_bipe.tasks.scrolls.files import questions, read_rows
from megatron_bipe.tasks.scrolls.tasks import SEQ_LEN_TOKENS, TASKS, find_task

if TYPE_CHECKING:
    from megatron_bipe.eval.generation import Generator
    from megatron_bipe.tasks.arithmetic.evaluate import Accuracy


def scrolls(arguments: argparse.Namespace) -> None:
    """Answer a split of a task with the model; write and print scores, with those of other tasks in the folder."""
    task = find_task(arguments.task)
    check_model_folder(arguments.model)
    from megatron_bipe.eval.report import prepare_output

    try:
        from megatron_bipe.tasks.scrolls.evaluate import (
            answer,
            result_names,
            results_table,
            score_answers,
            write_results,
        )
    except ImportError as error:
        raise ConfigError(
            f"rouge_score cannot be imported: {error}",
            remedy="Install it: pip install -e '.[scrolls]'",
            location="evaluate.py scrolls",
        ) from error
    prepare_output(arguments.output, arguments.overwrite, result_names(task))
    results_table(arguments.output)  # fails now, not at the end, if results of other tasks are unreadable
    asked = questions(read_rows(arguments.data, task.name, arguments.split))[: arguments.limit]
    generator = _load(arguments.model, arguments)
    with tqdm(total=len(asked), desc=task.name, unit=" answers", disable=None) as bar:
        answers = answer(generator, task, asked, arguments.length, arguments.batch_tokens, bar.update)
    about = {
        "split": arguments.split,
        "num_examples": len(asked),
        "scores": score_answers(task, asked, answers),
        "model": str(arguments.model),
        "length_tokens": arguments.length,
        "dtype": arguments.dtype,
        "limit": arguments.limit,
    }
    files = write_results(arguments.output, task, about, answers)
    print(results_table(arguments.output))
    print("Written:", *files)


def _load(folder: Path, arguments: argparse.Namespace) -> "Generator":
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from megatron_bipe.eval.generation import load_generator

    disable_progress_bar()
    set_verbosity_error()  # it warns about the training length, which these models may exceed
    device = pick_device(arguments.device)
    return load_generator(folder, device, pick_dtype(arguments.dtype, device))


def add_scrolls(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Answer a split of a SCROLLS task with an exported model. Results of several tasks in one folder form a table."
    )
    add, shown = command.add_argument, "(default: %(default)s)"
    add("--model", type=Path, required=True, metavar="HF_DIR", help="folder made by tools/export_hf.py")
    add("--task", required=True, metavar="NAME", help=", ".join(TASKS))
    add("--data", type=Path, required=True, metavar="DIR", help="holds NAME/SPLIT.jsonl, or NAME.zip as on the Hub")
    add("--split", default="validation", help=f"validation, or test, which has no outputs {shown}")
    add("--output", type=Path, required=True, metavar="DIR", help="for scores and answers of one or more tasks")
    add("--length", type=int, default=SEQ_LEN_TOKENS, metavar="N", help=f"sequence length of fine-tuning {shown}")
    add("--limit", type=int, metavar="N", help="only the first N inputs")
    add("--batch-tokens", type=int, metavar="N", default=PROMPT_BATCH_TOKENS, help=f"maximum tokens at once {shown}")
    add_device_options(command)
    add("--overwrite", action="store_true", help="replace the results of an earlier evaluation")
    command.set_defaults(run=scrolls)


def arithmetic(arguments: argparse.Namespace) -> None:
    """Solve held-out problems with the models; write and print their accuracies."""
    if not arguments.operators or arguments.operators.start < 1 or arguments.problems < 1:
        raise ConfigError(
            "there is nothing to solve", remedy="Use a range such as --operators 1..6", location="--operators"
        )
    for folder in arguments.model:
        check_model_folder(folder)
    from megatron_bipe.eval.report import prepare_output
    from megatron_bipe.tasks.arithmetic import evaluate as problems

    prepare_output(arguments.output, arguments.overwrite, (problems.JSON_NAME, problems.CSV_NAME))
    asked = [problems.held_out_problems(n, arguments.problems, arguments.seed) for n in arguments.operators]
    found: dict[str, list[Accuracy]] = {}
    names = [folder.resolve().name for folder in arguments.model]
    about = {"seed": arguments.seed, "dtype": arguments.dtype, "sources": list(map(str, arguments.model))}
    for name, folder in zip(names, arguments.model, strict=True):
        generator = _load(folder, arguments)
        with tqdm(total=sum(map(len, asked)), desc=name, unit=" problems", disable=None) as bar:
            found[name if names.count(name) == 1 else str(folder)] = [
                problems.solve_all(generator, each, arguments.batch_tokens, bar.update) for each in asked
            ]
        files = problems.write_results(arguments.output, about, found)  # of the models so far
    print(problems.as_table(found))
    print("Written:", *files)


def add_arithmetic(command: argparse.ArgumentParser) -> None:
    command.description = "Solve held-out problems modulo 11 with exported models; only the final number is judged."
    add, shown = command.add_argument, "(default: %(default)s)"
    add("--model", type=Path, nargs="+", required=True, metavar="HF_DIR", help="folders made by tools/export_hf.py")
    add("--operators", type=parse_range, required=True, metavar="N..M", help="numbers of operators, each evaluated")
    add("--problems", type=int, default=200, metavar="N", help=f"problems per number of operators {shown}")
    add("--seed", type=int, default=0, help=f"seed of the choice of problems {shown}")
    add("--output", type=Path, required=True, metavar="DIR", help="for arithmetic.json and .csv")
    add("--batch-tokens", type=int, metavar="N", default=PROMPT_BATCH_TOKENS, help=f"maximum tokens at once {shown}")
    add_device_options(command)
    add("--overwrite", action="store_true", help="replace the results of an earlier evaluation")
    command.set_defaults(run=arithmetic)
