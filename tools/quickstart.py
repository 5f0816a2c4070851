"""The whole line on one machine, in minutes: text that is already there, to three trained and exported models.

Every step is a command of this project that you can type yourself; it is shown before it runs, its full output is
kept, and a step whose result exists is not done again, so an interrupted quickstart goes on where it stopped.
"""

import argparse
import csv
import os
import shlex
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from _cli import run_tool
from megatron_bipe.config.load import load_run_config
from megatron_bipe.errors import BipeError

CONFIG = Path("examples/quickstart.yaml")
ENCODINGS = ("bipe_rope", "bipe_alibi", "rope")
BAND = 0.05  # how much worse than at the training length still counts as holding
STRETCHES = (1, 2, 3, 4, 6, 8)  # evaluated lengths, in training lengths
NOISE = ("[20", "Warning:", "  return func(", "  warn")  # log lines of the launcher, warnings of libraries

# Title, command, and the file that exists once it has succeeded; {each} stands for every encoding in turn.
STEPS = (
    ("Collect text of this machine", "python tools/corpus.py --output {out}/raw", "raw/valid.jsonl.zst"),
    (
        "Train a tokenizer",
        "python tools/train_tokenizer.py --input {out}/raw/train.jsonl.zst --vocab-size {vocab} "
        "--output {out}/tokenizer",
        "tokenizer/tokenizer.json",
    ),
    (
        "Tokenize the training text and mark its segments",
        "python tools/preprocess.py --input {out}/raw/train.jsonl.zst --tokenizer {out}/tokenizer "
        "--output {out}/data/train --workers 2",
        "data/train/manifest.json",
    ),
    (
        "Tokenize the held-out text",
        "python tools/preprocess.py --input {out}/raw/valid.jsonl.zst --tokenizer {out}/tokenizer "
        "--output {out}/data/valid --workers 2",
        "data/valid/manifest.json",
    ),
    (
        "Train {each}",
        "deepspeed --num_accelerators 2 pretrain.py --ds_config ds_configs/zero2.json --config {config} "
        "--set run_dir={out}/runs/{each} --set model.encoding={each} "
        "--set data.path={out}/data/train --set data.valid_path={out}/data/valid {settings}",
        "runs/{each}/checkpoints/step-{steps:08d}",
    ),
    (
        "Evaluate at 1 to 8 times the training length",
        "python tools/evaluate.py perplexity --model {runs} --data {out}/data/valid --lengths {lengths} "
        "--max-tokens 100000 --output {out}/evaluation",
        "evaluation/perplexity.png",
    ),
    (
        "Export {each}",
        "python tools/export_hf.py --checkpoint {out}/runs/{each} --output {out}/exported/{each}",
        "exported/{each}/config.json",
    ),
    (
        "Generate a few lines with bipe_rope",
        "python tools/generate.py --model {out}/exported/bipe_rope --max-new-tokens 60 --output {out}/generated.txt "
        "--prompt 'The default value is' 'def __init__(self, name):'",
        "generated.txt",
    ),
)


class Step(NamedTuple):
    """One command, and the file that exists once it has succeeded."""

    title: str
    command: list[str]
    result: Path


def main() -> None:
    """Run all steps, then say what came out and where it lies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to pretrain.py")
    arguments = parser.parse_args()
    folder: Path = arguments.output
    begin = time.monotonic()
    planned = plan(folder, arguments.set)
    for number, step in enumerate(planned, 1):
        run_step(step, f"{number}/{len(planned)}", folder / "logs")
    summarise(folder, (time.monotonic() - begin) / 60)


def plan(folder: Path, settings: list[str]) -> list[Step]:
    """All steps in order, with their values filled in."""
    run = load_run_config(CONFIG, settings)
    values = {
        "out": shlex.quote(str(folder)),
        "config": CONFIG,
        "vocab": run.model.vocab_size,
        "steps": run.train.steps,
        "settings": " ".join(f"--set {shlex.quote(setting)}" for setting in settings),
        "lengths": ",".join(str(stretch * run.train.seq_len_tokens) for stretch in STRETCHES),
        "runs": " ".join(shlex.quote(f"{folder}/runs/{encoding}") for encoding in ENCODINGS),
    }
    result = []
    for title, command, made in STEPS:
        for encoding in ENCODINGS if "{each}" in title else ("",):
            filled = [text.format(**values, each=encoding) for text in (title, command, made)]
            result.append(Step(filled[0], shlex.split(filled[1]), folder / filled[2]))
    return result


def run_step(step: Step, number: str, logs: Path) -> None:
    """Run one command unless its result is there; show its progress, keep its whole output.

    Raises:
        BipeError: it failed; names its log.
    """
    print(f"\n[{number}] {step.title}", flush=True)
    if step.result.exists():
        print(f"    done before: {step.result}", flush=True)
        return
    print("    $ " + shlex.join(step.command), flush=True)
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{number.partition('/')[0]:0>2}-{step.title.replace(' ', '_').replace(',', '')}.log"
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    begin = time.monotonic()
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process,
    ):
        for line in process.stdout or ():
            file.write(line)
            if not any(noise in line for noise in NOISE) and line.strip():
                print("    " + line.rstrip(), flush=True)
    if process.returncode != 0 or not step.result.exists():
        raise BipeError(
            f"the command left with exit code {process.returncode} and did not make {step.result}",
            remedy="Read its whole output, mend the cause, and run the quickstart again: finished steps are kept",
            place=log,
        )
    print(f"    {time.monotonic() - begin:.0f} s", flush=True)


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
