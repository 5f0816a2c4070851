"""What a checkpoint costs training: beside it against the loop waiting for the disk, in turns of one run.

The 151M model in fp32 under ZeRO 1 on one rank, so with 12 bytes of state a parameter in one file. Its update is made
of short windows: a long one gives the copy more time, so the stall shown is the larger one. The stall is the time for
which the loop stands still: in `save`, and in front of the optimizer while the state is copied. How much longer the
next updates take, since the writer needs cores and memory too, is shown apart. Medians; the first save of each kind,
which has to get its memory, is shown apart too.

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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._machine import describe_machine
from megatron_bipe.checkpoint.find import find_checkpoint
from megatron_bipe.checkpoint.verify import check_complete
from megatron_bipe.config.deepspeed import engine_config, read_ds_config
from megatron_bipe.config.load import load_run_config
from megatron_bipe.engine.engines import start_engine
from megatron_bipe.runtime.distributed_init import join_launch
from megatron_bipe.types import Batch

DS_CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero1.json"
SEQ_LEN, LR = 64, 1e-5


class Cost(NamedTuple):
    """Of one save, in seconds."""

    stall: float  # of the loop
    longer: float  # by which the updates until it was done took longer than others
    done: float  # from its begin until it was the newest checkpoint


@command
def main(argv: Sequence[str] | None) -> None:
    """Train, save in turns, print a table."""
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
        updates = _Updates(engine)
        updates.do(2)
        beside, waiting, alone_s = [], [], []
        for number in range(arguments.repeats + 1):
            waiting.append(_waiting(engine, Path(folder), 2 * number + 1))
            alone_s.append(statistics.median(updates.do(arguments.updates)))
            beside.append(_beside(engine, updates, Path(folder), 2 * number + 2, alone_s[-1]))
        began_s = time.perf_counter()
        check_complete(find_checkpoint(folder))
        verified_s = time.perf_counter() - began_s
        size_gb = sum(path.stat().st_size for path in find_checkpoint(folder).folder.iterdir()) / 1e9
        engine.close()
    update_s = statistics.median(alone_s)
    print(f"{size_gb:.2f} GB a checkpoint; an update takes {update_s:.2f} s; medians of {arguments.repeats}\n")
    _print_table(waiting, beside)
    print(f"\nverifying a checkpoint takes {verified_s:.2f} s")


class _Updates:
    """Updates of the model on random tokens."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def do(self, count: int) -> list[float]:
        """Seconds of each."""
        seconds = []
        for _ in range(count):
            tokens = torch.randint(0, 32000, (1, SEQ_LEN + 1))
            places = torch.arange(SEQ_LEN)[None]
            began_s = time.perf_counter()
            self._engine.train_step([Batch(tokens[:, :-1], places, places // 8, tokens[:, 1:])], LR)
            seconds.append(time.perf_counter() - began_s)
        return seconds


def _waiting(engine: Any, run_dir: Path, step: int) -> Cost:
    began_s = time.perf_counter()
    engine.save(run_dir, step, final=True)
    took_s = time.perf_counter() - began_s
    return Cost(took_s, 0.0, took_s)


def _beside(engine: Any, updates: _Updates, run_dir: Path, step: int, alone_s: float) -> Cost:
    """The stall is what the saver counts; the updates are done for as long as it writes."""
    saver = engine._saver
    stalled_s, began_s = saver.waited_s, time.perf_counter()
    engine.save(run_dir, step, final=False)
    seconds = []
    while not saver.is_idle:
        seconds += updates.do(1)
    done_s = time.perf_counter() - began_s
    stall_s = saver.waited_s - stalled_s
    return Cost(stall_s, sum(seconds) - len(seconds) * alone_s, done_s)


def _print_table(waiting: list[Cost], beside: list[Cost]) -> None:
    median = {
        name: Cost(*map(statistics.median, zip(*costs[1:], strict=True)))
        for name, costs in {"the loop waits": waiting, "beside training": beside}.items()
    }
    rows = {
        "the loop waits": median["the loop waits"],
        "beside training": median["beside training"],
        "beside training, the first": beside[0],
    }
    base_s = median["the loop waits"].stall
    print(f"{'':28} {'stall s':>9} {'of waiting':>11} {'updates longer by s':>20} {'done after s':>13}")
    for name, cost in rows.items():
        print(f"{name:28} {cost.stall:9.3f} {cost.stall / base_s:11.1%} {cost.longer:20.2f} {cost.done:13.2f}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, metavar="DIR", help="where to write (default: the folder for temporary files)")
    add("--layers", type=int, default=2, metavar="N", help="blocks of the model (default: %(default)s; 151M has 12)")
    add(
        "--updates",
        type=int,
        default=3,
        metavar="N",
        help="before each save beside training (default: %(default)s)",
    )
    add("--repeats", type=int, default=3, metavar="N", help="saves of each kind (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
