"""The error family: every message says what was seen, the rule, the remedy and the location.

Command-line tools turn a `BipeError` into exit code 2 (the user can fix it); any other exception is
a defect or a broken machine and leaves with code 1 and a traceback.
"""

from pathlib import Path
from typing import Any


class BipeError(Exception):
    """Base of all errors that the user can fix.

    Args:
        message: what was seen and the rule it breaks.
        remedy: what to do about it, as an imperative sentence.
        location: the file, field or command the message is about.
    """

    def __init__(self, message: str, *, remedy: str = "", location: str | Path = "") -> None:
        self.message = message
        self.remedy = remedy
        self.location = str(location)
        text = " ".join(_sentence(part) for part in (message, remedy) if part)
        super().__init__(f"{text}  [{self.location}]" if self.location else text)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process whole."""
        return _rebuilt, (type(self), self.message, self.remedy, self.location)


def _rebuilt(kind: type[BipeError], message: str, remedy: str, location: str) -> BipeError:
    return kind(message, remedy=remedy, location=location)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."


class ConfigError(BipeError):
    """A run configuration, a DeepSpeed configuration, or a combination of both, is impossible."""


class DataError(BipeError):
    """Raw text, a tokenizer or a dataset on disk is missing, damaged or not what was expected."""


class CheckpointError(BipeError):
    """A checkpoint or an exported model is missing, damaged or belongs to something else."""


class HealthError(BipeError):
    """Training goes wrong again and again, and nothing is left that it could do about it."""


class DivergenceError(BipeError):
    """Ranks that must hold the same numbers do not."""
