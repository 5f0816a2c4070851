"""Check a GPU in at most 12 minutes: kernels, losses, speed, memory, checkpoints, and the tests of tests/gpu.

Each part is a process of its own with a time limit: one that crashes or overruns has failed, and the others run. The
exit code is 1 if a part failed or a criterion was not met. Aims, which are speeds, are reported only. Without a GPU, or
with BIPE_DEVICE=cpu, the same parts run on the CPU at toy sizes; criteria for GPUs are then not applied.

Example: python tools/gpu_check.py --output gpu-check
"""

import argparse
import importlib
import importlib.metadata
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu.check import Outcome, Part

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = (
    *("torch", "deepspeed", "transformers", "tokenizers", "sentencepiece", "safetensors", "accelerate", "numpy"),
    *("orjson", "psutil", "zstandard", "pydantic", "pyyaml", "httpx2", "tensorboard", "matplotlib"),
    *("pytest", "hypothesis"),  # of the part `tests`
)


def main(argv: Sequence[str] | None = None) -> int:
    missing = missing_packages()
    if missing:
        sys.stderr.write(
            f"Packages are missing: {', '.join(missing)}. Install them: pip install {' '.join(missing)}; without a "
            "network, from a folder with their wheels: pip install --no-index --find-links FOLDER "
            f"{' '.join(missing)}  [{sys.executable}]\n"
        )
        return 2
    _use_this_checkout()
    from _cli import command  # imports packages of the list

    return command(run_check)(argv)


def _use_this_checkout() -> None:
    """Let this process and those that it starts import the package that is next to this tool, installed or not."""
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def missing_packages() -> list[str]:
    return [package for package in REQUIRED if not _is_installed(package)]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def run_check(argv: Sequence[str] | None) -> None:
    from gpu.parts import PARTS

    parser = _parser([part.name for part in PARTS])
    arguments = parser.parse_args(argv)
    if arguments.run_part:
        from gpu.check import Check

        module, _, function = arguments.run_part.partition(":")
        getattr(importlib.import_module(module), function)(Check(arguments.output))
        return
    from gpu.report import as_table, docs_rows, today, write_docs, write_results

    wanted = [p for p in PARTS if p.name in (arguments.only or [p.name]) and p.name not in arguments.skip]
    if not wanted:
        parser.error("--skip leaves no part to run")
    on_gpu = _is_on_gpu(arguments.write_docs)
    _prepare_output(arguments.output)
    line = shlex.join(["python", "tools/gpu_check.py", *(sys.argv[1:] if argv is None else argv)])
    outcomes: list[Outcome] = []
    for outcome in run_parts(wanted, arguments.output, on_gpu):
        outcomes.append(outcome)
        write_results(arguments.output, outcomes, line)  # after each part: the check may be interrupted
        (arguments.output / "table.txt").write_text(as_table(outcomes, on_gpu), encoding="utf-8")
    text = as_table(outcomes, on_gpu)
    print(f"\n{text}\nWritten: {arguments.output}")
    if arguments.write_docs:
        write_docs(arguments.write_docs, docs_rows(outcomes, line, today()))
    sys.exit(any(outcome.is_failed for outcome in outcomes))


def run_parts(parts: "Sequence[Part]", output: Path, on_gpu: bool) -> "Iterator[Outcome]":
    """Run parts one after the other, within the time that all of them have, and yield how each ended."""
    from gpu.check import run_part
    from gpu.parts import CPU_PATIENCE, TOTAL_S
    from megatron_bipe.runtime.child_processes import signals_noted

    patience = 1 if on_gpu else CPU_PATIENCE
    until_s = time.monotonic() + TOTAL_S * patience
    with signals_noted() as check_signals:
        for part in parts:
            limit_s = min(part.limit_s * patience, until_s - time.monotonic())
            outcome = run_part(part, output / part.name, limit_s, on_gpu, check_signals)
            print(f"{part.name}: {outcome.failure or 'done'}, {outcome.seconds:.0f} s", flush=True)
            yield outcome


def _is_on_gpu(write_docs: Path | None) -> bool:
    from gpu.report import split_page
    from megatron_bipe.errors import ConfigError
    from megatron_bipe.runtime.hardware import device_type

    on_gpu = device_type() == "cuda"
    if write_docs and not on_gpu:
        raise ConfigError(
            "the device is a CPU, and the page is about GPUs", remedy="Run it on a GPU", location="--write-docs"
        )
    if write_docs:
        split_page(write_docs)  # raises an error before the parts run, not after them
    return on_gpu


def _prepare_output(folder: Path) -> None:
    """Create the output folder, or empty that of an earlier check."""
    from gpu.report import RESULTS
    from megatron_bipe.errors import ConfigError

    if folder.exists() and any(folder.iterdir()):
        if not (folder / RESULTS).is_file():
            raise ConfigError(
                "the folder has files, but no results of an earlier check", remedy="Use another", location=folder
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS).write_text("{}\n")  # so that an interrupted check can be repeated


def _absolute(path: str) -> Path:
    return Path(path).absolute()


def _parser(names: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=names, metavar="PART", help=f"run these parts: {', '.join(names)}")
    add("--skip", nargs="+", choices=names, default=[], metavar="PART", help="do not run these parts")
    # Parts run in the repository's folder, so paths are absolute.
    add("--output", type=_absolute, default="gpu-check", metavar="DIR", help="(default: %(default)s)")
    add(
        "--write-docs",
        nargs="?",
        type=_absolute,
        const=ROOT / "docs" / "performance.md",
        metavar="PAGE",
        help="write the rows of this page (default: docs/performance.md); only on a GPU",
    )
    add("--run-part", help=argparse.SUPPRESS)  # MODULE:FUNCTION: run a part in this process
    return parser


if __name__ == "__main__":
    sys.exit(main())
