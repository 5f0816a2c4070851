"""Speed of data loading, and of `inspect_data.py verify`, against simpler ways to read the same files.

    ids         both ids of a batch from its segment ends, against a plain Python loop
    reading     a batch with and without ids, against slices of memory-mapped files that are stacked, which is what a
                loader without position ids does
    verifying   checksums, ids and segment bits of a dataset, against `sha256sum` in as many processes as verify has
                workers; hashlib alone shows the share of the checksums

All contenders read the same sequences of one shuffled order, or the same files, from the page cache. They alternate;
the figures are medians.

Example: python tools/bench/data.py --megatokens 64 --repeats 25 --verify-megatokens 256
"""

import argparse
import ssl
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._bench import NEWLINE_RULE, describe_machine, make_dataset, median_seconds
from megatron_bipe.data.collate import make_batch
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.inspection.verify import Advance, find_problems, run_in_order
from megatron_bipe.data.segments import SegmentRule, bilevel_ids
from megatron_bipe.data.shard_layout import SUFFIXES
from megatron_bipe.data.shuffle import SampleOrder
from megatron_bipe.io import sha256_of
from megatron_bipe.runtime.child_processes import run_command
from megatron_bipe.types import BoolArray, IntArray, TokenArray

BATCH, SEQ_LEN, MAX_INTRA_ID = 256, 1024, 1023  # the 151M recipe
TOKENS_ALONE, LABELS_ALONE = "tokens alone, as stored", "tokens and labels alone"
NUM_VERIFIED_SHARDS, VERIFY_REPEATS = 8, 5
VERIFIED_RULES = {
    "[13,869]": SegmentRule(spec="[13,869]", token_ids=(13, 869)),
    "26 ids": SegmentRule(spec="sentence", token_ids=tuple(range(13, 39))),
    "fixed:16": SegmentRule(spec="fixed:16", token_ids=()),
}


@command
def main(argv: Sequence[str] | None) -> None:
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(1)
    print(describe_machine("numpy", "torch"))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        dataset = make_dataset(Path(folder), arguments.megatokens * 1_000_000, NEWLINE_RULE)
        print(
            f"{dataset.num_tokens / 1e6:.0f}M tokens, batches of {BATCH} sequences of {SEQ_LEN}, "
            f"median of {arguments.repeats} batches (the loop: of {arguments.loop_repeats})"
        )
        compare_reading(dataset, arguments.repeats, arguments.loop_repeats)
    if not arguments.verify_megatokens:
        return
    sha256sum = run_command(["sha256sum", "--version"], stdout=PIPE, check=True).stdout
    print(f"\n{sha256sum.splitlines()[0]}; hashlib with {ssl.OPENSSL_VERSION}")
    workers = [int(part) for part in arguments.workers.split(",")]
    for label, rule in VERIFIED_RULES.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            num_tokens = arguments.verify_megatokens * 1_000_000
            dataset = make_dataset(Path(folder), num_tokens, rule, NUM_VERIFIED_SHARDS)
            compare_verifying(label, dataset, workers)


def compare_reading(dataset: TokenDataset, repeats: int, loop_repeats: int) -> None:
    """Check that all contenders read the same, and print a table each for ids, stored tokens and tensors."""
    shards = [np.memmap(shard.path("bin"), dtype=shard.dtype, mode="r") for shard in dataset.shards]
    order = SampleOrder(dataset.num_sequences(SEQ_LEN), seed=0)
    indices = [order.sequence_indices(number * BATCH, BATCH) for number in range(max(repeats, loop_repeats))]
    ends = [dataset.sequences(indices[number], SEQ_LEN)[1] for number in range(loop_repeats)]
    for expected, found in zip(loop_ids(ends[0]), bilevel_ids(ends[0], MAX_INTRA_ID), strict=True):
        np.testing.assert_array_equal(expected, found)
    np.testing.assert_array_equal(read_mapped(shards, indices[0]), dataset.sequences(indices[0], SEQ_LEN)[0])

    ids = median_seconds({"bilevel_ids": lambda n: bilevel_ids(ends[n % loop_repeats], MAX_INTRA_ID)}, repeats)
    ids |= median_seconds({"plain Python loop": lambda n: loop_ids(ends[n])}, loop_repeats)
    _print_table("Both ids of a batch, from its segment ends", ids, "plain Python loop")
    stored: dict[str, Callable[[int], object]] = {
        TOKENS_ALONE: lambda n: read_mapped(shards, indices[n]),
        "tokens and segment ends, checked": lambda n: dataset.sequences(indices[n], SEQ_LEN),
        "tokens and both ids": lambda n: bilevel_ids(dataset.sequences(indices[n], SEQ_LEN)[1], MAX_INTRA_ID),
    }
    _print_table("Reading a batch", median_seconds(stored, repeats), TOKENS_ALONE)
    tensors: dict[str, Callable[[int], object]] = {
        LABELS_ALONE: lambda n: mapped_tensors(shards, indices[n]),
        "make_batch: and both ids": lambda n: make_batch(dataset, indices[n], SEQ_LEN, MAX_INTRA_ID),
    }
    _print_table("Reading a batch as int64 tensors", median_seconds(tensors, repeats), LABELS_ALONE)


