"""Collect a small real corpus, code and prose, from the Python libraries on this machine."""

import argparse
from pathlib import Path

from tqdm import tqdm

from _cli import run_tool
from megatron_bipe.errors import DataError
from preprocessing.local_corpus import collect, corpus_files, list_sources, python_roots, write_corpus


def main() -> None:
    """Parse, collect, write, and say what came out."""
    parser = argparse.ArgumentParser(
        description="Collect code and prose from Python's own library and the installed packages, as "
        "train.jsonl.zst and valid.jsonl.zst with the subsets Code and Prose in meta.pile_set_name."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--max-bytes", type=int, default=24_000_000, help="cap of each subset (default %(default)s)")
    parser.add_argument("--valid-share", type=float, default=0.05, help="share for validation (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    options = parser.parse_args()
    if options.max_bytes <= 0 or not 0 < options.valid_share < 1:
        parser.error("--max-bytes must be positive, and --valid-share between 0 and 1")
    _refuse_to_overwrite(options.output, options.overwrite)
    sources = tqdm(
        list_sources(python_roots()), unit=" files", desc="corpus", disable=None
    )  # silent without a terminal
    tallies = write_corpus(collect(sources, options.max_bytes, options.valid_share), options.output)
    sources.close()
    for (subset, split), tally in tallies.items():
        print(f"{subset:6}{split:6}{tally.documents:7,} documents {tally.text_bytes / 1e6:8.2f} MB")


def _refuse_to_overwrite(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise DataError("output is no folder", remedy="Choose another", place=output)
    existing = [path for path in corpus_files(output) if path.exists()]
    if existing and not overwrite:
        raise DataError("output exists already", remedy="Pass --overwrite, or choose another folder", place=existing[0])


if __name__ == "__main__":
    run_tool(main)
