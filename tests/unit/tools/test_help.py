"""Commands answer `--help` and report errors in their arguments before they import slow packages.

One interpreter imports what every command may import at the top, and forks for each command line.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from megatron_bipe.config.load import load_run_config
from tests.helpers.paths import ROOT

HEAVY = {
    *("accelerate", "datasets", "deepspeed", "lm_eval", "matplotlib", "mpi4py", "pandas", "pyarrow", "scipy"),
    *("sklearn", "tensorboard", "torch", "transformers"),
}
COMMANDS = ["pretrain.py", *sorted(f"tools/{path.name}" for path in (ROOT / "tools").glob("[a-z]*.py"))]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SUBCOMMANDS = {
    "tools/evaluate.py": ("perplexity", "extrapolation", "scrolls", "arithmetic", "harness", "follow"),
    "tools/inspect_data.py": ("verify", "stats", "show", "resegment"),
    "tools/prepare_task.py": ("scrolls", "arithmetic"),
}
ERRORS = {
    "pretrain.py": [
        "--ds_config ds_configs/zero2.json --config none.yaml",
        "--ds_config ds_configs/zero2.json --set none=1",
        "--ds_config none.json",
    ],
    "tools/average.py": ["none@1,2 --output none", "none@{1,2} --output none"],
    "tools/evaluate.py": [
        "perplexity --model none --data none --lengths abc --output none",
        "perplexity --model none --data none --lengths 8 --output none",
        "extrapolation --model none --data none --lengths 8,none --output none",
        "scrolls --model none --task none --data none --output none",
        "arithmetic --model none --operators 1..2 --output none",
        "harness --model none --tasks none --output none",
        "follow none --do perplexity",
        "follow none --lengths abc",
    ],
    "tools/export_hf.py": ["--checkpoint none --output none", "--checkpoint none --output none --dtype none"],
    "tools/generate.py": ["--model none --prompt none"],
    "tools/import_hf.py": ["--input none --output none"],
    "tools/status.py": ["none", "none --stalled-after none"],
    "tools/study.py": [
        "none.yaml --output none",
        "examples/studies/encodings.yaml --output none --only none",
    ],
}
LIGHT = [
    "numpy",
    "tokenizers",
    "tqdm",
    "megatron_bipe.config.load",
    "preprocessing.build",
    "preprocessing.task_examples",
]
FORKS = """
import importlib, json, os, runpy, sys

questions, heavy, light, folder = json.loads(sys.argv[1])


class Recorder:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in heavy:
            print(name, file=record, flush=True)


record = open(f"{folder}/light.heavy", "w")
sys.meta_path.insert(0, Recorder())
for name in light:
    importlib.import_module(name)
