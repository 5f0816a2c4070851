"""Progress of a long read: a bar on a terminal, a log line every half minute elsewhere."""

import logging
import sys
import time
from typing import Self

from tqdm import tqdm

LINE_EVERY_S = 30.0

log = logging.getLogger(__name__)


class Progress:
    """Display of the fraction of the bytes on disk, the MB of text per second and the time left."""

    def __init__(self, total_bytes: int, what: str, quiet: bool = False) -> None:
        self._total_bytes = total_bytes
        self._what = what
        self._done_bytes = self._text_bytes = 0
        self._began_s = self._last_line_s = time.monotonic()
        self._quiet = quiet
        show_bar = sys.stderr.isatty() and not quiet
        self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc=what, disable=not show_bar)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, done_bytes: int, text_bytes: int) -> None:
        """Count bytes read from disk, and bytes of text processed, since the last call."""
        self._done_bytes += done_bytes
        self._text_bytes += text_bytes
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{self.text_mb_per_s:.1f} MB/s of text", refresh=False)
            self._bar.update(done_bytes)
        elif not self._quiet and time.monotonic() - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = time.monotonic()
            log.info(self.summarize())

    @property
    def text_mb_per_s(self) -> float:
        return self._text_bytes / 1e6 / max(time.monotonic() - self._began_s, 1e-9)

    def summarize(self) -> str:
        """Return the progress as one log line."""
        share = self._done_bytes / max(self._total_bytes, 1)
        passed_s = time.monotonic() - self._began_s
        left_s = passed_s / share - passed_s if share > 0 else 0.0
        return (
            f"{self._what}: {share:.1%}, {self._text_bytes / 1e6:.1f} MB of text at {self.text_mb_per_s:.2f} MB/s, "
            f"{left_s / 60:.1f} min left"
        )
