"""The command `tools/evaluate.py follow`: its options, and the evaluations that they ask for."""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import add_device_options, add_trust_option
from _evaluation import (
    DEFAULT,
    add_harness_options,
    add_text_options,
    eval_settings,
    harness_settings,
    missing_extra,
    verify_data,
)
from megatron_bipe.config import RunConfig, load_run_config
from megatron_bipe.data.prompt_answer import open_dataset, open_text
from megatron_bipe.errors import FAILED, CheckpointError, ConfigError
from megatron_bipe.eval.sequences import parse_lengths

if TYPE_CHECKING:
    from megatron_bipe.data.dataset import TokenDataset
    from megatron_bipe.eval.follow import Evaluation
    from megatron_bipe.eval.perplexity import EvalSettings

KINDS = ("perplexity", "harness", "generate")
_log = logging.getLogger(__name__)


def add_follow(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Evaluate each checkpoint of a run as it appears, in another process or on another machine that sees the run "
        "folder, and append the results to RUN_DIR/evaluations.jsonl. Ends when the run is done; exit code 75: asked "
        "to stop before. The same command continues, and makes no evaluation twice."
    )
    add = command.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR", help="folder of the run")
    add("--every", type=int, default=1, metavar="N", help="only steps that are a multiple of N (default: all)")
    add(
        "--do", type=_kinds, default=["perplexity"], metavar="KIND,...", help=f"{', '.join(KINDS)} (default: the first)"
    )
    sets = "the run's validation sets, and of each the text that its validations read"
    add("--data", type=Path, nargs="+", metavar="DIR", help=f"dataset folders (default: {sets})")
    lengths = "sequence lengths in tokens (default: those of the run's validations)"
    add("--lengths", metavar="N,N,...", help=lengths)
    add_text_options(command)
    add("--tasks", metavar="NAME,NAME,...", help="tasks, groups or patterns of lm-evaluation-harness")
    add_harness_options(command)
    add("--prompt", nargs="+", metavar="TEXT", help="texts to continue")
    add("--max-new-tokens", type=int, default=60, metavar="N", help=f"longest continuation {DEFAULT}")
    add("--temperature", type=float, default=0.0, help="0: greedy, which shows changes of the model only (%(default)s)")
    add("--seed", type=int, default=0, help=f"seed of the sampling {DEFAULT}")
    add("--threads", type=int, default=1, metavar="N", help=f"CPU threads, which training may need more {DEFAULT}")
    add("--poll-s", type=float, default=30.0, metavar="S", help=f"seconds between looks for checkpoints {DEFAULT}")
    until = command.add_mutually_exclusive_group()
    until.add_argument("--once", action="store_true", help="end when all checkpoints that exist are evaluated")
    until.add_argument("--keep-going", action="store_true", help="do not end when the run is done")
    add_device_options(command, dtype=None)
    add_trust_option(command)
    command.set_defaults(run=follow_run)


def _kinds(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))


def follow_run(given: argparse.Namespace) -> None:
    """Evaluate each checkpoint of a run until the run is done; exit with 75 if asked to stop before."""
    _check_options(given)
    if not (given.run_dir / "config.yaml").is_file():
        raise CheckpointError(
            "this is not the folder of a run: it has no config.yaml",
            remedy="Name the run_dir of a run that has started",
            location=given.run_dir,
        )
    run = load_run_config(given.run_dir / "config.yaml")
    from megatron_bipe.eval.follow import Pace, follow
    from megatron_bipe.runtime.preemption import EXIT_RESUMABLE, StopRequest

    evaluations = _evaluations(given, run)
    stop_request = StopRequest()
    stop_request.install_handlers()
    pace = Pace(given.every, given.poll_s, given.once, given.keep_going)
    failed = follow(given.run_dir, evaluations, pace, stop_request.poll)
    for text in failed:
        _log.error("not evaluated: %s", text)
    if stop_request.reason:
        _log.info("stopped by %s; the same command continues", stop_request.reason)
        sys.exit(EXIT_RESUMABLE)
    sys.exit(FAILED if failed else 0)


