"""Two tiers of parametrized tests that share one launch, which contains slow cases only if these were selected."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow(values: Iterable[Any]) -> list[Any]:
    """Return the values as parameters whose tests are marked slow."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def selected(request: pytest.FixtureRequest, name: str) -> list[Any]:
    """Return the distinct values of a parameter in the tests of this file that this session runs, in their order."""
    values: list[Any] = []
    for item in request.session.items:
        if item.path == request.path and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            value = item.callspec.params.get(name)
            if value is not None and value not in values:
                values.append(value)
    return values
