"""What every command shares: log set-up and exit codes (0 done, 1 failed, 2 the user can fix it)."""

import logging
import sys
from collections.abc import Callable

from megatron_bipe.errors import BipeError


def run_tool(main: Callable[[], None]) -> None:
    """Run `main` and leave the process with the exit code its outcome stands for."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        main()
    except BipeError as error:
        sys.exit(_say(f"{type(error).__name__}: {error}"))
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(1)


def _say(message: str) -> int:
    sys.stderr.write(message + "\n")
    return 2
