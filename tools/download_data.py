"""Fetch a dataset from the Hugging Face Hub; run again, it resumes and fetches nothing twice.

Example: python tools/download_data.py --output pile --include 'train/0*' val.jsonl.zst
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import command
from preprocessing.hub.plan import DEFAULT, KNOWN, find_known, next_commands

if TYPE_CHECKING:
    from preprocessing.hub.plan import Plan


@command
def main(argv: Sequence[str] | None) -> None:
    arguments = vars(_parser().parse_args(argv))
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs each request, with signed URLs
    dry_run = arguments.pop("dry_run")
    known = find_known(arguments.pop("dataset"))

    from preprocessing.hub.download import download
    from preprocessing.hub.plan import DownloadOptions, make_plan

    options = DownloadOptions(**arguments | {"repo": known.repo, "include": arguments["include"] or known.include})
    if dry_run:
        _show(make_plan(options))
        return
    snapshot, num_fetched = download(options)
    print(
        f"{options.output}: {len(snapshot.files)} file(s) of {snapshot.repo} at commit {snapshot.commit}, "
        f"all complete; {num_fetched} fetched now"
    )
    for next_command in next_commands(known, options.output, (file.path for file in snapshot.files)):
        print(f"Next: {next_command}")


def _show(plan: "Plan") -> None:
    from preprocessing.hub.plan import format_bytes

    print(f"{plan.snapshot.repo} at commit {plan.snapshot.commit}; licence: {plan.snapshot.licence}")
    for file, state, _ in plan.items:
        print(f"  {format_bytes(file.size_bytes):>7}  {state:<13} {file.path}")
    total_bytes = sum(file.size_bytes for file in plan.snapshot.files)
    print(
        f"{len(plan.items)} file(s), {format_bytes(total_bytes)}; to fetch: {format_bytes(plan.fetch_bytes)}; "
        f"free on the disk: {format_bytes(plan.free_bytes)}"
    )
    plan.require_space()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="DIR", help="folder to fill; the files keep their paths in it")
    add(
        "--dataset",
        default=DEFAULT,
        metavar="NAME",
        help=f"dataset repository, OWNER/NAME, or one of {', '.join(KNOWN)} (default: %(default)s)",
    )
    add("--include", nargs="+", default=[], metavar="PATTERN", help="fetch only files that match, e.g. 'train/0*'")
    add("--revision", metavar="REV", help="branch, tag or commit (default: the commit that DIR holds, else main)")
    add("--workers", type=int, default=4, metavar="N", help="files fetched at a time (default: %(default)s)")
    add("--verify", action="store_true", help="read every file again, also those known to be complete")
    add("--overwrite", action="store_true", help="replace files in DIR that differ and did not come from this tool")
    add("--dry-run", action="store_true", help="list files, sizes and free disk space, and fetch nothing")
    add("--endpoint", metavar="URL", help="URL of a mirror of the Hub (default: HF_ENDPOINT, or the Hub)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
