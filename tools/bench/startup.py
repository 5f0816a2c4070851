"""What opening a large corpus costs: time to the first batch and peak memory of a fresh process, by shards.

Datasets of 300 billion tokens are sparse files: real sizes, real headers, no data. The first batch goes to all of the
corpus, so it maps as many shards as it has windows. The table is of one process a row.

Example: python tools/bench/startup.py --folder /scratch
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._machine import describe_machine
from megatron_bipe.config.schema import DataConfig
from megatron_bipe.data.blend import open_blend
from megatron_bipe.data.collate import make_batch
from megatron_bipe.data.manifest import FileRecord, Manifest, ShardRecord, TokenizerRecord
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.data.shard_layout import (
    DTYPE_CODES,
    FORMAT_VERSION,
    IDX_HEADER,
    IDX_MAGIC,
    IDX_VERSION,
    SEG_HEADER,
    SEG_MAGIC,
    IdxHeader,
    Suffix,
    choose_dtype,
    packed_bytes,
    shard_path,
)
from megatron_bipe.runtime.child_processes import run_command

BATCH, SEQ_LEN, CLIP, BATCHES = 256, 1024, 1023, 20  # the 151M recipe
VOCAB_SIZE = 32000
DOCUMENT_TOKENS, SEGMENT_TOKENS = 1400, 14  # about what the Pile has
MEMBERS = 22  # of the Pile


@command
def main(argv: Sequence[str] | None) -> None:
    """Make each corpus, open it in a process of its own, print a line."""
    arguments = _parser().parse_args(argv)
    if arguments.open:
        print(json.dumps(open_and_draw(arguments.open)))
        return
    num_tokens = arguments.gigatokens * 1_000_000_000
    print(describe_machine("numpy", "torch", "pydantic"))
    print(f"{arguments.gigatokens}G tokens, batches of {BATCH} windows of {SEQ_LEN}; seconds, after the imports\n")
    print(f"{'corpus':34} {'open':>8} {'1st batch':>10} {'together':>9} {'batch':>8} {'peak MB':>9} {'imports MB':>11}")
    corpora = [(1, shards) for shards in arguments.shards] + [(MEMBERS, arguments.shards[0])]
    for members, shards in corpora:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            folders = [Path(folder) / f"set-{member:02d}" for member in range(members)]
            for member in folders:
                make_sparse(member, num_tokens // members, max(1, shards // members))
            _print_row(f"{members} x {max(1, shards // members):,} shards", _in_fresh_process(folders))


def open_and_draw(folders: Sequence[Path]) -> dict[str, float]:
    """Seconds to open a blend and to draw its first batch, as a training process does; peak memory in MB."""
    imports_mb = _peak_mb()
    began_s = time.perf_counter()
    data = DataConfig(path=tuple(map(str, folders)))
    blend = open_blend(data, SEQ_LEN, seed=0)
    opened_s = time.perf_counter()
    make_batch(blend, blend.sequence_indices(0, BATCH), SEQ_LEN, CLIP)
    drawn_s, peak_mb = time.perf_counter(), _peak_mb()
    for number in range(1, BATCHES + 1):
        make_batch(blend, blend.sequence_indices(number * BATCH, BATCH), SEQ_LEN, CLIP)
    batch_s = (time.perf_counter() - drawn_s) / BATCHES
    return {
        "open_s": opened_s - began_s,
        "first_s": drawn_s - opened_s,
        "batch_s": batch_s,
        "peak_mb": peak_mb,
        "imports_mb": imports_mb,
    }


def make_sparse(folder: Path, num_tokens: int, num_shards: int) -> None:
    """A dataset whose files have their headers and lengths, and holes for the rest."""
    folder.mkdir()
    dtype = choose_dtype(VOCAB_SIZE)
    records = []
    for number in range(num_shards):
        tokens = num_tokens // num_shards
        documents = tokens // DOCUMENT_TOKENS
        idx = IDX_HEADER.pack(IDX_MAGIC, IDX_VERSION, DTYPE_CODES[dtype], documents, documents + 1)
        files: dict[Suffix, tuple[bytes, int]] = {
            "bin": (b"", tokens * dtype.itemsize),
            "idx": (idx, IdxHeader(dtype, documents).file_bytes),
            "seg": (SEG_HEADER.pack(SEG_MAGIC, FORMAT_VERSION, tokens), SEG_HEADER.size + packed_bytes(tokens)),
        }
        name = f"sparse-{number:05d}"
        for suffix, (head, num_bytes) in files.items():
            with shard_path(folder, name, suffix).open("wb") as stream:
                stream.write(head)
                stream.truncate(num_bytes)
        sums = {suffix: FileRecord(bytes=size, sha256=f"{number:064x}") for suffix, (_, size) in files.items()}
        segments, text_bytes = tokens // SEGMENT_TOKENS, 4 * tokens
        records.append(
            ShardRecord(
                name=name, documents=documents, tokens=tokens, segments=segments, text_bytes=text_bytes, files=sums
            )
        )
    tokenizer = TokenizerRecord(name="none", fingerprint="0" * 64, vocab_size=VOCAB_SIZE, special_ids={})
    rule = SegmentRule(spec="newline", token_ids=(13,))
    Manifest(tokenizer=tokenizer, rule=rule, dtype="uint16", shards=tuple(records), source={}).save(folder)


def _in_fresh_process(folders: Sequence[Path]) -> dict[str, float]:
    command = [sys.executable, __file__, "--open", *map(str, folders)]
    done = run_command(command, stdout=PIPE, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _print_row(label: str, figures: dict[str, float]) -> None:
    opened_s, first_s = figures["open_s"], figures["first_s"]
    print(
        f"{label:34} {opened_s:8.3f} {first_s:10.3f} {opened_s + first_s:9.3f} {figures['batch_s']:8.3f} "
        f"{figures['peak_mb']:9.0f} {figures['imports_mb']:11.0f}",
        flush=True,
    )


def _peak_mb() -> float:
    """Largest resident memory so far; what `resource` reports would include that of the process before."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, help="where the sparse files lie for a while (default: the folder for temporary files)")
    add("--gigatokens", type=int, default=300, metavar="G", help="tokens (default: %(default)s billion)")
    add("--shards", type=int, nargs="+", default=[280, 1200, 10_000], help="(default: %(default)s)")
    add("--open", type=Path, nargs="+", metavar="FOLDER", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
