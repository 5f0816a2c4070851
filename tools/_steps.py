"""Commands of this project, one after the other: each is shown, its full output kept, and nothing done twice."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_bipe.config.load import load_run_config
from megatron_bipe.errors import BipeError

_NOISE = ("[20", "Warning:", "  return func(", "  warn")  # log lines of the launcher, warnings of libraries


class Step(NamedTuple):
    """One command, and the file that exists once it has succeeded."""

    title: str
    command: list[str]
    result: Path


# Title, command, and the file that exists once it has succeeded; {each} stands for every one of several in turn.
Pattern = tuple[str, str, str]

FROM_TEXT_TO_DATA: tuple[Pattern, ...] = (
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
)
TRAIN_EACH: Pattern = (
    "Train {each}",
    "deepspeed --num_accelerators 2 pretrain.py --ds_config ds_configs/zero2.json --config {config} "
    "--set run_dir={out}/runs/{each} --set model.encoding={each} "
    "--set data.path={out}/data/train --set data.valid_path={out}/data/valid {settings}",
    "runs/{each}/checkpoints/step-{steps:08d}",
)


def run_values(config: Path, settings: Sequence[str]) -> dict[str, object]:
    """What `TRAIN_EACH` and the steps before it ask for, of a run configuration with `KEY=VALUE` settings."""
    run = load_run_config(config, list(settings))
    return {
        "config": config,
        "vocab": run.model.vocab_size,
        "steps": run.train.steps,
        "settings": " ".join(f"--set {shlex.quote(setting)}" for setting in settings),
    }


def fill(patterns: Iterable[Pattern], folder: Path, values: Mapping[str, object], each_of: Iterable[str]) -> list[Step]:
    """All steps in order, with their values filled in; `{out}` is the folder."""
    names, result = tuple(each_of), []
    for pattern in patterns:
        for name in names if "{each}" in pattern[0] else ("",):
            title, command, made = (text.format(**values, out=shlex.quote(str(folder)), each=name) for text in pattern)
            result.append(Step(title, shlex.split(command), folder / made))
    return result


def run_steps(steps: list[Step], folder: Path) -> None:
    """Run all that are not done yet. Raises as `run_step`."""
    for number, step in enumerate(steps, 1):
        print(f"\n[{number}/{len(steps)}] {step.title}", flush=True)
        run_step(step, folder)


def run_step(step: Step, folder: Path) -> None:
    """Run one command unless its result is there; show its progress, keep its whole output in `FOLDER/logs`.

    Raises:
        BipeError: it failed, and its log is named; or the result that is there is another command's.
    """
    log = folder / "logs" / f"{step.title.replace(' ', '_').replace(',', '')}.log"
    made_by = "$ " + shlex.join(_without(folder, word) for word in step.command)
    if step.result.exists():
        _check_made_by(made_by, log, step.result)
        print(f"    done before: {step.result}", flush=True)
        return
    print("    $ " + shlex.join(step.command), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    begin = time.monotonic()
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process,
    ):
        print(made_by, file=file, flush=True)
        for line in process.stdout or ():
            file.write(line)
            if not any(noise in line for noise in _NOISE) and line.strip():
                print("    " + line.rstrip(), flush=True)
    if process.returncode != 0 or not step.result.exists():
        raise BipeError(
            f"the command left with exit code {process.returncode} and did not make {step.result}",
            remedy="Read its whole output, mend the cause, and run this again: finished steps are kept",
            place=log,
        )
    print(f"    {time.monotonic() - begin:.0f} s", flush=True)


def _without(folder: Path, word: str) -> str:
    """A word of a command, wherever the folder lies."""
    return re.sub(rf"(^|=){re.escape(str(folder))}/", r"\1OUTPUT/", word)


def _check_made_by(made_by: str, log: Path, result: Path) -> None:
    if not log.exists():
        return
    with log.open(encoding="utf-8") as file:
        before = file.readline().rstrip("\n")
    if before.startswith("$ ") and before != made_by:
        raise BipeError(
            f"{result} was made by {before!r}, and now it is {made_by!r}",
            remedy="Name another --output, or give the same options; or remove the result, to have it made anew",
            place=log,
        )
