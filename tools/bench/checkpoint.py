"""Cost of a checkpoint for training: saves in the background against saves that block the loop, in one run.

The model has the shape of the 151M recipe (with --layers 12), in fp32 under ZeRO 1 on one rank, so that one file holds
12 bytes of state per parameter. Its sequences are short: a longer update would give the copy more time, so that the
blocking shown here is the upper bound. "blocked" is the time in `save` and the time for which the optimizer waits for
the copy of the state. The writer also needs cores and memory: "slowdown" is the additional time of all updates that
run until it has finished. Both kinds alternate; the figures are medians. The first save of each kind allocates its
memory and is not counted; the first one in the background is shown separately.

Example: python tools/bench/checkpoint.py --folder /scratch
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._bench import describe_machine
from bench._models import make_batch
from megatron_bipe.checkpoint.find import find_checkpoint
from megatron_bipe.checkpoint.verify import check_complete
from megatron_bipe.config import engine_config, load_run_config, read_ds_config
from megatron_bipe.engine.engines import start_engine
from megatron_bipe.runtime.distributed_init import join_launch

DS_CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero1.json"
SEQ_LEN, LR = 64, 1e-5


class Cost(NamedTuple):
    """Times of one save, in seconds."""

    blocked: float  # for which the training loop waited
    slowdown: float  # additional time of the updates until the checkpoint was complete
    complete: float  # from the start of the save until the checkpoint was complete


@command
def main(argv: Sequence[str] | None) -> None:
    arguments = _parser().parse_args(argv)
    logging.disable(logging.INFO)
    print(describe_machine("torch", "deepspeed"))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        mesh = join_launch()
        settings = [
            f"run_dir={folder}",
            f"train={{seq_len_tokens: {SEQ_LEN}, global_batch: 1, micro_batch: 1, precision: fp32}}",
            f"model={{num_layers: {arguments.layers}, intra_size: {SEQ_LEN}}}",
            "checkpoint={keep_last: 1, min_free_gib: 0}",
        ]
        run = load_run_config(None, settings)
        engine = start_engine(run, engine_config(run, read_ds_config(DS_CONFIG), 1, DS_CONFIG), mesh)
        time_updates(engine, 2)
        blocking, background, alone_s = [], [], []
        for number in range(arguments.repeats + 1):
            blocking.append(save_blocking(engine, Path(folder), 2 * number + 1))
            alone_s.append(statistics.median(time_updates(engine, arguments.updates)))
            background.append(save_in_background(engine, Path(folder), 2 * number + 2, alone_s[-1]))
        began_s = time.perf_counter()
        check_complete(find_checkpoint(folder))
        verified_s = time.perf_counter() - began_s
        size_gb = sum(path.stat().st_size for path in find_checkpoint(folder).folder.iterdir()) / 1e9
        engine.close()
    update_s = statistics.median(alone_s)
    print(f"{size_gb:.2f} GB per checkpoint; an update takes {update_s:.2f} s; medians of {arguments.repeats}\n")
    _print_table(blocking, background)
    print(f"\nverifying a checkpoint takes {verified_s:.2f} s")


def time_updates(engine: Any, count: int) -> list[float]:
    """Return the seconds of each of `count` updates on random tokens."""
    batch, seconds = make_batch(32000, rows=1, length=SEQ_LEN), []
    for _ in range(count):
        began_s = time.perf_counter()
        engine.train_step([batch], LR)
        seconds.append(time.perf_counter() - began_s)
    return seconds


def save_blocking(engine: Any, run_dir: Path, step: int) -> Cost:
    began_s = time.perf_counter()
    engine.save(run_dir, step, final=True)
    elapsed_s = time.perf_counter() - began_s
    return Cost(blocked=elapsed_s, slowdown=0.0, complete=elapsed_s)


def save_in_background(engine: Any, run_dir: Path, step: int, alone_s: float) -> Cost:
    """Save while updates run; `alone_s` is the time of an update without a concurrent save."""
    saver = engine._saver
    waited_s, began_s = saver.waited_s, time.perf_counter()
    engine.save(run_dir, step, final=False)
    updates_s = []
    while not saver.is_idle:
        updates_s += time_updates(engine, 1)
    complete_s = time.perf_counter() - began_s
    return Cost(saver.waited_s - waited_s, sum(updates_s) - len(updates_s) * alone_s, complete_s)


def _print_table(blocking: list[Cost], background: list[Cost]) -> None:
    rows = {
        "blocking": Cost(*map(statistics.median, zip(*blocking[1:], strict=True))),
        "in the background": Cost(*map(statistics.median, zip(*background[1:], strict=True))),
        "in the background, the first": background[0],
    }
    base_s = rows["blocking"].blocked
    print(f"{'':30} {'blocked s':>10} {'of blocking':>12} {'slowdown s':>11} {'complete after s':>17}")
    for name, cost in rows.items():
        share = cost.blocked / base_s
        print(f"{name:30} {cost.blocked:10.3f} {share:12.1%} {cost.slowdown:11.2f} {cost.complete:17.2f}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--folder", type=Path, metavar="DIR", help="where to write (default: the folder for temporary files)")
    add("--layers", type=int, default=2, metavar="N", help="blocks of the model (default: %(default)s; 151M has 12)")
    add("--updates", type=int, default=3, metavar="N", help=f"updates before each save in the background {default}")
    add("--repeats", type=int, default=3, metavar="N", help=f"saves of each kind {default}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
