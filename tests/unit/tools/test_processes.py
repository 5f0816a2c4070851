"""Each command, run once as a separate process; other tests call commands in the tests' process."""

import json
import shlex
import subprocess
import sys

import pytest

from tests.helpers.hub import serve
from tests.helpers.paths import ROOT

CASES = {  # script -> arguments, exit code, what it prints
    "pretrain": ("--ds_config none.json", 2, "none.json"),
    "average": ("none@1,2 --output {out}", 2, "none"),
    "corpus": ("--output {out} --max-bytes 0", 2, "--max-bytes"),
    "download_data": ("--dataset org/name --endpoint {hub} --output {out}", 0, "all complete; 1 fetched"),
    "evaluate": ("perplexity --model none --data none --lengths 8 --output {out}", 2, "none"),
    "export_hf": ("--checkpoint none --output {out}", 2, "none"),
    "generate": ("--model none --prompt x", 2, "none"),
    "gpu_check": ("--write-docs --output {out}", 2, "--write-docs"),
    "import_hf": ("--input none --output {out}", 2, "none"),
    "inspect_data": ("show {data} --tokens 2", 0, "<bos> h"),
    "plan": ("--gpus 12 --gpu h100", 2, "8 or 16"),
    "plot": ("{data} --output {out}.pdf", 2, "config.yaml"),
    "preflight": ("--ds_config none.json --write-mib 1 --json {out}", 1, "none.json"),
    "prepare_task": ("arithmetic --operators 1 --problems 2 --length 64 --output {out}", 0, "2 examples"),
    "preprocess": ("--input {text} --tokenizer {data}/tokenizer --segments newline --output {out}", 0, "30 documents"),
    "quickstart": ("--set none=1 --output {out}", 2, "none"),
    "report": ("{data} --output {out}.html", 2, "config.yaml"),
    "status": ("{data}", 2, "config.yaml"),
    "study": ("none.yaml --output {out}", 2, "none"),
    "supervise": ("{out} -- bash -c 'echo hello; exit 2'", 2, "hello\nsupervise: exit code 2"),
    "train_tokenizer": ("--input {text} --vocab-size 290 --output {out}", 0, "290 tokens"),
}


def test_each_tool_has_a_case():
    assert {path.stem for path in (ROOT / "tools").glob("[a-z]*.py")} == set(CASES) - {"pretrain"}


@pytest.mark.parametrize("name", CASES)
def test_process_does_its_work_or_ends_with_one_message(name, text_dataset, tmp_path):
    arguments, code, shown = CASES[name]
    text = tmp_path / "source" / "in.jsonl"
    text.parent.mkdir()
    text.write_text("".join(json.dumps({"text": f"{n} words , and a stop .\n"}) + "\n" for n in range(30)))
    with serve({"org/name": {"main": text.parent}}) as hub:
        values = {"out": tmp_path / "out", "data": text_dataset, "text": text, "hub": hub.endpoint}
        words = [word.format_map(values) for word in shlex.split(arguments)]
        script = "pretrain.py" if name == "pretrain" else f"tools/{name}.py"
        done = subprocess.run(
            [sys.executable, script, *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
    assert (done.returncode, "Traceback" in done.stdout) == (code, False), done.stdout
    assert shown in done.stdout
