"""The scripts of tools/ as modules, to be tested in this process."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@contextmanager
def script(name: str) -> Iterator[ModuleType]:
    """tools/NAME.py, from the repository's root as the working folder; scripts find those beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        patch.chdir(ROOT)
        spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "tools" / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
