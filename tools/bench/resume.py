"""Kill preprocessing at random moments, run the same command again, and compare with an undisturbed run.

Each round is killed (SIGKILL to the process alone; its workers must find out by themselves) at a moment drawn from the
length of the undisturbed run, then started again until it ends.

Example: python tools/bench/resume.py --rounds 20 --workers 2
"""

import argparse
import hashlib
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._corpus import collect
from bench._machine import describe_machine
from megatron_bipe.errors import DataError
from megatron_bipe.runtime.child_processes import ChildProcess, run_command
from preprocessing.train_tokenizer import TrainOptions, train_tokenizer
from preprocessing.work_dir import RANGE_NAME, WORK_FOLDER

PREPROCESS = Path(__file__).resolve().parents[1] / "preprocess.py"
VOCAB_SIZE = 8000


@command
def main(argv: Sequence[str] | None) -> None:
    """Run undisturbed, then the rounds; print what came of them."""
    arguments = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl.zst"
        text_bytes = collect(corpus, [Path(sysconfig.get_paths()["purelib"])], arguments.megabytes * 1e6)
        train_tokenizer(TrainOptions([str(corpus)], VOCAB_SIZE, folder / "tokenizer", sample_bytes=2_000_000))
        common = ["--input", str(corpus), "--tokenizer", str(folder / "tokenizer"), "--shard-tokens", "1000000"]
        command = [sys.executable, str(PREPROCESS), *common, "--workers", str(arguments.workers)]
        began_s = time.monotonic()
        _finish(command, folder / "whole")
        whole_s, expected = time.monotonic() - began_s, _digest(folder / "whole")
        chance = random.Random(arguments.seed)
        equal, kept = 0, []
        for number in range(arguments.rounds):
            output = folder / f"round{number}"
            _start_and_kill(command, output, chance.uniform(0, whole_s))
            kept.append(len(list((output / WORK_FOLDER).glob(f"*/{RANGE_NAME}"))))
            if not (output / "manifest.json").exists() or (output / WORK_FOLDER).exists():
                _finish(command, output)
            equal += _digest(output) == expected
    print(describe_machine("gigatoken"))
    print(f"{text_bytes / 1e6:.1f} MB of text in {whole_s:.1f} s with {arguments.workers} workers")
    print(
        f"ranges that were finished when the kill came: median {statistics.median(kept):.0f}, {min(kept)}-{max(kept)}"
    )
    print(f"{equal} of {arguments.rounds} outputs are those of the undisturbed run")
    if equal < arguments.rounds:
        raise DataError("Some outputs differ", location="tools/bench/resume.py")


def _start_and_kill(command: list[str], output: Path, after_s: float) -> None:
    null = subprocess.DEVNULL
    with ChildProcess([*command, "--output", str(output)], stdout=null, stderr=null) as child:
        try:
            child.process.wait(after_s)
        except subprocess.TimeoutExpired:
            child.process.kill()


def _finish(command: list[str], output: Path) -> None:
    done = run_command([*command, "--output", str(output)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        raise DataError(f"preprocess.py failed: {done.stderr}", location=output)


def _digest(folder: Path) -> str:
    """SHA-256 over names and contents of all files."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            total.update(f"{file.relative_to(folder)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--megabytes", type=float, default=30.0, help="size of the corpus (default: %(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="(default: %(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="kills (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the moments (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
