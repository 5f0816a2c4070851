"""Evaluate trained models: perplexity by sequence length on one dataset or several, and fine-tuning tasks.

`follow` evaluates each checkpoint of a run as it appears.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import (
    add_device_options,
    add_picture_options,
    add_trust_option,
    check_model_folder,
    command,
    parse_range,
    pick_device,
    pick_dtype,
    picture_settings,
)
from _evaluation import (
    DEFAULT,
    add_harness_options,
    add_text_options,
    eval_settings,
    harness_settings,
    missing_extra,
    verify_data,
)
from _follow import add_follow
from megatron_bipe.checkpoint.find import find_model
from megatron_bipe.data.prompt_answer import open_text
from megatron_bipe.errors import ConfigError
from megatron_bipe.eval.sequences import (
    PROMPT_BATCH_TOKENS,
    PROTOCOLS,
    check_lengths,
    parse_lengths,
    spread_order,
)
from megatron_bipe.picture import MEASURES
from megatron_bipe.tasks.scrolls.tasks import SEQ_LEN_TOKENS, TASKS, find_task, questions, read_rows

if TYPE_CHECKING:
    from megatron_bipe.eval.generation import Generator

HARNESS_NAME = "harness.json"


@command
def main(argv: Sequence[str] | None) -> None:
    arguments = _parser().parse_args(argv)
    arguments.run(arguments)


def perplexity(given: argparse.Namespace) -> None:
    """Evaluate all models at all lengths; write and print the results."""
    lengths = parse_lengths(given.lengths)
    dataset = open_text(given.data)
    for spec in given.model:
        find_model(spec)
    from megatron_bipe.eval import report
    from megatron_bipe.eval.eval_model import load_eval_models

    settings, picture = eval_settings(given), picture_settings(given)
    report.check_measure(picture.measure, dataset, lengths, settings)
    report.prepare_output(given.output, given.overwrite)
    verify_data(given, [dataset])
    eval_models = load_eval_models(given.model, [dataset], lengths)
    models = [report.evaluate_model(eval_model, dataset, lengths, settings) for eval_model in eval_models]
    print(report.as_table(models))  # before anything is written: the disk may be full
    print(report.coverage_text(dataset, settings, models[0].results), flush=True)
    print("Written:", *report.write_report(given.output, dataset, settings, models, picture))


def extrapolation(given: argparse.Namespace) -> None:
    """Evaluate all models on all datasets at all lengths, by document and position; write the report."""
    lengths = parse_lengths(given.lengths)
    datasets = [open_text(folder) for folder in given.data]
    for spec in given.model:
        find_model(spec)
    from megatron_bipe.eval.document_losses import DOCUMENTS_NAME, write_documents
    from megatron_bipe.eval.eval_model import load_eval_models
    from megatron_bipe.eval.extrapolation import NAMES, evaluate_subset, subset_names, write_extrapolation
    from megatron_bipe.eval.report import check_measure, prepare_output

    settings, picture = eval_settings(given), picture_settings(given)
    for dataset in datasets:
        check_measure(picture.measure, dataset, lengths, settings)
    prepare_output(given.output, given.overwrite, (*NAMES, DOCUMENTS_NAME))
    verify_data(given, datasets)
    eval_models = load_eval_models(given.model, datasets, lengths)
    for dataset in datasets:  # a dataset that is too short fails before anything is run
        check_lengths(settings.select(dataset), lengths, settings.protocol)
    named = zip(subset_names([dataset.path for dataset in datasets]), datasets, strict=True)
    subsets = [evaluate_subset(name, dataset, eval_models, lengths, settings) for name, dataset in named]
    written = write_extrapolation(given.output, settings, subsets, picture)
    if given.documents:
        written.append(write_documents(given.output, subsets))
    print("Written:", *written)


def scrolls(given: argparse.Namespace) -> None:
    """Answer a split of a task with the model; write and print scores, with those of other tasks in the folder."""
    task = find_task(given.task)
    check_model_folder(given.model)
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
        raise missing_extra("rouge_score", "scrolls", error) from error
    prepare_output(given.output, given.overwrite, result_names(task))
    results_table(given.output)  # fails now, not at the end, if results of other tasks are unreadable
    asked = questions(read_rows(given.data, task.name, given.split))
    if given.limit is not None:
        asked = [asked[index] for index in sorted(spread_order(len(asked))[: given.limit])]
    answers = answer(_load_generator(given.model, given), task, asked, given.length, given.batch_tokens)
    about = {
        "split": given.split,
        "num_examples": len(asked),
        "scores": score_answers(task, asked, answers),
        "model": str(given.model),
        "length_tokens": given.length,
        "dtype": given.dtype,
        "limit": given.limit,
    }
    files = write_results(given.output, task, about, answers)
    print(results_table(given.output))
    print("Written:", *files)


def arithmetic(given: argparse.Namespace) -> None:
    """Solve held-out problems with the models; write and print their accuracies."""
    if not given.operators or given.operators.start < 1 or given.problems < 1:
        raise ConfigError(
            "there is nothing to solve", remedy="Use a range such as --operators 1..6", location="--operators"
        )
    for folder in given.model:
        check_model_folder(folder)
    from megatron_bipe.eval.report import prepare_output
    from megatron_bipe.tasks.arithmetic import evaluate as problems

    prepare_output(given.output, given.overwrite, (problems.JSON_NAME, problems.CSV_NAME))
    asked = [problems.held_out_problems(n, given.problems, given.seed) for n in given.operators]
    found = {}
    names = [folder.resolve().name for folder in given.model]
    about = {"seed": given.seed, "dtype": given.dtype, "sources": list(map(str, given.model))}
    for name, folder in zip(names, given.model, strict=True):
        unique = name if names.count(name) == 1 else str(folder)
        found[unique] = problems.measure_accuracies(_load_generator(folder, given), name, asked, given.batch_tokens)
        files = problems.write_results(given.output, about, found)  # of the models so far
    print(problems.as_table(found))
    print("Written:", *files)


def _load_generator(folder: Path, given: argparse.Namespace) -> "Generator":
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from megatron_bipe.eval.generation import load_generator

    disable_progress_bar()
    set_verbosity_error()  # it warns about the training length, which these models may exceed
    device = pick_device(given.device)
    return load_generator(folder, device, pick_dtype(given.dtype, device), given.trust_remote_code)


def harness(given: argparse.Namespace) -> None:
    """Run tasks of lm-evaluation-harness; write and print the results."""
    check_model_folder(given.model)
    from megatron_bipe.eval.report import prepare_output

    try:
        from megatron_bipe.eval.harness import results_table, run_tasks, write_results
    except ImportError as error:
        raise missing_extra("lm-evaluation-harness", "harness", error) from error
    prepare_output(given.output, given.overwrite, (HARNESS_NAME,))
    device = pick_device(given.device)
    settings = harness_settings(given, device, pick_dtype(given.dtype, device))
    results = run_tasks(given.model, given.tasks.split(","), settings)
    print(results_table(results), flush=True)
    write_results(given.output / HARNESS_NAME, given.model, settings, results)
    print("Written:", given.output / HARNESS_NAME)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_perplexity(commands.add_parser("perplexity", help="perplexity by sequence length: JSON, CSV and a plot"))
    _add_extrapolation(
        commands.add_parser("extrapolation", help="the same on several datasets, with intervals, as HTML")
    )
    _add_scrolls(commands.add_parser("scrolls", help="a SCROLLS task: answers, scores and a table"))
    _add_arithmetic(commands.add_parser("arithmetic", help="accuracy by number of operators, modulo 11"))
    _add_harness(commands.add_parser("harness", help="tasks of lm-evaluation-harness"))
    add_follow(commands.add_parser("follow", help="each checkpoint of a run, as it appears"))
    return parser


def _add_perplexity(command: argparse.ArgumentParser) -> None:
    command.description = f"Evaluate perplexity by sequence length. {_protocols()}"
    add = command.add_argument
    add("--model", nargs="+", required=True, metavar="HF_DIR|RUN_DIR[@STEP]", help="exported models or checkpoints")
    add("--data", type=Path, required=True, metavar="DIR", help="dataset folder")
    _add_length_options(command, "perplexity.json, .csv, .png, .pdf and .svg")
    command.set_defaults(run=perplexity)


def _add_extrapolation(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Evaluate perplexity by sequence length and by position in the sequence, with intervals by resampling "
        f"documents, as a page that also shows the paper's figures. {_protocols()}"
    )
    add = command.add_argument
    help_models = "exported models or checkpoints"
    add(
        "--models", "--model", dest="model", nargs="+", required=True, metavar="HF_DIR|RUN_DIR[@STEP]", help=help_models
    )
    add("--data", type=Path, nargs="+", required=True, metavar="DIR", help="dataset folders, such as one per subset")
    documents = "also write documents.csv: the loss of each document at each length, as comparisons of runs need it"
    add("--documents", action="store_true", help=documents)
    _add_length_options(command, "extrapolation.html, .json, .csv, .png, .pdf and .svg")
    command.set_defaults(run=extrapolation)


def _protocols() -> str:
    return "Protocols: " + "; ".join(f"{name} = {meaning}" for name, meaning in PROTOCOLS.items())


def _add_length_options(command: argparse.ArgumentParser, written: str) -> None:
    add = command.add_argument
    add("--lengths", required=True, metavar="N,N,...", help="sequence lengths in tokens; N..M: multiples of N up to M")
    add_text_options(command)
    add("--y", choices=MEASURES, default=MEASURES[0], help=f"what the pictures show {DEFAULT}")
    add_picture_options(command)
    _add_common(command, written)


def _add_scrolls(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Answer a split of a SCROLLS task with an exported model. Results of several tasks in one folder form a table."
    )
    add = command.add_argument
    add("--model", type=Path, required=True, metavar="HF_DIR", help="folder made by tools/export_hf.py")
    add("--task", required=True, metavar="NAME", help=", ".join(TASKS))
    add("--data", type=Path, required=True, metavar="DIR", help="holds NAME/SPLIT.jsonl, or NAME.zip as on the Hub")
    add("--split", default="validation", help=f"validation, or test, which has no outputs {DEFAULT}")
    add("--length", type=int, default=SEQ_LEN_TOKENS, metavar="N", help=f"sequence length of fine-tuning {DEFAULT}")
    add("--limit", type=int, metavar="N", help="only N inputs, spread evenly over the split")
    add("--batch-tokens", type=int, metavar="N", default=PROMPT_BATCH_TOKENS, help=f"maximum tokens at once {DEFAULT}")
    add_trust_option(command)
    _add_common(command, "scores and answers of one or more tasks")
    command.set_defaults(run=scrolls)


def _add_arithmetic(command: argparse.ArgumentParser) -> None:
    command.description = "Solve held-out problems modulo 11 with exported models; only the final number is judged."
    add = command.add_argument
    add("--model", type=Path, nargs="+", required=True, metavar="HF_DIR", help="folders made by tools/export_hf.py")
    add("--operators", type=parse_range, required=True, metavar="N..M", help="numbers of operators, each evaluated")
    add("--problems", type=int, default=200, metavar="N", help=f"problems per number of operators {DEFAULT}")
    add("--seed", type=int, default=0, help=f"seed of the choice of problems {DEFAULT}")
    add("--batch-tokens", type=int, metavar="N", default=PROMPT_BATCH_TOKENS, help=f"maximum tokens at once {DEFAULT}")
    add_trust_option(command)
    _add_common(command, "arithmetic.json and .csv")
    command.set_defaults(run=arithmetic)


def _add_harness(command: argparse.ArgumentParser) -> None:
    command.description = "Run tasks of lm-evaluation-harness on an exported model. Offline, use local task files."
    add = command.add_argument
    add("--model", type=Path, required=True, metavar="HF_DIR", help="folder made by tools/export_hf.py")
    add("--tasks", required=True, metavar="NAME,NAME,...", help="tasks, groups or patterns such as 'lambada*'")
    add_harness_options(command)
    add_trust_option(command)
    _add_common(command, HARNESS_NAME)
    command.set_defaults(run=harness)


def _add_common(command: argparse.ArgumentParser, written: str) -> None:
    """Add the options that every evaluation has."""
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help=f"for {written}")
    add_device_options(command)
    command.add_argument("--overwrite", action="store_true", help="replace the results of an earlier evaluation")


if __name__ == "__main__":
    sys.exit(main())
