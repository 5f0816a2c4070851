"""Collect a small real corpus, code and prose, from the sources of Python packages that this project requires.

The text depends only on the versions in constraints.txt and on the options: for equal ones, the fingerprint that is
printed at the end is the same on every machine.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from _cli import command
from megatron_bipe.errors import DataError
from preprocessing.local_corpus import SOURCES, collect, corpus_files, find_sources, list_sources, write_corpus

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
_log = logging.getLogger(__name__)


@command
def main(argv: Sequence[str] | None) -> None:
    options = _parse(argv)
    _refuse_to_overwrite(options.output, options.overwrite)
    distributions, differences = find_sources(_read_pins())
    if differences:
        _log.warning(
            "The text differs from that of the versions in %s: %s. Run make setup for the same text.",
            CONSTRAINTS.name,
            ", ".join(differences),
        )
    sources = list_sources(distributions)
    progress = tqdm(sources, unit=" files", desc="corpus", disable=None)  # silent without a terminal
    written = write_corpus(collect(progress, options.max_bytes, options.valid_share), options.output)
    progress.close()
    for (subset, split), size in written.sizes.items():
        print(f"{subset:6}{split:6}{size.documents:7,} documents {size.text_bytes / 1e6:8.2f} MB")
    print(f"fingerprint {written.fingerprint}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nIt is written as train.jsonl.zst and valid.jsonl.zst, with the subsets Code and "
        f"Prose in meta.pile_set_name.\nPackages: {', '.join(SOURCES)}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--max-bytes", type=int, default=24_000_000, help="cap of each subset (default %(default)s)")
    parser.add_argument("--valid-share", type=float, default=0.05, help="share for validation (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    options = parser.parse_args(argv)
    if options.max_bytes <= 0 or not 0 < options.valid_share < 1:
        parser.error("--max-bytes must be positive, and --valid-share between 0 and 1")
    return options


def _read_pins() -> dict[str, str]:
    """Return name -> version."""
    lines = CONSTRAINTS.read_text("utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))


def _refuse_to_overwrite(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise DataError("output is not a folder", remedy="Choose another", location=output)
    existing = [path for path in corpus_files(output) if path.exists()]
    if existing and not overwrite:
        raise DataError(
            "output exists already", remedy="Pass --overwrite, or choose another folder", location=existing[0]
        )


if __name__ == "__main__":
    sys.exit(main())
