"""Train, evaluate and export three models from raw text on one machine in minutes, and write a report page.

Every step is a command of this project that you can run yourself. It is shown before it runs, its full output is kept,
and a step whose result exists is skipped, so an interrupted quickstart resumes. The last printed line is the path of
the page.
"""

import argparse
import csv
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from _cli import command
from _steps import FROM_TEXT_TO_DATA, TRAIN_EACH, TRAIN_EACH_ALONE, Pattern, Stage, fill, run_steps, run_values
from megatron_bipe.config.load import load_run_config
from megatron_bipe.eval.quickstart_results import RISE_RATIOS, extrapolation_effect
from megatron_bipe.eval.quickstart_results import STRETCHES as JUDGED
from megatron_bipe.io import write_atomically

CONFIG = Path("examples/quickstart.yaml")
CORPUS = "--max-bytes 2000000 --valid-share 0.1"  # twice as much text as the training reads
ENCODINGS = ("bipe_rope", "bipe_alibi", "rope")
STRETCHES = (1, 2, 3, 4, 6, 8)  # evaluated lengths, as multiples of the training length
PROMPTS = ("The default value is", "def __init__(self, name):")
PAGE = "report.html"

EVALUATE = Pattern(
    "Evaluate at 1 to 8 times the training length",
    "python tools/evaluate.py perplexity --model {runs} --data {out}/data/valid --lengths {lengths} "
    "--max-tokens 60000 --output {out}/evaluation",
    "evaluation/perplexity.csv",
)
EXPORT = Pattern(
    "Export {each}",
    "python tools/export_hf.py --checkpoint {out}/runs/{each} --output {out}/exported/{each}",
    "exported/{each}/config.json",
    together=True,
)
GENERATE = Pattern(
    "Generate a few lines with bipe_rope",
    "python tools/generate.py --model {out}/exported/bipe_rope --max-new-tokens 60 --output {out}/generated.txt "
    "--prompt {prompts}",
    "generated.txt",
)


@command
def main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to pretrain.py")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.output
    trained_tokens = load_run_config(CONFIG, arguments.set).train.seq_len_tokens
    run_steps(plan(folder, arguments.set), folder)
    summarise(folder, trained_tokens)


def plan(folder: Path, settings: list[str]) -> list[Stage]:
    """Return all stages in order; all models are trained at once, one on two ranks under ZeRO-2.

    Ranks wait for each other, and a starting process waits for the disk, so three trainings at once take less time
    than one after the other.
    """
    run = load_run_config(CONFIG, settings)
    values = run_values(CONFIG, settings, CORPUS) | {
        "lengths": ",".join(str(stretch * run.train.seq_len_tokens) for stretch in STRETCHES),
        "runs": " ".join(shlex.quote(f"{folder}/runs/{encoding}") for encoding in ENCODINGS),
        "prompts": shlex.join(PROMPTS),
    }
    first, *others = ENCODINGS
    on_two_ranks, alone = fill([TRAIN_EACH], folder, values, [first]), fill([TRAIN_EACH_ALONE], folder, values, others)
    return [
        *fill(FROM_TEXT_TO_DATA, folder, values, ()),
        [step for stage in (*on_two_ranks, *alone) for step in stage],
        *fill([EVALUATE], folder, values, ()),
        *fill([EXPORT], folder, values, ENCODINGS),
        *fill([GENERATE], folder, values, ()),
    ]


def summarise(folder: Path, trained_tokens: int) -> None:
    """Write the report page; print the results and their paths."""
    from megatron_bipe.eval.quickstart_page import quickstart_page

    table = folder / "evaluation" / "perplexity.csv"
    perplexities = read_column(table, "perplexity")
    text = verdict(read_column(table, "nats_per_token"), trained_tokens)
    write_atomically(folder / PAGE, quickstart_page(folder, text, PROMPTS).encode())
    print("\nPerplexity on held-out text\n")
    lengths = sorted(next(iter(perplexities.values())))
    print("tokens".ljust(12) + "".join(f"{length:>9}" for length in lengths))
    for encoding, by_length in perplexities.items():
        print(encoding.ljust(12) + "".join(f"{by_length[length]:9.2f}" for length in lengths))
    print("\n" + text + "\n")
    for what, where in {
        "results": "evaluation/perplexity.json, .csv, .png",
        "models": "exported/*  (AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True))",
        "runs": "runs/*  (metrics.jsonl, tensorboard/, checkpoints/)",
        "data": "data/train, data/valid  (python tools/inspect_data.py show DIR)",
        "logs": "logs/*",
    }.items():
        print(f"{what:>8}  {folder}/{where}")
    print(f"\nAll results on one page, for a browser:\n{folder / PAGE}")


def read_column(path: Path, column: str) -> dict[str, dict[int, float]]:
    """Return encoding -> length -> value of a column of the evaluation's CSV file."""
    result: dict[str, dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            result.setdefault(row["encoding"], {})[int(row["length_tokens"])] = float(row[column])
    return result


def verdict(nats: dict[str, dict[int, float]], trained_tokens: int) -> str:
    """Describe how losses change beyond the training length, and whether this shows the paper's effect."""
    effect = extrapolation_effect(nats, trained_tokens)
    lines = []
    for index, stretch in enumerate(JUDGED):
        rises = {encoding: f"{rises[index]:+.3f}" for encoding, rises in effect.rises_nats.items()}
        lines.append(
            f"At {stretch * trained_tokens} tokens, {stretch} times the training length, the loss has changed by "
            f"{rises['rope']} nats a token with RoPE, {rises['bipe_rope']} with BiPE-RoPE, "
            f"{rises['bipe_alibi']} with BiPE-ALiBi."
        )
    twice, four_times = RISE_RATIOS
    lines.append(
        "Beyond the training length RoPE gets worse and the bilevel encodings hold: the effect of the paper."
        if effect.shows
        else f"The effect of the paper does NOT show in this run: RoPE's rise should be {twice:g} and {four_times:g} "
        "times BiPE-RoPE's, and BiPE-ALiBi's loss should not rise."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
