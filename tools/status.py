"""Show the state of runs: progress, ages, loss, speed, restarts, expected end, disk space.

Exit code 0: all is well; 1: a run needs attention: it stalled, failed or was killed, or its disk is nearly full.

Example: python tools/status.py runs/* --stalled-after 30m --prometheus /var/lib/node_exporter/bipe.prom
"""

import argparse
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from _cli import check_output_file, command
from megatron_bipe.errors import FAILED, CheckpointError, ConfigError
from megatron_bipe.io import write_atomically
from megatron_bipe.monitor.status import Limits, RunStatus, read_status
from megatron_bipe.monitor.status_text import as_json, as_prometheus, as_table
from megatron_bipe.runtime.preemption import parse_duration

_log = logging.getLogger(__name__)


@command
def main(argv: Sequence[str] | None) -> None:
    given = _parser().parse_args(argv)
    if given.least_free_gib is not None and not 0 <= given.least_free_gib < math.inf:
        raise ConfigError(
            f"--least-free-gib is {given.least_free_gib:g}", remedy="Give 0 or more", location="--least-free-gib"
        )
    if given.prometheus:
        check_output_file(given.prometheus, overwrite=True)
    stalled_after_s = parse_duration(given.stalled_after, "--stalled-after") if given.stalled_after else None
    limits, now_s = Limits(stalled_after_s, given.least_free_gib), time.time()
    runs = _read(given.run_dir, limits, now_s)
    if given.prometheus:
        write_atomically(given.prometheus, as_prometheus(runs).encode())
    print(as_json(runs) if given.json else as_table(runs, now_s))
    sys.exit(FAILED if any(run.problems for run in runs) else 0)


def _read(run_dirs: Sequence[Path], limits: Limits, now_s: float) -> list[RunStatus]:
    """Return the states of runs; among several, folders that are not of a run are skipped: one must not hide others."""
    runs, refused = [], []
    for run_dir in dict.fromkeys(run_dirs):
        try:
            runs.append(read_status(run_dir, limits, now_s))
        except CheckpointError as error:
            if not run_dir.exists():
                raise
            refused.append(error)
    if refused and not runs:
        raise refused[0]
    for problem in refused:
        _log.warning("skipped: %s", problem)
    return runs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run_dir", type=Path, nargs="+", metavar="RUN_DIR", help="folders of runs")
    stalled = "age of the last sign of progress at which a launch is stalled (default: parallel.timeout_s of the run)"
    add("--stalled-after", metavar="TIME", help=stalled)
    free = "least free disk space in GiB (default: the next checkpoint and checkpoint.min_free_gib)"
    add("--least-free-gib", type=float, metavar="GIB", help=free)
    add("--json", action="store_true", help="print JSON, with times in seconds since 1970")
    add("--prometheus", type=Path, metavar="FILE", help="also write a text file for Prometheus' node exporter")
    return parser


if __name__ == "__main__":
    sys.exit(main())