def read_mapped(shards: Sequence[TokenArray], indices_B: IntArray) -> TokenArray:
    """Copy the slice of each sequence out of the memory-mapped file that holds it; the peer."""
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


def mapped_tensors(shards: Sequence[TokenArray], indices_B: IntArray) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = read_mapped(shards, indices_B)
    return torch.from_numpy(tokens[:, :-1].astype(np.int64)), torch.from_numpy(tokens[:, 1:].astype(np.int64))


def loop_ids(ends_BT: BoolArray) -> tuple[IntArray, IntArray]:
    """Compute both ids token by token."""
    intra_BT, inter_BT = np.zeros(ends_BT.shape, np.int64), np.zeros(ends_BT.shape, np.int64)
    for row, ends_T in enumerate(ends_BT.tolist()):
        position = segment = 0
        for column, end in enumerate(ends_T):
            intra_BT[row, column], inter_BT[row, column] = min(position, MAX_INTRA_ID), segment
            position, segment = (0, segment + 1) if end else (position + 1, segment)
    return intra_BT, inter_BT


def _print_table(title: str, times_s: dict[str, float], base: str) -> None:
    print(f"\n{title}\n\n{'':36} {'ms/batch':>10} {'samples/s':>12} {'speed':>10}")
    for name, median_s in times_s.items():
        print(f"{name:36} {median_s * 1e3:10.3f} {BATCH / median_s:12,.0f} {times_s[base] / median_s:10.2f}")
    print(f"speed: relative to {base}")


def compare_verifying(rule: str, dataset: TokenDataset, workers: list[int]) -> None:
    files = [shard.path(suffix) for shard in dataset.shards for suffix in SUFFIXES]
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    print(f"\nrule {rule}: {megabytes:,.0f} MB in {len(files)} files, median of {VERIFY_REPEATS}\n")
    print(f"{'':32} {'s':>8} {'MB/s':>10} {'x sha256sum':>14}")
    for number in workers:
        base = f"sha256sum, {number} processes"
        contenders: dict[str, Callable[[int], object]] = {
            base: partial(_sha256sum, files, number),
            f"hashlib, {number} threads": partial(_hash_all, files, number),
            f"verify, {number} workers": partial(_verify, dataset, number, 1.0),
            f"verify --sample 0.01, {number} workers": partial(_verify, dataset, number, 0.01),
        }
        times_s = median_seconds(contenders, VERIFY_REPEATS)
        for name, median_s in times_s.items():
            ratio = times_s[base] / median_s
            print(f"{name:32} {median_s:8.2f} {megabytes / median_s:10,.0f} {ratio:14.2f}", flush=True)


def _sha256sum(files: list[Path], processes: int, _: int) -> None:
    arguments = ["xargs", "-0", "-n", "1", "-P", str(processes), "sha256sum"]
    run_command(arguments, stdin_text="\0".join(map(str, files)), stdout=DEVNULL, check=True)


def _hash_all(files: list[Path], threads: int, _: int) -> None:
    def digest(path: Path, advance: Advance) -> str:
        advance(path.stat().st_size)
        return sha256_of(path)

    list(run_in_order(digest, files, threads, lambda _: None))


def _verify(dataset: TokenDataset, workers: int, sample: float, _: int) -> None:
    problems = [p for p in find_problems([dataset], workers=workers, sample=sample) if "tokenizer" not in str(p)]
    if problems:
        raise problems[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--megatokens", type=int, default=32, metavar="M", help=f"millions of tokens to read batches from {default}")
    add("--repeats", type=int, default=25, metavar="N", help=f"timed batches of each contender {default}")
    add("--loop-repeats", type=int, default=3, metavar="N", help=f"timed batches of the Python loop {default}")
    add(
        "--verify-megatokens",
        type=int,
        default=32,
        metavar="M",
        help=f"millions of tokens to verify; 0: none {default}",
    )
    add("--workers", default="1,2", metavar="N,N,...", help=f"numbers of workers of verify to compare {default}")
    add("--folder", type=Path, metavar="DIR", help="where to put the data (default: the folder for temporary files)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
