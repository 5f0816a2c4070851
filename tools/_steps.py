"""Run commands of this project, in turn or concurrently; show and log each, and skip those whose result exists."""

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import NamedTuple

from megatron_bipe.config import load_run_config
from megatron_bipe.errors import BipeError, writing
from megatron_bipe.io import write_atomically
from megatron_bipe.runtime.child_processes import ChildProcess, end_all, signals_noted
from megatron_bipe.runtime.distributed_init import free_port
from megatron_bipe.runtime.environment import has_gpu_driver, requested_device

TIMES_FILE = Path("logs/times.json")  # in the folder of the steps
FREE_PORT = "FREE_PORT"  # in a command: a port of this host that nothing listens on, chosen when the command starts
POLL_S = 0.1
LAST_LINES = 20  # lines of a log that are shown when its command fails
TITLES_SHOWN = 4  # of the steps that run concurrently
# Lines of DeepSpeed's log, and warnings whose location is in an installed package, with the source line below them.
_NOISE = re.compile(
    r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\] \[(INFO|WARNING)\] "
    r"|(?P<warning>\S*/(site|dist)-packages/\S+:\d+: \w*Warning: )"
)
_ASSIGNMENT = re.compile(r"(\w+)=(.*)", re.DOTALL)


class Pace(NamedTuple):
    """How the steps of a stage run."""

    at_once: int | None = None
    """Most steps that run at the same time; None: all."""
    keep_going: bool = False
    """Run the other steps after one has failed, except those that need its result; its error is raised at the end."""
    times_file: Path = TIMES_FILE
    """File of the steps' seconds, relative to their folder; commands that run at the same time need one each."""


ALL_AT_ONCE = Pace()


class Step(NamedTuple):
    """One command, and the file that exists once it has succeeded."""

    title: str
    command: list[str]  # may begin with NAME=VALUE, as in a shell: variables of this command alone
    result: Path
    name: str = ""  # prefix of its output lines when it runs concurrently
    needs: Path | None = None  # result of an earlier step; without it this step is skipped
    compares_command: bool = True  # refuse a result of another command; False: the caller compares the result itself


Stage = list[Step]  # steps that run concurrently


class Pattern(NamedTuple):
    """Template of a step, to be filled in with values; `{each}` stands for each of several names in turn."""

    title: str
    command: str
    result: str
    together: bool = False  # run the steps for all names concurrently


FROM_TEXT_TO_DATA: tuple[Pattern, ...] = (
    Pattern(
        "Collect text from the installed packages",
        "python tools/corpus.py --output {out}/raw {corpus}",
        "raw/valid.jsonl.zst",
    ),
    Pattern(
        "Train a tokenizer",
        "python tools/train_tokenizer.py --input {out}/raw/train.jsonl.zst --vocab-size {vocab} "
        "--output {out}/tokenizer",
        "tokenizer/tokenizer.json",
    ),
    Pattern(
        "Tokenize the training text and mark its segments",
        "python tools/preprocess.py --input {out}/raw/train.jsonl.zst --tokenizer {out}/tokenizer "
        "--output {out}/{data}/train --workers 2 {segments}",
        "{data}/train/manifest.json",
    ),
    Pattern(
        "Tokenize the held-out text",
        "python tools/preprocess.py --input {out}/raw/valid.jsonl.zst --tokenizer {out}/tokenizer "
        "--output {out}/{data}/valid --workers 2 {segments}",
        "{data}/valid/manifest.json",
    ),
)
TRAIN_EACH = Pattern(
    "Train {each}",
    "deepspeed --quiet --num_accelerators {ranks} --master_port {free_port} "
    "pretrain.py --ds_config ds_configs/zero2.json --config {config} "
    "--set run_dir={out}/runs/{each} --set model.encoding={each} "
    "--set data.path={out}/data/train --set data.valid_path={out}/data/valid {settings}",
    "runs/{each}/checkpoints/step-{steps:08d}",
)
TRAIN_EACH_ALONE = Pattern(
    "Train {each}",
    "OMP_NUM_THREADS=1 python pretrain.py --ds_config ds_configs/zero1.json --config {config} "
    "--set run_dir={out}/runs/{each} --set model.encoding={each} "
    "--set train.micro_batch={batch} "
    "--set data.path={out}/data/train --set data.valid_path={out}/data/valid {settings}",
    "runs/{each}/checkpoints/step-{steps:08d}",
    together=True,
)


