"""Commands answer `--help` and errors in their arguments before they import what takes seconds.

Each command runs in an interpreter of its own, which is asked several things, since imports are remembered.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

HEAVY = {
    *("accelerate", "datasets", "deepspeed", "lm_eval", "matplotlib", "mpi4py", "pandas", "pyarrow", "scipy"),
    *("sklearn", "tensorboard", "torch", "transformers"),
}
COMMANDS = ["pretrain.py", *sorted(f"tools/{path.name}" for path in (ROOT / "tools").glob("[a-z]*.py"))]
SUBCOMMANDS = {
    "tools/evaluate.py": ("perplexity", "extrapolation", "scrolls", "arithmetic", "harness"),
    "tools/inspect_data.py": ("verify", "stats", "show", "resegment"),
    "tools/prepare_task.py": ("scrolls", "arithmetic"),
}
ERRORS = {
    "tools/evaluate.py": [
        "perplexity --model none --data none --lengths abc --output none",
        "perplexity --model none --data none --lengths 8 --output none",
        "extrapolation --model none --data none --lengths 8,none --output none",
        "scrolls --model none --task none --data none --output none",
        "arithmetic --model none --operators 1..2 --output none",
        "harness --model none --tasks none --output none",
    ],
    "tools/export_hf.py": ["--checkpoint none --output none", "--checkpoint none --output none --dtype none"],
    "tools/generate.py": ["--model none --prompt none"],
    "tools/import_hf.py": ["--input none --output none"],
    "tools/study.py": ["--encodings none"],
}
RUN = """
import contextlib, io, json, runpy, sys

script, *cases = map(json.loads, sys.argv[1:])
ends = []
for arguments in cases:
    sys.argv[:] = [script, *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
            code = None
        except SystemExit as end:
            code = end.code
    ends.append((code, out.getvalue(), err.getvalue()))
print(json.dumps([ends, list(sys.modules)]))
"""


def heavy(modules):
    """Those of the modules that a command may import only for its work."""
    return HEAVY & {name.partition(".")[0] for name in modules}


def ask(script, cases):
    """Run a command once for each list of arguments: (code, stdout, stderr) of each, and all modules imported."""
    command = [sys.executable, "-c", RUN, *map(json.dumps, (script, *cases))]
    # Python puts the folder of a script on its path, but not for `-c`.
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str((ROOT / script).parent), str(ROOT)))}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", COMMANDS)
def test_help_imports_nothing_heavy(script):
    cases = [["--help"], *([name, "--help"] for name in SUBCOMMANDS.get(script, ()))]
    ends, modules = ask(script, cases)
    for (code, shown, _), arguments in zip(ends, cases, strict=True):
        assert code == 0 and " ".join(arguments[:-1]) in shown and "usage: " in shown
    assert not heavy(modules)


@pytest.mark.parametrize("script", list(ERRORS))
def test_errors_in_arguments_import_nothing_heavy(script):
    ends, modules = ask(script, [line.split() for line in ERRORS[script]])
    for (code, _, said), line in zip(ends, ERRORS[script], strict=True):
        assert code == 2 and ("none" in said or "abc" in said), line
    assert not heavy(modules)


@pytest.mark.parametrize("options", ["--config none.yaml", "--set none=1", "--ds_config none.json"])
def test_pretrain_error_in_configuration_imports_nothing_heavy(options):
    command = [sys.executable, "-X", "importtime", "pretrain.py", "--ds_config", "ds_configs/zero2.json"]
    done = subprocess.run([*command, *options.split()], cwd=ROOT, capture_output=True, text=True, timeout=120)
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert done.returncode == 2 and "ConfigError: " in done.stderr and "Traceback" not in done.stderr
    assert "megatron_bipe.config.schema" in imported and not heavy(imported)
