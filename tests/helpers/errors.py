"""Assertions on user-facing errors: their type, their location and what they observed, not their wording."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_bipe.errors import BipeError


@contextmanager
def raises(
    kind: type[BipeError], *observed: object, location: str | Path | None = None, remedy: object = None
) -> Iterator[pytest.ExceptionInfo[BipeError]]:
    """Expect an error of exactly this type in the block.

    Args:
        kind: the type of the error.
        observed: values that the message must report, such as a number, a name, a path, a setting; an `int` is not
            found among the digits of another number.
        location: of the error; a path may be relative to the folder of the location.
        remedy: a name that the remedy must mention, such as an option or a command.
    """
    with pytest.raises(BipeError) as caught:
        yield caught
    assert_error(caught.value, kind, *observed, location=location, remedy=remedy)


def assert_error(
    error: BaseException,
    kind: type[BipeError],
    *observed: object,
    location: str | Path | None = None,
    remedy: object = None,
) -> None:
    """Assert the type, values, location and remedy of an error, like `raises`."""
    assert type(error) is kind, error
    for value in observed:
        assert _reports(error.message, value), f"{value!s} is not among what was observed: {error}"
    if location is not None:
        assert error.location == str(location) or error.location.endswith(f"/{location}"), error
    assert remedy is None or str(remedy) in error.remedy, error


def assert_warned(caplog: pytest.LogCaptureFixture, *observed: object) -> None:
    """Assert that one warning in the log reports all these values."""
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(all(str(value) in warning for value in observed) for warning in warnings), (observed, warnings)


def _reports(message: str, value: object) -> bool:
    return re.search(rf"(?<!\d){value}(?!\d)", message) is not None if isinstance(value, int) else str(value) in message