def run_values(config: Path, settings: Sequence[str], corpus: str) -> dict[str, object]:
    """Return the values that `TRAIN_EACH` and the steps before it need; `corpus` has options of tools/corpus.py."""
    run = load_run_config(config, list(settings))
    return {
        "config": config,
        "corpus": corpus,
        "data": "data",
        "segments": "",
        "ranks": num_ranks(),
        "free_port": FREE_PORT,
        "vocab": run.model.vocab_size,
        "steps": run.train.steps,
        "batch": run.train.global_batch,
        "settings": " ".join(f"--set {shlex.quote(setting)}" for setting in settings),
    }


def num_ranks() -> int:
    """Return the ranks of a small training: one per GPU, at most two; two without a GPU or if `BIPE_DEVICE=cpu`."""
    if requested_device() == "cpu" or not has_gpu_driver():
        return 2
    import torch

    return min(2, torch.cuda.device_count()) or 2


def fill(patterns: Iterable[Pattern], folder: Path, values: dict[str, object], each_of: Iterable[str]) -> list[Stage]:
    """Return all stages in order, with their values filled in; `{out}` is the folder."""
    names, stages = tuple(each_of), list[Stage]()
    for pattern in patterns:
        steps = []
        for name in names if "{each}" in pattern.title else ("",):
            quoted = values | {"out": shlex.quote(str(folder)), "each": name}
            title, command, made = (text.format(**quoted) for text in pattern[:3])
            steps.append(Step(title, shlex.split(command), folder / made, name))
        stages += [steps] if pattern.together else [[step] for step in steps]
    return stages


def run_steps(stages: Sequence[Stage], folder: Path, pace: Pace = ALL_AT_ONCE) -> None:
    """Run the pending steps, and save their seconds in `FOLDER/logs/times.json`. Raises as `run_stage`."""
    total, number = sum(map(len, stages)), 1
    times, failures = read_times(folder, pace.times_file), list[BipeError]()
    with signals_noted() as check_signals:
        for steps in stages:
            last = number + len(steps) - 1
            numbers = f"{number}-{last}" if len(steps) > 1 else f"{number}"
            print(f"\n[{numbers}/{total}] {_titles(steps)}", flush=True)
            try:
                failures += run_stage(steps, folder, times, check_signals, pace)
            finally:
                _write_times(stages, folder, times, pace.times_file)
            number = last + 1
    if failures:
        raise failures[0]


def _titles(steps: Stage) -> str:
    titles = [step.title for step in steps]
    more = titles[TITLES_SHOWN:]
    return ", ".join([*titles[:TITLES_SHOWN], f"and {len(more)} more"] if more else titles)


def read_times(folder: Path, times_file: Path = TIMES_FILE) -> dict[str, float]:
    """Return the seconds of each step that has been run, by its title."""
    path = folder / times_file
    times: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))["steps_s"] if path.exists() else {}
    return times


def _write_times(stages: Sequence[Stage], folder: Path, times: dict[str, float], times_file: Path) -> None:
    planned = {step.title: times[step.title] for steps in stages for step in steps if step.title in times}
    total_s = sum(max(times.get(step.title, 0.0) for step in steps) for steps in stages)
    (folder / times_file).parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"steps_s": planned, "total_s": round(total_s, 1)}, indent=1)
    write_atomically(folder / times_file, content.encode())


def run_stage(
    steps: Stage,
    folder: Path,
    times: dict[str, float],
    check_signals: Callable[[], None] = lambda: None,
    pace: Pace = ALL_AT_ONCE,
) -> list[BipeError]:
    """Run commands concurrently, except those whose results exist, and note the seconds of each by its title.

    Progress is shown, and the full output of each command is kept in `FOLDER/logs`. When one fails or `check_signals`
    raises, the others are ended.

    Returns:
        The failures of commands, if the pace is to keep going.

    Raises:
        BipeError: a command failed (the location is its log), or another command made an existing result.
    """
    runs = [_Run(step, folder, f"{step.name}: " if len(steps) > 1 else "") for step in steps]
    waiting = [run for run in runs if not run.is_done()]
    running, failures = list[_Run](), list[BipeError]()
    with ThreadPoolExecutor(len(runs)) as readers:
        try:
            while waiting or running:
                check_signals()
                try:
                    while waiting and len(running) < (pace.at_once or len(runs)):
                        waiting.pop(0).start(readers, running)
                    for run in [run for run in running if run.has_ended()]:
                        running.remove(run)
                        times[run.step.title] = run.finish()
                except BipeError as error:
                    if not pace.keep_going:
                        raise
                    failures.append(error)
                time.sleep(POLL_S)
        finally:
            end_all([run.child for run in running if run.child])
    return failures