codes = []
for number, (script, *arguments) in enumerate(questions):
    child = os.fork()
    if not child:
        record = open(f"{folder}/{number}.heavy", "w")
        os.dup2(os.open(f"{folder}/{number}.output", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        sys.argv[:] = [script, *arguments]
        try:
            runpy.run_path(script, run_name="__main__")
            code = 1  # it chose none
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush()
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Of each command line: its exit code, its output, and heavy modules that it imports."""
    folder = tmp_path_factory.mktemp("answers")
    questions = [
        *([script, "--help"] for script in COMMANDS),
        *([script, name, "--help"] for script, names in SUBCOMMANDS.items() for name in names),
        *([script, *line.split()] for script, lines in ERRORS.items() for line in lines),
    ]
    command = [sys.executable, "-c", FORKS, json.dumps([questions, sorted(HEAVY), LIGHT, str(folder)])]
    # Python puts the folder of a script on its path, but not for `-c`.
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "tools"), str(ROOT)))}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=True)
    assert (folder / "light.heavy").read_text() == ""
    return {
        " ".join(question): (code, (folder / f"{n}.output").read_text(), (folder / f"{n}.heavy").read_text())
        for n, (question, code) in enumerate(zip(questions, json.loads(done.stdout), strict=True))
    }


@pytest.mark.parametrize("script", COMMANDS)
def test_help_imports_nothing_heavy(answers, script):
    for name in ("", *(f"{name} " for name in SUBCOMMANDS.get(script, ()))):
        code, output, heavy = answers[f"{script} {name}--help"]
        assert code == 0 and "usage: " in output and name.strip() in output
        assert not heavy


def documented_commands():
    """Return (page, script, rest of the command line) of each command in code blocks and code spans of the pages."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        code = [*re.findall(r"^ {4,}(.*)$|^(?:\$ )?((?:DS_|OMP_|python |deepspeed ).*)$", text, re.MULTILINE)]
        spans = re.findall(r"`((?:python|deepspeed|mpiexec) [^`]*)`", text)
        for line in [*map("".join, code), *spans]:
            parts = re.split(r"(?<![\w/])(tools/\w+\.py|pretrain\.py)", line.partition(" #")[0])
            for script, rest in zip(parts[1::2], parts[2::2], strict=True):
                found.append((page.name, script, re.split(r" (?:--|&&|\|) |; ", rest + " ")[0]))
    return found


def test_commands_in_the_pages_have_options_that_exist(answers):
    commands = documented_commands()
    assert {page for page, _, _ in commands} > {
        "CONTRIBUTING.md",
        "commands.md",
        "own_text.md",
        "training.md",
        "tutorial.md",
    }
    for page, script, rest in commands:
        assert script in COMMANDS, (page, script)
        words = rest.split()
        names = re.split(r"\\?\|", words[0]) if words and script in SUBCOMMANDS else [""]
        for name in names:
            assert not name or name in SUBCOMMANDS[script], (page, script, name)
            known = set(re.findall(r"--[\w-]+", answers[f"{script} {name} --help".replace("  ", " ")][1]))
            unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest)) - known
            assert not unknown, (page, script, name, unknown)
        for file in re.findall(r"(?<!\S)(?:examples|ds_configs)/[\w./]*\w", rest):
            assert "NAME" in file or (ROOT / file).is_file(), (page, file)


def test_settings_in_the_pages_are_fields_of_the_configuration():
    for page, script, rest in documented_commands():
        found = re.findall(r"--set '?([a-z][^\s']*=(?:\{[^}]*\})?[^\s']*)", rest)
        settings = [setting for setting in found if "NAME" not in setting]
        if script == "pretrain.py" and settings:
            config = re.search(r"--config (examples/[a-z0-9_.]+)", rest)
            assert load_run_config(ROOT / config[1] if config else None, settings), page


@pytest.mark.parametrize("script", list(ERRORS))
def test_errors_in_arguments_import_nothing_heavy(answers, script):
    for line in ERRORS[script]:
        code, output, heavy = answers[f"{script} {line}"]
        assert code == 2 and ("none" in output or "abc" in output) and "Traceback" not in output, output
        assert not heavy


def test_commands_page_lists_every_command_and_only_options_that_exist(answers):
    listed = {}
    for row in re.findall(r"^\| (`.*) \|$", (ROOT / "docs" / "commands.md").read_text("utf-8"), re.MULTILINE):
        if found := re.match(r"`.*?\b((?:tools/\w+|pretrain)\.py)(?: (\w+)\b)?", row):
            script, subcommand = found.groups()
            name = f"{script} {subcommand}" if subcommand in SUBCOMMANDS.get(script, ()) else script
            listed.setdefault(name, set()).update(re.findall(r"(?<![\w-])--[\w-]+", row))
    expected = [f"{script} {name}" for script, names in SUBCOMMANDS.items() for name in names]
    assert sorted(listed) == sorted([*expected, *(script for script in COMMANDS if script not in SUBCOMMANDS)])
    for name, options in listed.items():
        known = set(re.findall(r"--[\w-]+", answers[f"{name} --help"][1]))
        assert options <= known, (name, options - known)
