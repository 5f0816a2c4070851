"""Evaluate trained models: perplexity by sequence length on one dataset or several, and tasks that they answer."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from _cli import check_model_folder, command
from _device import add_device_options, pick_device, pick_dtype
from _tasks import add_arithmetic, add_scrolls
from megatron_bipe.checkpoint.find import find_model
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.prompt_answer import open_text
from megatron_bipe.errors import ConfigError
from megatron_bipe.eval.options import DEFAULT_PROTOCOL, EVAL_BATCH_TOKENS
from megatron_bipe.eval.sequences import PROTOCOLS, cut_sequences
from megatron_bipe.io import write_atomically

if TYPE_CHECKING:
    from megatron_bipe.eval.eval_model import EvalModel
    from megatron_bipe.eval.extrapolation_results import Subset
    from megatron_bipe.eval.perplexity import Settings
    from megatron_bipe.eval.report import ModelResults

HARNESS_NAME = "harness.json"
_log = logging.getLogger(__name__)


@command
def main(argv: Sequence[str] | None) -> None:
    arguments = _parser().parse_args(argv)
    arguments.run(arguments)


def perplexity(arguments: argparse.Namespace) -> None:
    """Evaluate all models at all lengths; write and print the results."""
    lengths = parse_lengths(arguments.lengths)
    dataset = open_text(arguments.data)
    for spec in arguments.model:
        find_model(spec)
    from megatron_bipe.eval.eval_model import check_compatible, check_length
    from megatron_bipe.eval.model_loading import load_eval_model
    from megatron_bipe.eval.report import as_table, describe, prepare_output, write_report

    settings = _settings(arguments)
    prepare_output(arguments.output, arguments.overwrite)
    subjects = [load_eval_model(spec) for spec in arguments.model]
    for eval_model in subjects:
        check_compatible(eval_model, dataset)
        check_length(eval_model, lengths[-1])
    models = [_evaluate(eval_model, dataset, lengths, settings) for eval_model in subjects]
    files = write_report(arguments.output, dataset, settings, models)
    print(as_table(models))
    print(describe(dataset, settings, models[0].results))
    print("Written:", *files)


def extrapolation(arguments: argparse.Namespace) -> None:
    """Evaluate all models on all datasets at all lengths, by document and position; write the report."""
    lengths = parse_lengths(arguments.lengths)
    datasets = [open_text(folder) for folder in arguments.data]
    for spec in arguments.model:
        find_model(spec)
    from megatron_bipe.eval.eval_model import check_compatible, check_length
    from megatron_bipe.eval.extrapolation import NAMES, write_extrapolation
    from megatron_bipe.eval.extrapolation_results import subset_names
    from megatron_bipe.eval.model_loading import load_eval_model
    from megatron_bipe.eval.perplexity import limit_tokens
    from megatron_bipe.eval.report import prepare_output, unique_names

    settings = _settings(arguments)
    prepare_output(arguments.output, arguments.overwrite, NAMES)
    subjects = [load_eval_model(spec) for spec in arguments.model]
    for eval_model, dataset in product(subjects, datasets):
        check_compatible(eval_model, dataset)
        check_length(eval_model, lengths[-1])
        for length in lengths:  # a dataset that is too short fails before anything is run
            cut_sequences(dataset, limit_tokens(dataset, settings.max_tokens), length, settings.protocol)
    names = unique_names([(eval_model, ()) for eval_model in subjects])
    evaluated = zip(subset_names([dataset.path for dataset in datasets]), datasets, strict=True)
    subsets = [_evaluate_subset(name, dataset, names, subjects, lengths, settings) for name, dataset in evaluated]
    files = write_extrapolation(arguments.output, settings, subsets)
    print("Written:", *files)


def harness(arguments: argparse.Namespace) -> None:
    """Run tasks of lm-evaluation-harness; write and print the results."""
    check_model_folder(arguments.model)
    from megatron_bipe.eval.report import prepare_output

    try:
        from lm_eval.utils import make_table

        from megatron_bipe.eval.harness import HarnessSettings, run_tasks
    except ImportError as error:
        raise ConfigError(
            f"lm-evaluation-harness cannot be imported: {error}",
            remedy="Install it: pip install -e '.[harness]'",
            location="evaluate.py harness",
        ) from error
    prepare_output(arguments.output, arguments.overwrite, (HARNESS_NAME,))
    device = pick_device(arguments.device)
    settings = HarnessSettings(
        include_path=arguments.include,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        max_length_tokens=arguments.max_length,
        device=device,
        dtype=str(pick_dtype(arguments.dtype, device)).removeprefix("torch."),
    )
    results = run_tasks(arguments.model, arguments.tasks.split(","), settings)
    kept = {key: results[key] for key in ("results", "versions", "n-shot", "n-samples", "configs", "samples")}
    text = json.dumps({"model": str(arguments.model), "settings": settings._asdict(), **kept}, indent=2, default=str)
    write_atomically(arguments.output / HARNESS_NAME, text.encode() + b"\n")
    print(make_table(results))
    print("Written:", arguments.output / HARNESS_NAME)


def parse_lengths(text: str) -> list[int]:
    """Parse `1024,2048` as [1024, 2048], ascending, each once; `1024..4096` is all multiples of 1024 up to 4096."""
    parts = [length for part in text.split(",") for length in _multiples(part.strip())]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and int(part) >= 2)]
    if wrong:
        raise ConfigError(
            f"{', '.join(map(repr, wrong))} is not a sequence length: a whole number of tokens, 2 or more",
            remedy="Write --lengths 1024,2048,4096 or 1024..8192",
            location="--lengths",
        )
    return sorted(set(map(int, parts)))


def _multiples(text: str) -> list[str]:
    """Expand `8..32` to 8, 16, 24, 32; return anything else unchanged."""
    first, dots, last = text.partition("..")
    if not (dots and all(bound.isascii() and bound.isdigit() for bound in (first, last))):
        return [text]
    return [str(length) for length in range(int(first), int(last) + 1, int(first) or 1)] or [text]


def _evaluate(
    eval_model: "EvalModel", dataset: TokenDataset, lengths: list[int], settings: "Settings"
) -> "ModelResults":
    from megatron_bipe.eval.perplexity import evaluate_perplexity, limit_tokens
    from megatron_bipe.eval.report import ModelResults

    available = limit_tokens(dataset, settings.max_tokens)
    cuts = [cut_sequences(dataset, available, length, settings.protocol) for length in lengths]
    total = sum(int(sequences.num_inputs.sum()) for sequences in cuts)
    results = []
    with tqdm(total=total, desc=eval_model.name, unit=" tokens", unit_scale=True, disable=None) as bar:
        for length in reversed(lengths):  # longest first, so that a length that is too large fails at once
            result = evaluate_perplexity(eval_model, dataset, length, settings, bar.update)
            bar.set_postfix_str(f"{length}: {result.perplexity:.2f}")
            results.append(result)
    return ModelResults(eval_model._replace(model=eval_model.model.cpu()), tuple(reversed(results)))


def _evaluate_subset(
    subset: str,
    dataset: TokenDataset,
    names: list[str],
    subjects: "list[EvalModel]",
    lengths: list[int],
    settings: "Settings",
) -> "Subset":
    from megatron_bipe.eval.document_losses import evaluate_documents
    from megatron_bipe.eval.extrapolation_results import Line, Subset

    lines = []
    for name, eval_model in zip(names, subjects, strict=True):
        results = []
        with tqdm(desc=f"{name} on {subset}", unit=" tokens", unit_scale=True, disable=None) as bar:
            for length in reversed(lengths):  # longest first, as in `perplexity`
                results.append(evaluate_documents(eval_model, dataset, length, settings, bar.update))
                bar.set_postfix_str(f"{length}: {results[-1].perplexity:.2f}")
        eval_model.model.cpu()
        known = (
            name,
            eval_model.source,
            eval_model.config.encoding,
            eval_model.config.train_len_tokens,
        )
        lines.append(Line(*known, tuple(reversed(results))))
    return Subset(subset, dataset.manifest.fingerprint, tuple(lines))


def _settings(arguments: argparse.Namespace) -> "Settings":
    import torch

    from megatron_bipe.eval.perplexity import Settings
    from megatron_bipe.runtime.hardware import keep_freed_memory

    device = pick_device(arguments.device)
    settings = Settings(
        protocol=arguments.protocol,
        max_tokens=arguments.max_tokens,
        batch_tokens=arguments.batch_tokens,
        device=device,
        dtype=pick_dtype(arguments.dtype, device),
    )
    keep_freed_memory(torch.device(device))
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_perplexity(commands.add_parser("perplexity", help="perplexity by sequence length: JSON, CSV and a plot"))
    _add_extrapolation(
        commands.add_parser("extrapolation", help="the same on several datasets, with intervals, as HTML")
    )
    add_scrolls(commands.add_parser("scrolls", help="a SCROLLS task: answers, scores and a table"))
    add_arithmetic(commands.add_parser("arithmetic", help="accuracy by number of operators, modulo 11"))
    _add_harness(commands.add_parser("harness", help="tasks of lm-evaluation-harness"))
    return parser


def _add_harness(command: argparse.ArgumentParser) -> None:
    command.description = "Run tasks of lm-evaluation-harness on an exported model. Offline, use local task files."
    add, shown = command.add_argument, "(default: %(default)s)"
    add("--model", type=Path, required=True, metavar="HF_DIR", help="folder made by tools/export_hf.py")
    add("--tasks", required=True, metavar="NAME,NAME,...", help="tasks, groups or patterns such as 'lambada*'")
    add("--output", type=Path, required=True, metavar="DIR", help=f"for {HARNESS_NAME}")
    add("--include", type=Path, metavar="DIR", help="folder of your own task files")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    add("--limit", type=int, metavar="N", help="only the first N samples of each task")
    add("--batch-size", type=int, default=8, metavar="N", help=f"requests per forward pass {shown}")
    add("--max-length", type=int, metavar="N", help="longest input in tokens (default: the training length)")
    add_device_options(command)
    add("--overwrite", action="store_true", help="replace the results of an earlier evaluation")
    command.set_defaults(run=harness)


def _add_perplexity(command: argparse.ArgumentParser) -> None:
    command.description = f"Evaluate perplexity by sequence length. {_protocols()}"
    add = command.add_argument
    add("--model", nargs="+", required=True, metavar="HF_DIR|RUN_DIR[@STEP]", help="exported models or checkpoints")
    add("--data", type=Path, required=True, metavar="DIR", help="dataset folder")
    _add_length_options(command, "perplexity.json, .csv and .png")
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
    _add_length_options(command, "extrapolation.html, .png, .json and .csv")
    command.set_defaults(run=extrapolation)


def _protocols() -> str:
    return "Protocols: " + "; ".join(f"{name} = {meaning}" for name, meaning in PROTOCOLS.items())


def _add_length_options(command: argparse.ArgumentParser, written: str) -> None:
    add, shown = command.add_argument, "(default: %(default)s)"
    add("--lengths", required=True, metavar="N,N,...", help="sequence lengths in tokens; N..M: multiples of N up to M")
    add("--output", type=Path, required=True, metavar="DIR", help=f"for {written}")
    add("--protocol", choices=list(PROTOCOLS), default=DEFAULT_PROTOCOL, help=f"how the corpus is cut {shown}")
    add("--max-tokens", type=int, metavar="N", help="evaluate on the first N tokens, as if there were no more")
    add("--batch-tokens", type=int, metavar="N", default=EVAL_BATCH_TOKENS, help=f"tokens per forward pass {shown}")
    add_device_options(command)
    add("--overwrite", action="store_true", help="replace the results of an earlier evaluation")


if __name__ == "__main__":
    sys.exit(main())
