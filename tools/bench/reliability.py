"""What watching over a run costs: the time of all that does so, against that of a step, in one run.

CPU ranks train in the loop of pretrain.py, with a look at the losses at every step in place of every tenth. Timed in
these same steps: asking all ranks whether to stop, judging losses, comparing the ranks' own work, hashing replicas, the
watchdog's notes. A figure is the median time of a call x calls a step, over the median time of a step; what is done
every hundredth step by default is done more often here, and counted as by default. What a rank waits there for a
slower one is part of it, though it would wait for it in the next step anyway.

Example: python tools/bench/reliability.py --size 151m --steps 10
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where pretrain is

from _cli import command
from bench._machine import describe_machine
from megatron_bipe.config.schema import HealthConfig, TrainConfig
from megatron_bipe.data.manifest import Manifest, TokenizerRecord
from megatron_bipe.data.segments import SegmentRule, segment_ends
from megatron_bipe.data.shard import ShardWriter
from megatron_bipe.runtime.child_processes import run_command
from megatron_bipe.types import TokenizedDocument

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"151m": "{}", "10m": "{num_layers: 4, hidden_size: 256, num_heads: 4, ffn_size: 1024, vocab_size: 8000}"}
VOCAB_SIZE, SEGMENT_END, TOKENS = 8000, 13, 1_000_000
EVERY = 3  # steps between hashes of replicas, and between comparisons of ranks
HASHES, RANKS = "hashing replicas", "comparing ranks"


@command
def main(argv: Sequence[str] | None) -> None:
    """Start the ranks and print what they timed, or be one."""
    if "--as-rank" in sys.argv:
        be_rank(Path(sys.argv.pop(sys.argv.index("--as-rank") + 1)))
        return
    given = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder / "data")
        sizes = f"seq_len_tokens: {given.seq_len}, global_batch: {given.batch}, micro_batch: 1, precision: fp32"
        settings = [
            f"model={SIZES[given.size]}",
            f"run_dir={folder / 'run'}",
            f"data={{path: {folder / 'data'}, valid_path: null}}",
            f"train={{steps: {given.steps}, {sizes}, log_every: 1, save_every: 0, check_replicas_every: {EVERY}}}",
            f"health={{compare_ranks_every: {EVERY}, spike_window: 100}}",
            "optimizer.warmup_steps=0",
        ]
        command = ["torchrun", "--standalone", "--nproc-per-node", str(given.ranks), __file__, "--as-rank", name]
        options = ["--ds_config", str(ROOT / "ds_configs" / "zero1.json")]
        options += [part for setting in settings for part in ("--set", setting)]
        run_command([*command, *options], check=True, stdout=DEVNULL, cwd=ROOT)
        print(describe_machine("torch", "deepspeed"))
        print_table(json.loads((folder / "times.json").read_text()), given)


def be_rank(folder: Path) -> None:
    """Train as pretrain.py does, with clocks; the main rank writes down what they showed."""
    import pretrain
    from megatron_bipe.data import dataset
    from megatron_bipe.engine.base import DeepSpeedEngine
    from megatron_bipe.engine.engines import ZeroEngine
    from megatron_bipe.runtime.exit_handling import run_rank
    from megatron_bipe.runtime.preemption import StopRequest
    from megatron_bipe.runtime.watchdog import Watchdog
    from megatron_bipe.train import run_folder
    from megatron_bipe.train.rollback import Rollback

    times_s: dict[str, list[float]] = defaultdict(list)
    clocks: list[tuple[Any, str, str]] = [
        (ZeroEngine, "train_step", "a step"),
        (StopRequest, "agreed", "asking whether to stop"),
        (Rollback, "judge", "judging losses"),
        (Rollback, "_name_slow_ranks", RANKS),
        (DeepSpeedEngine, "check_replicas", HASHES),
        (Watchdog, "at", "notes for the watchdog"),
    ]
    for owner, name, label in clocks:
        setattr(owner, name, _timed(getattr(owner, name), times_s[label]))

    # Random tokens have no tokenizer.
    without: list[tuple[Any, str, Any]] = [
        (dataset, "open_tokenizer", lambda _: None),
        (run_folder, "write_run_folder", lambda run, *_: run.run_dir.mkdir(parents=True, exist_ok=True)),
    ]
    for module, name, replacement in without:
        setattr(module, name, replacement)

    def train_and_write(arguments: argparse.Namespace, launch: Any) -> None:
        pretrain.main(arguments, launch)
        if launch.is_main:
            (folder / "times.json").write_text(json.dumps(times_s))

    sys.argv.remove("--as-rank")
    run_rank(train_and_write, pretrain.parse_args())


def _timed(method: Any, times_s: list[float]) -> Any:
    @functools.wraps(method)
    def timed(*arguments: Any) -> Any:
        began_s = time.perf_counter()
        result = method(*arguments)
        times_s.append(time.perf_counter() - began_s)
        return result

    return timed


def write_tokens(folder: Path) -> None:
    """A dataset of random tokens."""
    rule = SegmentRule(spec=f"[{SEGMENT_END}]", token_ids=(SEGMENT_END,))
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, TOKENS).astype(np.uint16)
    with ShardWriter(folder, "part-00000", np.dtype(np.uint16)) as writer:
        writer.add(TokenizedDocument(tokens, segment_ends(tokens, rule), 4 * TOKENS, ""))
        record = writer.finish()
    tokenizer = TokenizerRecord(name="none", fingerprint="0" * 64, vocab_size=VOCAB_SIZE, special_ids={})
    Manifest(tokenizer=tokenizer, rule=rule, dtype="uint16", shards=(record,), source={}).save(folder)


def print_table(times_s: dict[str, list[float]], given: argparse.Namespace) -> None:
    """A line for each part, and their sum."""
    steps = times_s.pop("a step")
    step_s, total = statistics.median(steps[1:]), 0.0  # the first one warms up
    print(
        f"{given.size}, {given.ranks} ranks, {given.batch} windows of {given.seq_len} tokens: {step_s:.3f} s a step\n"
    )
    print(f"{'':40} {'calls a step':>13} {'ms a call':>10} {'of a step':>10}")
    by_default = {HASHES: 1 / TrainConfig().check_replicas_every, RANKS: 1 / HealthConfig().compare_ranks_every}
    for label, found in times_s.items():
        calls, call_s = by_default.get(label, len(found) / len(steps)), statistics.median(found)
        total += calls * call_s / step_s
        print(f"{label:40} {calls:13.2f} {call_s * 1e3:10.3f} {calls * call_s / step_s:10.3%}")
    print(f"{'together':40} {'':13} {'':10} {total:10.3%}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="10m", help="of the model (default: %(default)s)")
    add("--ranks", type=int, default=2, help="(default: %(default)s)")
    add("--steps", type=int, default=20, help="(default: %(default)s)")
    add("--seq-len", type=int, default=256, metavar="TOKENS", help="(default: %(default)s)")
    add("--batch", type=int, default=4, metavar="WINDOWS", help="an update reads (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
