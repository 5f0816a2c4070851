"""How far a long read has come: a bar on a terminal, a line every half minute elsewhere."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY_S = 30.0

log = logging.getLogger(__name__)


class Progress:
    """Shows share done, MB of text a second and time left.

    Args:
        total_bytes: of the input files as they lie on disk.
        what: the work, for the line's head.
        quiet: show nothing: another process does.
    """

    def __init__(self, total_bytes: int, what: str, quiet: bool = False) -> None:
        self._total_bytes = total_bytes
        self._what = what
        self._done_bytes = self._text_bytes = 0
        self._began_s = self._last_line_s = time.monotonic()
        self._quiet = quiet
        show_bar = sys.stderr.isatty() and not quiet
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc=what, disable=not show_bar)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, done_bytes: int, text_bytes: int) -> None:
        """Count more work.

        Args:
            done_bytes: read from disk, since the last call.
            text_bytes: of text handled, since the last call.
        """
        self._done_bytes += done_bytes
        self._text_bytes += text_bytes
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{self.text_mb_per_s:.1f} MB/s of text", refresh=False)
            self._bar.update(done_bytes)
        elif not self._quiet and time.monotonic() - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            log.info(self.line())

    @property
    def text_mb_per_s(self) -> float:
        """Megabytes of text a second, so far."""
        return self._text_bytes / 1e6 / max(time.monotonic() - self._began_s, 1e-9)

    def line(self) -> str:
        """One line for a log."""
        share = self._done_bytes / max(self._total_bytes, 1)
        passed_s = time.monotonic() - self._began_s
        left_s = passed_s / share - passed_s if share > 0 else 0.0
        return (
            f"{self._what}: {share:.1%}, {self._text_bytes / 1e6:.1f} MB of text at {self.text_mb_per_s:.2f} MB/s, "
            f"{left_s / 60:.1f} min left"
        )
