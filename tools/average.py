"""Average checkpoints: the mean of their weights, as a model that evaluates, exports and begins a run.

Examples: python tools/average.py runs/bipe_rope_151m@480000,490000,500000 --output averages/bipe_rope_151m
          python tools/average.py runs/cool_down_a@12000 runs/cool_down_b@12000 --output averages/both

The output is a run folder with a checkpoint of step 0, without an optimizer state.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from _cli import command
from megatron_bipe.checkpoint.find import Checkpoint, find_checkpoint, split_step
from megatron_bipe.errors import ConfigError


@command
def main(argv: Sequence[str] | None) -> None:
    given = _parser().parse_args(argv)
    checkpoints = [checkpoint for spec in given.checkpoints for checkpoint in _named(spec)]

    from megatron_bipe.train.average import write_average

    folder = write_average(checkpoints, given.output, given.overwrite)
    names = ", ".join(f"{checkpoint.run_dir}@{checkpoint.step}" for checkpoint in checkpoints)
    print(f"{folder}: the mean of {len(checkpoints)} checkpoints: {names}")


def _named(spec: str) -> Iterator[Checkpoint]:
    """Yield the checkpoints that `RUN_DIR[@STEP,STEP,...]` names."""
    run_dir, steps = split_step(spec)
    if steps and not re.fullmatch(r"\d+(,\d+)*", steps):
        raise ConfigError(f"{steps} is not a list of steps", remedy="Write RUN_DIR@1000,2000,3000", location=spec)
    for step in steps.split(","):
        yield find_checkpoint(f"{run_dir}@{step}" if steps else spec)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "checkpoints",
        nargs="+",
        metavar="RUN_DIR@STEP,STEP,...",
        help="checkpoints of one model, of one run or of several; without a step, the newest",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="run folder to make, with the mean as checkpoint 0")
    add("--overwrite", action="store_true", help="replace an output of this command; never another folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
