"""What both ids cost: against a plain Python loop, and against reading the tokens alone.

The peer is what a loader without positions does with the same file: slices of one mapped array, stacked. All
contenders read the same windows of the same shuffled order from the page cache and take turns; medians.

Example: python tools/bench/data.py --megatokens 64 --repeats 25
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._machine import describe_machine
from bench._random_data import NUM_SHARDS, make_dataset
from megatron_bipe.data.collate import make_batch
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.segments import bilevel_ids
from megatron_bipe.data.shuffle import SampleOrder
from megatron_bipe.types import BoolArray, IntArray, TokenArray

BATCH, SEQ_LEN, CLIP = 256, 1024, 1023  # the 151M recipe
Timed = dict[str, list[float]]


@command
def main(argv: Sequence[str] | None) -> None:
    """Make a dataset, time everyone in turn, print the tables."""
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder), arguments.megatokens * 1_000_000)
        order = SampleOrder(dataset.num_sequences(SEQ_LEN), seed=0)
        print(describe_machine("numpy", "torch"))
        print(
            f"{dataset.num_tokens / 1e6:.0f}M tokens in {NUM_SHARDS} shards, batches of {BATCH} windows of {SEQ_LEN}, "
            f"median of {arguments.repeats} batches (the loop: of {arguments.loop_repeats})"
        )
        ids = _time_ids(dataset, order, arguments.repeats, arguments.loop_repeats)
        print("\nBoth ids of a batch, from its segment ends\n")
        _print_table(ids, "plain Python loop")
        loading = _time_loading(dataset, order, arguments.repeats)
        print("\nReading a batch\n")
        _print_table(loading, "tokens alone, as stored")
        print("\nReading a batch as int64 tensors\n")
        _print_table(_time_tensors(dataset, order, arguments.repeats), "tokens and labels alone")


def read_tokens_alone(shards: Sequence[TokenArray], indices_B: IntArray) -> TokenArray:
    """The peer: one slice a window, out of whichever mapped file it is in."""
    bounds = np.cumsum([0, *(shard.size for shard in shards)])
    starts_B = indices_B * SEQ_LEN
    shard_B = np.searchsorted(bounds, starts_B, side="right") - 1
    within_B = starts_B - bounds[shard_B]
    tokens = np.empty((indices_B.size, SEQ_LEN + 1), dtype=shards[0].dtype)
    for row, (number, start) in enumerate(zip(shard_B.tolist(), within_B.tolist(), strict=True)):
        found = shards[number][start : start + SEQ_LEN + 1]
        if found.size <= SEQ_LEN:
            found = np.concatenate([found, shards[number + 1][: SEQ_LEN + 1 - found.size]])
        tokens[row] = found
    return tokens


def tokens_as_tensors(shards: Sequence[TokenArray], indices_B: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
    """The peer's batch: tokens and labels."""
    tokens = read_tokens_alone(shards, indices_B)
    return torch.from_numpy(tokens[:, :-1].astype(np.int64)), torch.from_numpy(tokens[:, 1:].astype(np.int64))


def loop_ids(ends: BoolArray) -> tuple[IntArray, IntArray]:
    """Both ids, token by token."""
    intra, inter = np.zeros(ends.shape, np.int64), np.zeros(ends.shape, np.int64)
    for row, ends_T in enumerate(ends.tolist()):
        place = segment = 0
        for column, end in enumerate(ends_T):
            intra[row, column], inter[row, column] = min(place, CLIP), segment
            place, segment = (0, segment + 1) if end else (place + 1, segment)
    return intra, inter


def _time_ids(dataset: TokenDataset, order: SampleOrder, repeats: int, loop_repeats: int) -> Timed:
    batches = [dataset.sequences(order.sequence_indices(n * BATCH, BATCH), SEQ_LEN)[1] for n in range(loop_repeats)]
    for expected, found in zip(loop_ids(batches[0]), bilevel_ids(batches[0], CLIP), strict=True):
        np.testing.assert_array_equal(expected, found)
    times = _take_turns({"bilevel_ids": lambda n: bilevel_ids(batches[n % loop_repeats], CLIP)}, repeats)
    times |= _take_turns({"plain Python loop": lambda n: loop_ids(batches[n])}, loop_repeats)
    return times


def _time_loading(dataset: TokenDataset, order: SampleOrder, repeats: int) -> Timed:
    shards = [np.memmap(shard.path("bin"), dtype=shard.dtype, mode="r") for shard in dataset.shards]

    def indices(n: int) -> IntArray:
        return order.sequence_indices(n * BATCH, BATCH)

    def both_ids(n: int) -> tuple[IntArray, IntArray]:
        return bilevel_ids(dataset.sequences(indices(n), SEQ_LEN)[1], CLIP)

    np.testing.assert_array_equal(read_tokens_alone(shards, indices(0)), dataset.sequences(indices(0), SEQ_LEN)[0])
    contenders = {
        "tokens alone, as stored": lambda n: read_tokens_alone(shards, indices(n)),
        "tokens and segment ends, checked": lambda n: dataset.sequences(indices(n), SEQ_LEN),
        "tokens and both ids": both_ids,
    }
    return _take_turns(contenders, repeats)


def _time_tensors(dataset: TokenDataset, order: SampleOrder, repeats: int) -> Timed:
    shards = [np.memmap(shard.path("bin"), dtype=shard.dtype, mode="r") for shard in dataset.shards]
    contenders = {
        "tokens and labels alone": lambda n: tokens_as_tensors(shards, order.sequence_indices(n * BATCH, BATCH)),
        "make_batch: and both ids": lambda n: make_batch(
            dataset, order.sequence_indices(n * BATCH, BATCH), SEQ_LEN, CLIP
        ),
    }
    return _take_turns(contenders, repeats)


def _take_turns(contenders: Mapping[str, Callable[[int], object]], repeats: int) -> Timed:
    """Seconds of each run; the first, which warms caches, is not counted."""
    times: Timed = {label: [] for label in contenders}
    for n in range(repeats + 1):
        for label, run in contenders.items():
            began_s = time.perf_counter()
            run(max(n - 1, 0))
            times[label].append(time.perf_counter() - began_s)
    return {label: seconds[1:] for label, seconds in times.items()}


def _print_table(times: Timed, base: str) -> None:
    base_s = statistics.median(times[base])
    print(f"{'':36} {'ms/batch':>10} {'samples/s':>12} {'speed':>10}")
    for label, seconds in times.items():
        median_s = statistics.median(seconds)
        print(f"{label:36} {median_s * 1e3:10.3f} {BATCH / median_s:12,.0f} {base_s / median_s:10.2f}")
    print(f"speed: in units of {base}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatokens", type=int, default=32, metavar="M", help="tokens (default: %(default)s million)")
    parser.add_argument("--repeats", type=int, default=25, metavar="N", help="batches timed (default: %(default)s)")
    parser.add_argument("--loop-repeats", type=int, default=3, metavar="N", help="of the loop (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
