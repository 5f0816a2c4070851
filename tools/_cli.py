"""What every command shares: log set-up and exit codes (0 done, 1 failed, 2 the user can fix it).

A command answers `--help` and errors in its arguments at once: its file imports at the top only what is needed for
these. Torch, transformers and others that take long are imported by the functions that use them.
"""

import argparse
import functools
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_bipe.errors import BipeError, CheckpointError, DataError
from megatron_bipe.runtime.environment import prepare_environment


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """Decorate a command's `main(argv)`: it then logs to stderr, reports errors and returns its exit code.

    Tests call it like any function; a script ends with `sys.exit(main())`, which reads the process's arguments.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        try:
            prepare_environment()  # before main imports torch
            main(argv)
            sys.stdout.flush()
        except SystemExit as end:  # of argparse, or of a command that chooses its exit code
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except BipeError as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            return 2
        except BrokenPipeError:
            if not _stdout_has_lost_its_reader():  # some other pipe broke: that of a worker that died, for instance
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt:
            sys.stderr.write("Interrupted.\n")
            return 1
        return 0

    return run


def _stdout_has_lost_its_reader() -> bool:
    """Return whether stdout is a pipe whose reader has seen enough, as in `... | head`."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def check_output_file(file: Path, overwrite: bool) -> None:
    """Refuse a file that cannot be written, before the work starts.

    Raises:
        DataError: it is a folder or in none, or it is there and may not be replaced.
    """
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise DataError("This is no file in an existing folder", remedy="Name another file", location=file)
    if file.exists() and not overwrite:
        raise DataError("The file exists", remedy="Name another, or add --overwrite to replace it", location=file)


def check_model_folder(folder: Path, remedy: str = "Make one with tools/export_hf.py") -> None:
    """Refuse a folder without a Hugging Face model, before transformers is imported to read it.

    Raises:
        CheckpointError: there is no `config.json`.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError("no exported model here", remedy=remedy, location=folder)


def add_max_malformed(parser: argparse.ArgumentParser) -> None:
    """The option of every command that reads raw text."""
    parser.add_argument(
        "--max-malformed",
        type=int,
        metavar="N",
        help="malformed lines to let pass (default: 10, or 1%% of the lines read so far if that is more)",
    )


def parse_range(text: str) -> range:
    """`3` -> 3 alone; `1..6` -> 1 to 6."""
    first, dots, last = text.partition("..")
    if not all(bound.isascii() and bound.isdigit() for bound in (first, last if dots else first)):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of whole numbers, such as 1..6")
    return range(int(first), int(last if dots else first) + 1)
