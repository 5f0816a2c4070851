"""Insert defects into a copy of the tree, one at a time, and run the tests that must detect them.

    python -m tests.mutations [--only NAME ...]

The table is mutations.yaml. First the tests run on the unchanged copy, where all of them must pass. Exit code 1 if a
mutation survives, or an entry of the table does not fit the tree.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.helpers.paths import ROOT

TABLE = Path(__file__).with_name("mutations.yaml")
TIME_LIMIT_S = 900
CAUGHT = "caught"
TESTS_FAILED = 1  # exit code of pytest; others mean that the tests could not run


class Mutation(NamedTuple):
    """One entry of the table."""

    name: str
    file: str
    code: str
    change: str
    breaks: str
    tests: list[str]
    only: str = ""

    def mutated(self, root: Path) -> str:
        """Return the content of the file with the defect in it.

        Raises:
            LookupError: the entry does not fit the tree; the message says how.
        """
        for name in (self.file, *self.tests):
            if not (root / name).is_file():
                raise LookupError(f"{name} does not exist: give the file's new name")
        tests = "".join((root / name).read_text("utf-8") for name in self.tests)
        for part in filter(None, self.only.split(" or ")):
            if not re.search(rf"def test_\w*{part}", tests):
                raise LookupError(f"no test of {', '.join(self.tests)} has {part!r} in its name: correct `only`")
        source = (root / self.file).read_text("utf-8")
        if (found := source.count(self.code)) != 1:
            raise LookupError(
                f"this code is {found} times in {self.file}, and must be there once; copy it from the file as it "
                f"now is, change it so that the contract breaks ({self.breaks}):\n    {self.code.strip()}"
            )
        return source.replace(self.code, self.change)


def load_table() -> list[Mutation]:
    """Return the mutations in the order of the table."""
    return [Mutation(name, **values) for name, values in yaml.safe_load(TABLE.read_text("utf-8")).items()]


def copy_tree(folder: Path) -> None:
    """Copy the files that git tracks, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # not deleted since
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(root: Path, tests: Sequence[str], only: str = "") -> tuple[int | None, str]:
    """Return pytest's exit code (None after a timeout) and its output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    command += ["-k", only] if only else []
    # Bytecode files are matched by size and second, so that a mutation could be mistaken for the previous file.
    settings = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=root, env=os.environ | settings, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code: int | None = process.wait(TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all remaining ranks
            process.wait()
        output.seek(0)
        return code, output.read()


def failures_unchanged(root: Path, mutations: Sequence[Mutation]) -> str:
    """Return the output of tests that fail without any mutation; empty if all pass."""
    files: Mapping[str, dict[str, None]] = defaultdict(dict)
    for mutation in mutations:
        files[mutation.only].update(dict.fromkeys(mutation.tests))
    for only, tests in files.items():
        code, output = run_tests(root, list(tests), only)
        if code != 0:
            return output
    return ""


def judge(root: Path, mutation: Mutation) -> str:
    """Run a mutation's tests; return which of them caught it, or what was wrong."""
    path = root / mutation.file
    original = path.read_text("utf-8")
    path.write_text(mutation.mutated(root), "utf-8")
    try:
        code, output = run_tests(root, mutation.tests, mutation.only)
    finally:
        path.write_text(original, "utf-8")
    if code is None:
        return f"{CAUGHT} by the time limit of {TIME_LIMIT_S} s"
    if code == TESTS_FAILED:
        return f"{CAUGHT} by {' '.join(re.findall(r'^(?:FAILED|ERROR) (.+?)(?: - .*)?$', output, re.MULTILINE))}"
    if code == 0:
        return f"SURVIVED: {mutation.breaks} No test of {', '.join(mutation.tests)} noticed."
    return f"NOT RUN: pytest ended with exit code {code}\n{output[-2000:]}"


def main() -> int:
    """Print the result of each mutation, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    table = {mutation.name: mutation for mutation in load_table()}
    parser.add_argument("--only", nargs="+", choices=table, default=list(table), metavar="NAME", help="names of these")
    chosen = [table[name] for name in parser.parse_args().only]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "tree"
        copy_tree(root)
        misfits = 0
        for mutation in chosen:
            try:
                mutation.mutated(root)
            except LookupError as error:
                misfits += 1
                print(f"{mutation.name}: repair its entry in {TABLE.relative_to(ROOT)}: {error}")
        if misfits:
            return 1
        if output := failures_unchanged(root, chosen):
            print(f"{output}\nTests fail without any mutation: see above.")
            return 1
        num_caught = 0
        for mutation in chosen:
            began_s = time.monotonic()
            verdict = judge(root, mutation)
            num_caught += verdict.startswith(CAUGHT)
            print(f"{mutation.name} ({time.monotonic() - began_s:.0f} s): {verdict}", flush=True)
    print(f"{num_caught} of {len(chosen)} mutations caught")
    return int(num_caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
