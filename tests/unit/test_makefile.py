"""The set-up by `make`, and its output, with a Python that only records pip's arguments."""

import shutil
import subprocess

import pytest

from tests.helpers.paths import ROOT

PYTHON = """#!/bin/sh
case "$*" in
    "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo venv >> asked;;
    "-m pip install "*) shift 3; echo "$*" >> asked; echo "WARNING: of pip" >&2
        case "$*" in *"$(cat refused 2>/dev/null || echo nothing)"*) exit 1;; esac;;
esac
"""
TORCH, OTHERS, EXTRAS = "setuptools wheel torch==", "-e .", "-e .[dev,mpi]"


@pytest.fixture
def folder(tmp_path):
    """Return a copy of the files that a set-up reads."""
    made = tmp_path / "project"
    made.mkdir()
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "setup.py"):
        shutil.copy2(ROOT / name, made)
    (made / "python").write_text(PYTHON)
    (made / "python").chmod(0o755)
    return made


def make(folder, target, code=0):
    """Run make; return pip's arguments, shortened, and the output."""
    asked = folder / "asked"
    asked.write_text("")
    command = ["make", target, f"PYTHON={folder}/python"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode == 0) == (code == 0), done.stderr
    found = [line.partition("constraints.txt ")[2] or line for line in asked.read_text().splitlines()]
    return [TORCH if line.startswith(TORCH) else line for line in found], done.stdout + done.stderr


def test_quickstart_installs_what_running_needs_and_others_add_the_rest(folder):
    first, shown = make(folder, "quickstart")
    assert first == ["venv", TORCH, OTHERS]
    assert "WARNING" not in shown  # of what went well
    assert make(folder, "test")[0] == [EXTRAS]
    assert make(folder, "lint", code=2)[0] == make(folder, "quickstart")[0] == []  # there is no ruff
    folder.joinpath("pyproject.toml").touch()
    assert make(folder, "setup")[0] == [TORCH, OTHERS, EXTRAS]


def test_failed_setup_shows_the_log_and_is_repeated(folder):
    (folder / "refused").write_text(OTHERS)
    assert "WARNING: of pip" in make(folder, "quickstart", code=2)[1]
    (folder / "refused").unlink()
    assert make(folder, "quickstart")[0] == ["venv", TORCH, OTHERS]


def test_failed_extras_keep_the_quickstart_and_are_installed_again(folder):
    (folder / "refused").write_text("dev")
    assert make(folder, "setup", code=2)[0] == ["venv", TORCH, OTHERS, EXTRAS]
    assert make(folder, "quickstart")[0] == []
    (folder / "refused").unlink()
    assert make(folder, "setup")[0] == ["venv", TORCH, OTHERS, EXTRAS]


def test_moved_setup_is_repeated(folder):
    make(folder, "setup")
    moved = folder.rename(folder.with_name("elsewhere"))
    assert make(moved, "quickstart")[0] == ["venv", TORCH, OTHERS]
    assert make(moved, "setup")[0] == [EXTRAS]
