"""Common parts of all commands: log set-up, exit codes (0 done, 1 failed, 2 the user can fix it), shared options.

A command answers `--help` and errors in its arguments at once: its file imports at the top only what these need.
Functions import torch, transformers and other slow packages where they use them.
"""

import argparse
import functools
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_bipe.config import AUTO, PRECISIONS, Precision
from megatron_bipe.errors import FAILED, BipeError, CheckpointError, ConfigError, DataError, as_user_error, exit_code
from megatron_bipe.picture import FORMATS, WIDTHS_IN, PictureSettings, check_title, parse_formats
from megatron_bipe.runtime.environment import prepare_environment

if TYPE_CHECKING:
    import torch


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
        except SystemExit as end:  # from argparse, or a command that chooses its exit code
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except BrokenPipeError:
            if not _stdout_has_lost_its_reader():  # another pipe broke, such as that of a dead worker
                raise
            _discard_stdout()
        except Exception as error:
            user_error = as_user_error(error)
            if not isinstance(user_error, BipeError):
                raise
            sys.stderr.write(f"{type(user_error).__name__}: {user_error}\n")
            try:
                sys.stdout.flush()
            except OSError:  # stdout is the file that cannot be written
                _discard_stdout()
            return exit_code(user_error)
        except KeyboardInterrupt:
            sys.stderr.write("Interrupted.\n")
            return FAILED
        return 0

    return run


def _discard_stdout() -> None:
    """Redirect stdout, which Python flushes at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stdout_has_lost_its_reader() -> bool:
    """Return True if stdout is a pipe whose reader has exited, as in `... | head`."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def check_output_file(file: Path, overwrite: bool) -> None:
    """Raise `DataError`, before the work starts, if a file cannot be written or may not be replaced."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise DataError("This is not a file in an existing folder", remedy="Name another file", location=file)
    if file.exists() and not overwrite:
        raise DataError("The file exists", remedy="Name another, or add --overwrite to replace it", location=file)


def check_model_folder(folder: Path, remedy: str = "Make one with tools/export_hf.py") -> None:
    """Raise `CheckpointError`, before transformers is imported, if a folder holds no Hugging Face model."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "the folder has no config.json, so it is not an exported model", remedy=remedy, location=folder
        )


def add_line_limits(parser: argparse.ArgumentParser, max_line_bytes: int) -> None:
    """Add the limits on the lines of raw text; `max_line_bytes` is the default of `--max-line-bytes`."""
    parser.add_argument(
        "--max-line-bytes",
        type=int,
        default=max_line_bytes,
        metavar="N",
        help="longest line, or text file, to accept; a longer one is an error (default: %(default)s)",
    )
    parser.add_argument(
        "--max-malformed",
        type=int,
        metavar="N",
        help="malformed lines to allow (default: 10, or 1%% of the lines read so far if that is more)",
    )


def parse_range(text: str) -> range:
    """Parse `3` as 3 alone, and `1..6` as 1 to 6."""
    first, dots, last = text.partition("..")
    if not all(bound.isascii() and bound.isdigit() for bound in (first, last if dots else first)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of whole numbers, such as 1..6")
    return range(int(first), int(last if dots else first) + 1)


def add_device_options(parser: argparse.ArgumentParser, dtype: Precision | None = "fp32") -> None:
    """Add both options; `dtype` is the default of `--dtype`, None: the command takes that of the run."""
    parser.add_argument("--device", default=AUTO, help="auto (the default), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype",
        choices=PRECISIONS,
        default=dtype,
        help="precision the model runs in; auto: bf16 if the device multiplies it natively "
        f"(default: {dtype or 'train.precision of the run'})",
    )


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that the folder names, with your permissions (default: such code is refused or ignored)",
    )


def pick_device(name: str) -> str:
    """Return the torch device of a `--device` option; `auto` is `BIPE_DEVICE`, else a GPU if there is one."""
    import torch

    from megatron_bipe.runtime.hardware import device_type

    if name == AUTO:
        return device_type()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r}: {reason}", remedy="Use auto, cpu or cuda", location="--device") from error
    return name


def pick_dtype(name: Precision, device: str) -> "torch.dtype":
    """Return the torch dtype of a `--dtype` option for a model on that device, and warn if bf16 is slow there."""
    import torch

    from megatron_bipe.runtime.hardware import DTYPES, choose_precision

    return DTYPES[choose_precision(name, torch.device(device), "--dtype").precision]


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that write pictures with other files; `picture_settings` reads them."""
    formats = ",".join(FORMATS)
    add = parser.add_argument
    add("--formats", default=formats, metavar="NAME,...", help="formats of the pictures (default: %(default)s)")
    add_title_options(parser)


def add_title_options(parser: argparse.ArgumentParser) -> None:
    """Add title and width of pictures."""
    add = parser.add_argument
    add("--title", default="", metavar="TEXT", help="title of the picture (default: made from the data's name)")
    widths = " or ".join(f"{name}: {width} in" for name, width in WIDTHS_IN.items())
    add("--width", choices=list(WIDTHS_IN), default="page", help=f"{widths}, of a paper with two columns (page)")


def picture_settings(given: argparse.Namespace) -> PictureSettings:
    """Return the settings that the options of pictures give; raise `ConfigError` if there are no such pictures."""
    check_title(given.title)
    formats = parse_formats(given.formats) if "formats" in given else FORMATS
    return PictureSettings(formats, given.title, given.width, given.y if "y" in given else "perplexity")