def _check_options(given: argparse.Namespace) -> None:
    """Raise `ConfigError` for options that are missing or impossible, before anything slow is imported."""
    unknown = [kind for kind in given.do if kind not in KINDS]
    if unknown or not given.do:
        raise ConfigError(
            f"{','.join(given.do)!r}: the kinds are {', '.join(KINDS)}", remedy="Name some of them", location="--do"
        )
    for kind, option, value in (("harness", "--tasks", given.tasks), ("generate", "--prompt", given.prompt)):
        if bool(value) != (kind in given.do):
            what = f"--do {kind} has no {option}" if kind in given.do else f"{option} is only for --do {kind}"
            raise ConfigError(what, remedy=f"Give both or neither of --do {kind} and {option}", location=option)
    for option, number in (
        ("--every", given.every),
        ("--threads", given.threads),
        ("--max-new-tokens", given.max_new_tokens),
    ):
        if number < 1:
            raise ConfigError(f"{option} is {number}", remedy="Give 1 or more", location=option)
    if not given.temperature >= 0:
        raise ConfigError(f"--temperature is {given.temperature}", remedy="Give 0 or more", location="--temperature")
    if given.lengths:
        parse_lengths(given.lengths)
    if not given.poll_s > 0:
        raise ConfigError(f"--poll-s is {given.poll_s:g}", remedy="Give more than 0", location="--poll-s")


def _evaluations(given: argparse.Namespace, run: RunConfig) -> "list[Evaluation]":
    """Return what is evaluated of each checkpoint, after all checks that are possible before there is one."""
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from megatron_bipe.eval import follow_kinds
    from megatron_bipe.eval.generation import Sampling

    disable_progress_bar()
    set_verbosity_error()
    given.dtype = given.dtype or run.train.precision
    settings, found = eval_settings(given), []
    if settings.device == "cpu":
        torch.set_num_threads(given.threads)
    if "perplexity" in given.do:
        datasets = _datasets(given, run)
        lengths = parse_lengths(given.lengths) if given.lengths else sorted(set(run.valid_lengths))
        is_validation = not given.data and given.max_tokens is None
        limited = settings._replace(max_tokens=run.valid_tokens) if is_validation else settings
        found += follow_kinds.perplexities(given.run_dir, run, datasets, lengths, limited)
        verify_data(given, [*datasets.values()])
    if "harness" in given.do:
        found += _harness_evaluations(given, settings)
    if "generate" in given.do:
        sampling = Sampling(given.max_new_tokens, given.temperature, given.seed, settings.device, settings.dtype)
        found += follow_kinds.continuations(given.prompt, sampling)
    return found


def _datasets(given: argparse.Namespace, run: RunConfig) -> "dict[str, TokenDataset]":
    """Return the datasets of --data by the names of their folders, or the validation sets of the run that are text."""
    from megatron_bipe.eval.extrapolation import subset_names

    if given.data:
        return {name: open_text(folder) for name, folder in zip(subset_names(given.data), given.data, strict=True)}
    opened = {name: open_dataset(folder) for name, folder in run.data.valid_sets.items()}
    texts = {name: dataset for name, dataset in opened.items() if dataset.manifest.examples is None}
    if not texts:
        raise ConfigError(
            f"the run has {len(opened)} validation sets, and none of text to evaluate perplexity on",
            remedy="Name dataset folders with --data, or other kinds with --do",
            location="--data",
        )
    if len(texts) < len(opened):
        skipped = ", ".join(opened.keys() - texts.keys())
        _log.warning("validation sets of prompts and answers have no perplexity of text and are skipped: %s", skipped)
    return texts


def _harness_evaluations(given: argparse.Namespace, settings: "EvalSettings") -> "list[Evaluation]":
    try:
        from megatron_bipe.eval.harness import find_tasks
    except ImportError as error:
        raise missing_extra("lm-evaluation-harness", "harness", error) from error
    from megatron_bipe.eval.follow_kinds import harness_tasks

    tasks, run_with = given.tasks.split(","), harness_settings(given, settings.device, settings.dtype)
    return harness_tasks(tasks, run_with, find_tasks(tasks, run_with))
