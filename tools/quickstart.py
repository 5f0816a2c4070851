"""The whole line on one machine, in minutes: text that is already there, to three trained and exported models.

Every step is a command of this project that you can type yourself; it is shown before it runs, its full output is
kept, and a step whose result exists is not done again, so an interrupted quickstart goes on where it stopped.
"""

import argparse
import csv
import shlex
import time
from itertools import takewhile
from pathlib import Path

from _cli import run_tool
from _steps import FROM_TEXT_TO_DATA, TRAIN_EACH, Pattern, Stage, fill, run_steps, run_values
from megatron_bipe.config.load import load_run_config

CONFIG = Path("examples/quickstart.yaml")
ENCODINGS = ("bipe_rope", "bipe_alibi", "rope")
BAND = 0.05  # how much worse than at the training length still counts as holding
STRETCHES = (1, 2, 3, 4, 6, 8)  # evaluated lengths, in training lengths

STEPS = (
    *FROM_TEXT_TO_DATA,
    TRAIN_EACH,
    Pattern(
        "Evaluate at 1 to 8 times the training length",
        "python tools/evaluate.py perplexity --model {runs} --data {out}/data/valid --lengths {lengths} "
        "--max-tokens 100000 --output {out}/evaluation",
        "evaluation/perplexity.png",
    ),
    Pattern(
        "Export {each}",
        "python tools/export_hf.py --checkpoint {out}/runs/{each} --output {out}/exported/{each}",
        "exported/{each}/config.json",
    ),
    Pattern(
        "Generate a few lines with bipe_rope",
        "python tools/generate.py --model {out}/exported/bipe_rope --max-new-tokens 60 --output {out}/generated.txt "
        "--prompt 'The default value is' 'def __init__(self, name):'",
        "generated.txt",
    ),
)


def main() -> None:
    """Run all steps, then say what came out and where it lies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to pretrain.py")
    arguments = parser.parse_args()
    folder: Path = arguments.output
    begin = time.monotonic()
    run_steps(plan(folder, arguments.set), folder)
    summarise(folder, (time.monotonic() - begin) / 60)


def plan(folder: Path, settings: list[str]) -> list[Stage]:
    """All steps in order, with their values filled in."""
    run = load_run_config(CONFIG, settings)
    values = run_values(CONFIG, settings) | {
        "lengths": ",".join(str(stretch * run.train.seq_len_tokens) for stretch in STRETCHES),
        "runs": " ".join(shlex.quote(f"{folder}/runs/{encoding}") for encoding in ENCODINGS),
    }
    return fill(STEPS, folder, values, ENCODINGS)


def summarise(folder: Path, minutes: float) -> None:
    """What came out, honestly, and where everything lies."""
    perplexities = read_perplexities(folder / "evaluation" / "perplexity.csv")
    print(f"\nPerplexity on held-out text ({minutes:.1f} minutes in this call)\n")
    lengths = sorted(next(iter(perplexities.values())))
    print("tokens".ljust(12) + "".join(f"{length:>9}" for length in lengths))
    for encoding, by_length in perplexities.items():
        print(encoding.ljust(12) + "".join(f"{by_length[length]:9.2f}" for length in lengths))
    print("\n" + verdict(perplexities) + "\n")
    for what, where in {
        "plot": "evaluation/perplexity.png",
        "results": "evaluation/perplexity.json, .csv",
        "models": "exported/*  (AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True))",
        "runs": "runs/*  (metrics.jsonl, tensorboard/, checkpoints/)",
        "data": "data/train, data/valid  (python tools/inspect_data.py show DIR)",
        "logs": "logs/*",
    }.items():
        print(f"{what:>8}  {folder}/{where}")


def read_perplexities(path: Path) -> dict[str, dict[int, float]]:
    """Encoding -> length -> perplexity, from the evaluation's table."""
    result: dict[str, dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            result.setdefault(row["encoding"], {})[int(row["length_tokens"])] = float(row["perplexity"])
    return result


def verdict(perplexities: dict[str, dict[int, float]]) -> str:
    """Up to which length each model holds its perplexity, and whether that is the paper's effect."""
    reaches = {name: reach(by_length) for name, by_length in perplexities.items()}
    told = ", ".join(f"{name} up to {length} tokens" for name, length in reaches.items())
    shows = min(length for name, length in reaches.items() if name.startswith("bipe_")) > reaches["rope"]
    effect = (
        "The bilevel models reach further than RoPE" if shows else "The bilevel models do NOT reach further than RoPE"
    )
    return (
        f"Within {BAND:.0%} of the perplexity at the training length: {told}.\n{effect}"
        f"{', the effect of the paper.' if shows else ' in this run: the effect of the paper does not show.'}"
    )


def reach(by_length: dict[int, float]) -> int:
    """The longest length up to which perplexity never leaves the band above that of the shortest one."""
    lengths = sorted(by_length)
    limit = by_length[lengths[0]] * (1 + BAND)
    return max(takewhile(lambda length: by_length[length] <= limit, lengths))


if __name__ == "__main__":
    run_tool(main)
