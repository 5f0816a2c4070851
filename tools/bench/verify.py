"""What `inspect_data.py verify` costs: against `sha256sum` of the same files, in the same run.

Everyone reads from the page cache and all take turns; medians. `sha256sum` runs as many processes as verify has
workers. hashlib, which has the same work to do for the checksums alone, shows what of the time they take.

Example: python tools/bench/verify.py --megatokens 512 --workers 1,2
"""

import argparse
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._machine import describe_machine
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.inspection.shard_scan import Advance, run_in_order
from megatron_bipe.data.inspection.verify import find_problems
from megatron_bipe.data.manifest import Manifest, TokenizerRecord
from megatron_bipe.data.segments import SegmentRule, segment_ends
from megatron_bipe.data.shard import ShardWriter, choose_dtype
from megatron_bipe.data.shard_layout import SUFFIXES
from megatron_bipe.io import sha256_of
from megatron_bipe.runtime.child_processes import run_command
from megatron_bipe.types import TokenizedDocument

VOCAB_SIZE, SEGMENT_LENGTH = 32000, 13.7  # of the authors' rule on PG-19: mean segment 13.7 tokens
DOCUMENT_TOKENS, NUM_SHARDS = 1500, 8
RULES = {
    "[13,869]": SegmentRule(spec="[13,869]", token_ids=(13, 869)),
    "26 ids": SegmentRule(spec="sentence", token_ids=tuple(range(13, 39))),
    "fixed:16": SegmentRule(spec="fixed:16", token_ids=()),
}


@command
def main(argv: Sequence[str] | None) -> None:
    """Make a dataset for each rule, time everyone in turn, print a table each."""
    arguments = _parser().parse_args(argv)
    workers = [int(part) for part in arguments.workers.split(",")]
    print(describe_machine("numpy"))
    sha256sum = run_command(["sha256sum", "--version"], stdout=PIPE, check=True).stdout
    print(f"{sha256sum.splitlines()[0]}; hashlib with {ssl.OPENSSL_VERSION}")
    for label, rule in RULES.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            dataset = _make_dataset(Path(folder), arguments.megatokens * 1_000_000, rule)
            _print_table(label, dataset, workers, arguments.repeats)


def _print_table(label: str, dataset: TokenDataset, workers: list[int], repeats: int) -> None:
    files = [shard.path(suffix) for shard in dataset.shards for suffix in SUFFIXES]
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    contenders: dict[str, Callable[[], object]] = {}
    for number in workers:
        contenders[f"sha256sum, {number} processes"] = partial(_sha256sum, files, number)
        contenders[f"hashlib, {number} threads"] = partial(_hash_all, files, number)
        contenders[f"verify, {number} workers"] = partial(_verify, dataset, number, 1.0)
        contenders[f"verify --sample 0.01, {number} workers"] = partial(_verify, dataset, number, 0.01)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats + 1):
        for name, run in contenders.items():
            began_s = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began_s)
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}  # the first warms the cache
    print(f"\nrule {label}: {megabytes:,.0f} MB in {len(files)} files, median of {repeats}\n")
    print(f"{'':32} {'s':>8} {'MB/s':>10} {'of sha256sum':>14}")
    for name, median_s in medians.items():
        base_s = medians[f"sha256sum, {name.split(', ')[1].split()[0]} processes"]
        print(f"{name:32} {median_s:8.2f} {megabytes / median_s:10,.0f} {base_s / median_s:14.2f}")


def _sha256sum(files: list[Path], processes: int) -> None:
    names = "\0".join(map(str, files))
    command = ["xargs", "-0", "-n", "1", "-P", str(processes), "sha256sum"]
    run_command(command, stdin_text=names, stdout=DEVNULL, check=True)


def _hash_all(files: list[Path], threads: int) -> None:
    def digest(path: Path, advance: Advance) -> str:
        advance(path.stat().st_size)
        return sha256_of(path)

    list(run_in_order(digest, files, threads, lambda _: None))


def _verify(dataset: TokenDataset, workers: int, sample: float) -> None:
    problems = [p for p in find_problems([dataset], workers=workers, sample=sample) if "tokenizer" not in str(p)]
    if problems:
        raise problems[0]


def _make_dataset(folder: Path, num_tokens: int, rule: SegmentRule) -> TokenDataset:
    """Random tokens, ends of segments as frequent as in the authors' data."""
    generator = np.random.default_rng(0)
    dtype = choose_dtype(VOCAB_SIZE)
    ending = np.array(rule.token_ids or [13], dtype=dtype)
    records = []
    for number in range(NUM_SHARDS):
        with ShardWriter(folder, f"bench-{number:05d}", dtype) as writer:
            while writer.num_tokens < num_tokens // NUM_SHARDS:
                tokens = generator.integers(1000, VOCAB_SIZE, DOCUMENT_TOKENS).astype(dtype)
                ends = generator.random(DOCUMENT_TOKENS) < 1 / SEGMENT_LENGTH
                tokens[ends] = generator.choice(ending, int(ends.sum()))
                writer.add(TokenizedDocument(tokens, segment_ends(tokens, rule), DOCUMENT_TOKENS, ""))
            records.append(writer.finish())
    tokenizer = TokenizerRecord(name="none", fingerprint="0" * 64, vocab_size=VOCAB_SIZE, special_ids={})
    Manifest(tokenizer=tokenizer, rule=rule, dtype="uint16", shards=tuple(records), source={}).save(folder)
    return TokenDataset(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megatokens", type=int, default=256, metavar="M", help="tokens (default: %(default)s million)"
    )
    parser.add_argument("--workers", default="1,2", metavar="N,N,...", help="to compare (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="times each (default: %(default)s)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to put the data (default: a temporary one)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