class _Run:
    """State of a step while it runs."""

    def __init__(self, step: Step, folder: Path, prefix: str) -> None:
        self.step, self._prefix = step, prefix
        self.child: ChildProcess | None = None
        self._log = folder / "logs" / f"{step.title.replace(' ', '_').replace(',', '')}.log"
        # The recorded command does not depend on the location of the folder.
        words = (re.sub(rf"(^|=){re.escape(str(folder))}/", r"\1OUTPUT/", word) for word in step.command)
        self._made_by = "$ " + shlex.join(words)

    def is_done(self) -> bool:
        if not self.step.result.exists():
            return False
        before = self._log.read_text(encoding="utf-8").partition("\n")[0] if self._log.exists() else ""
        if self.step.compares_command and before.startswith("$ ") and before != self._made_by:
            raise BipeError(
                f"{self.step.result} was made by {before!r}, and now it is {self._made_by!r}",
                remedy="Name another --output, or give the same options; or remove the result to make it again",
                location=self._log,
            )
        self._show(f"done before: {self.step.result}")
        return True

    def start(self, readers: ThreadPoolExecutor, running: "list[_Run]") -> None:
        """Start the command, and append this to `running`; raise `BipeError` if what it needs is missing."""
        if self.step.needs is not None and not self.step.needs.exists():
            self._show(f"skipped: {self.step.needs} is missing")
            raise BipeError(
                f"{self.step.title}: {self.step.needs} is missing, which an earlier step makes",
                remedy="Run the earlier steps first",
                location=self.step.needs,
            )
        self._show("$ " + shlex.join(self.step.command))
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with writing(self._log):
            self._log.write_text(self._made_by + "\n", encoding="utf-8")
        env = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        command = [str(free_port()) if word == FREE_PORT else word for word in self.step.command]
        while match := _ASSIGNMENT.fullmatch(command[0]):
            env[match[1]] = match[2]
            del command[0]
        self._began_s = time.monotonic()
        self.child = ChildProcess(command, env, stdout=PIPE, stderr=STDOUT, text=True, errors="replace")
        self._reader: Future[None] = readers.submit(self._read, self.child)
        running.append(self)

    def has_ended(self) -> bool:
        assert self.child is not None
        if self._reader.done():
            self._reader.result()  # raises its error, such as a full disk
        return self.child.process.poll() is not None

    def finish(self) -> float:
        """Return the seconds that the step took; raise `BipeError` if it failed."""
        assert self.child is not None
        seconds = time.monotonic() - self._began_s
        end_all([self.child])  # ends processes of the command that still have its output open
        self._reader.result()
        code = self.child.process.returncode
        if code != 0 or not self.step.result.exists():
            lines = self._log.read_text(encoding="utf-8").splitlines()[1:][-LAST_LINES:]
            for line in lines:
                self._show(f"| {line}")
            raise BipeError(
                f"the command ended with exit code {code} and did not make {self.step.result}; "
                f"the last {len(lines)} lines of its output are above, unfiltered",
                remedy="Read its full output, fix the cause, and run this again: finished steps are kept",
                location=self._log,
            )
        self._show(f"{seconds:.0f} s")
        return round(seconds, 1)

    def _read(self, child: ChildProcess) -> None:
        assert child.process.stdout is not None
        after_warning = False
        with writing(self._log), self._log.open("a", encoding="utf-8") as file, child.process.stdout:
            for line in child.process.stdout:
                file.write(line)
                file.flush()
                noise = _NOISE.match(line)
                is_source = after_warning and line.startswith("  ")
                after_warning = bool(noise and noise["warning"])
                if line.strip() and not noise and not is_source:
                    self._show(line.rstrip())

    def _show(self, text: str) -> None:
        sys.stdout.write(f"    {self._prefix}{text}\n")  # in one call: other threads also write
        sys.stdout.flush()
