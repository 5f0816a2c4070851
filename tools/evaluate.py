"""Evaluate trained models. `perplexity`: against window length, on a dataset made by tools/preprocess.py."""

import argparse
import logging
from pathlib import Path

import torch
from tqdm import tqdm

from _cli import run_tool
from _models import load_subject
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.errors import ConfigError
from megatron_bipe.eval.perplexity import Settings, evaluate_perplexity, limit_tokens
from megatron_bipe.eval.report import ModelResults, as_table, describe, prepare_output, write_report
from megatron_bipe.eval.subject import Subject, check_suits
from megatron_bipe.eval.windows import PROTOCOLS, cut_windows
from megatron_bipe.model.precision import DTYPES
from megatron_bipe.train.hardware import keep_freed_memory

_log = logging.getLogger(__name__)


def main() -> None:
    """Parse the command line and run its subcommand."""
    arguments = _parser().parse_args()
    arguments.run(arguments)


def perplexity(arguments: argparse.Namespace) -> None:
    """Evaluate all models at all lengths; write and print the results."""
    lengths = parse_lengths(arguments.lengths)
    settings = Settings(
        protocol=arguments.protocol,
        max_tokens=arguments.max_tokens,
        batch_tokens=arguments.batch_tokens,
        device=pick_device(arguments.device),
        dtype=DTYPES[arguments.dtype],
    )
    keep_freed_memory(torch.device(settings.device))
    prepare_output(arguments.output, arguments.overwrite)
    dataset = TokenDataset(arguments.data)
    subjects = [load_subject(spec) for spec in arguments.model]
    for subject in subjects:
        check_suits(subject, dataset)
    models = [_evaluate(subject, dataset, lengths, settings) for subject in subjects]
    files = write_report(arguments.output, dataset, settings, models)
    print(as_table(models))
    print(describe(dataset, settings, models[0].results))
    print("Written:", *files)


def parse_lengths(text: str) -> list[int]:
    """`1024,2048` -> [1024, 2048], ascending, each once.

    Raises:
        ConfigError: something else than whole numbers of 2 and more.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and int(part) >= 2)]
    if wrong:
        raise ConfigError(
            f"{', '.join(map(repr, wrong))} is no window length: a whole number of tokens, 2 or more",
            remedy="Write --lengths 1024,2048,4096",
            place="--lengths",
        )
    return sorted(set(map(int, parts)))


def pick_device(name: str) -> str:
    """`auto` -> a GPU where there is one; other names are checked.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r}: {reason}", remedy="Use auto, cpu or cuda", place="--device") from error
    return name


def _evaluate(subject: Subject, dataset: TokenDataset, lengths: list[int], settings: Settings) -> ModelResults:
    available = limit_tokens(dataset, settings.max_tokens)
    cuts = [cut_windows(dataset, available, length, settings.protocol) for length in lengths]
    total = sum(int(windows.num_inputs.sum()) for windows in cuts)
    results = []
    with tqdm(total=total, desc=subject.name, unit=" tokens", unit_scale=True, disable=None) as bar:
        for length in reversed(lengths):  # longest first: what the machine or the model cannot do fails at once
            result = evaluate_perplexity(subject, dataset, length, settings, bar.update)
            bar.set_postfix_str(f"{length}: {result.perplexity:.2f}")
            results.append(result)
    return ModelResults(subject._replace(model=subject.model.cpu()), tuple(reversed(results)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_perplexity(commands.add_parser("perplexity", help="perplexity against window length: JSON, CSV and a plot"))
    return parser


def _add_perplexity(command: argparse.ArgumentParser) -> None:
    command.description = "Perplexity against window length. Protocols: " + "; ".join(
        f"{name} = {meaning}" for name, meaning in PROTOCOLS.items()
    )
    defaults = Settings()
    add = command.add_argument
    add("--model", nargs="+", required=True, metavar="HF_DIR|RUN_DIR[@STEP]", help="exported models or checkpoints")
    add("--data", type=Path, required=True, metavar="DIR", help="dataset folder")
    add("--lengths", required=True, metavar="N,N,...", help="window lengths in tokens")
    add("--output", type=Path, required=True, metavar="DIR", help="for perplexity.json, .csv and .png")
    shown = "(default: %(default)s)"
    add("--protocol", choices=list(PROTOCOLS), default=defaults.protocol, help=f"how the corpus is cut {shown}")
    add("--max-tokens", type=int, metavar="N", help="evaluate on the first N tokens, as if there were no more")
    add("--batch-tokens", type=int, metavar="N", default=defaults.batch_tokens, help=f"tokens a forward pass {shown}")
    add("--dtype", choices=list(DTYPES), default="fp32", help=f"precision the model runs in {shown}")
    add("--device", default="auto", help="auto (the default), cpu, cuda, cuda:1, ...")
    add("--overwrite", action="store_true", help="replace the results of an earlier evaluation")
    command.set_defaults(run=perplexity)


if __name__ == "__main__":
    run_tool(main)
