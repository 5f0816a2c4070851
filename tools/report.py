"""Write a page about a run, or one that compares several: a single HTML file without scripts or other files.

Only the run folders are read, so the runs may be training, stopped or killed, on this machine or another.

Examples:
    python tools/report.py runs/bipe_rope_151m --output page.html
    python tools/report.py runs/rope runs/bipe_rope --output comparison.html --overwrite
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from _cli import check_output_file, command
from megatron_bipe.io import write_atomically


@command
def main(argv: Sequence[str] | None) -> None:
    given = _parser().parse_args(argv)
    check_output_file(given.output, given.overwrite)

    from megatron_bipe.monitor.history import read_history
    from megatron_bipe.monitor.run_page import run_page

    html = run_page([read_history(run_dir) for run_dir in given.run_dirs], time.time())
    write_atomically(given.output, html.encode())
    print(f"{given.output}: {len(html.encode()) / 1e6:.1f} MB")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run")
    parser.add_argument("--output", type=Path, required=True, metavar="PAGE.html", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
