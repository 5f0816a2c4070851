"""The whole line as a user types it: raw text, tokenizer, dataset, training on two ranks, evaluation, export."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SETTINGS = [
    "model={num_layers: 2, hidden_size: 32, num_heads: 4, ffn_size: 48, vocab_size: 400, intra_size: 64}",
    "optimizer={lr: 1e-2, warmup_steps: 2}",
    "train={steps: 8, seq_len_tokens: 32, global_batch: 8, micro_batch: 2, precision: fp32, log_every: 3, "
    "valid_every: 4, valid_samples: 16, save_every: 4}",
]


def run(*command: str, code: int = 0) -> str:
    """Run a command of the project from its root; its output."""
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == code, f"{command} left with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def python(script: str, *arguments: object, code: int = 0) -> str:
    return run(sys.executable, script, *map(str, arguments), code=code)


def pretrain(*arguments: object, settings: list[str], ranks: int, port: int, code: int = 0) -> str:
    flags = [part for setting in settings for part in ("--set", setting)]
    launcher = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(port), "pretrain.py"]
    return run(*launcher, "--ds_config", "ds_configs/zero2.json", *flags, *map(str, arguments), code=code)


@pytest.fixture(scope="module")
def line(tmp_path_factory, free_port):
    """Everything up to the trained run: 4 steps, then 4 more by the same command; and 8 undisturbed ones."""
    folder = tmp_path_factory.mktemp("line")
    sources = sorted((Path(os.__file__).parent).glob("a*.py"))
    lines = [json.dumps({"text": source.read_text(), "meta": {"pile_set_name": "Code"}}) for source in sources]
    (folder / "train.jsonl").write_text("\n".join(lines[2:]) + "\n{broken\n")
    (folder / "valid.jsonl").write_text("\n".join(lines[:2]) + "\n")
    raw = folder / "train.jsonl"
    python("tools/train_tokenizer.py", "--input", raw, "--vocab-size", 400, "--output", folder / "tokenizer")
    for split in ("train", "valid"):
        tokenizer = ("--tokenizer", folder / "tokenizer")
        python("tools/preprocess.py", "--input", folder / f"{split}.jsonl", *tokenizer, "--output", folder / split)
    data = [f"data.path={folder / 'train'}", f"data.valid_path={folder / 'valid'}", *SETTINGS]
    first = pretrain("--stop-step", 4, settings=[*data, f"run_dir={folder / 'run'}"], ranks=2, port=free_port())
    second = pretrain(settings=[*data, f"run_dir={folder / 'run'}"], ranks=2, port=free_port())
    undisturbed = [*data, f"run_dir={folder / 'undisturbed'}"]
    profiled = pretrain("--profile", 2, settings=undisturbed, ranks=2, port=free_port())
    return {"folder": folder, "data": data, "first": first, "second": second, "profiled": profiled}


def _metrics(run_dir: Path) -> list[dict[str, float]]:
    kept = ("step", "loss/train_nats", "loss/valid_nats", "optim/lr", "optim/grad_norm")
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in kept if key in line} for line in lines]


def test_line_dataset_is_sound(line):
    assert "ok" in python("tools/inspect_data.py", "verify", line["folder"] / "train").lower()
    assert "400" in python("tools/inspect_data.py", "stats", line["folder"] / "train")
    assert "inter" in python("tools/inspect_data.py", "show", line["folder"] / "train", "--tokens", 40)
    manifest = json.loads((line["folder"] / "train" / "manifest.json").read_text())
    assert manifest["source"]["malformed_lines"] == 1


def test_line_profile_tells_the_parts_of_steps_and_leaves_a_trace_of_every_rank(line):
    shares = dict(re.findall(r"^  (\w+) .* (\d+\.\d)%$", line["profiled"], re.MULTILINE))
    assert all(float(shares[part]) > 0 for part in ("data", "forward", "backward", "communication", "optimizer"))
    traces = (line["folder"] / "undisturbed/profile").iterdir()
    assert sorted(trace.name for trace in traces) == ["rank_0.json.gz", "rank_1.json.gz"]


def test_line_training_learns_and_continues_bit_for_bit(line):
    assert "continuing" in line["second"] and "continuing" not in line["first"]
    resumed, undisturbed = _metrics(line["folder"] / "run"), _metrics(line["folder"] / "undisturbed")
    assert resumed == undisturbed
    assert [entry["step"] for entry in resumed if "loss/train_nats" in entry] == list(range(1, 9))
    assert resumed[-1]["loss/valid_nats"] < resumed[0]["loss/train_nats"] - 0.3


def test_line_exported_model_equals_the_checkpoint(line):
    folder = line["folder"]
    output = python("tools/export_hf.py", "--checkpoint", folder / "run", "--output", folder / "exported")
    assert "logits" in output
    command = ["tools/evaluate.py", "perplexity", "--model", folder / "run", folder / "exported"]
    python(
        *command, "--data", folder / "valid", "--lengths", "32,64,128", "--max-tokens", 4000, "--output", folder / "ev"
    )
    with (folder / "ev" / "perplexity.csv").open() as file:
        rows = list(csv.DictReader(file))
    figures = [[float(row["perplexity"]) for row in rows[part]] for part in (slice(0, 3), slice(3, 6))]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    assert all(2 < figure < 400 for figure in figures[0])
    assert (folder / "ev" / "perplexity.png").stat().st_size > 10_000
    assert json.loads((folder / "ev" / "perplexity.json").read_text())


def test_line_exported_model_speaks_hugging_face(line):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_bipe.data.dataset import TokenDataset
    from megatron_bipe.data.segments import bilevel_ids

    folder = line["folder"]
    if not (folder / "exported").exists():
        python("tools/export_hf.py", "--checkpoint", folder / "run", "--output", folder / "exported")
    model = AutoModelForCausalLM.from_pretrained(folder / "exported", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
    assert model.config.model_type == "bipe"
    dataset = TokenDataset(folder / "valid")
    tokens = torch.from_numpy(dataset.tokens(0, 200).astype("int64"))[None]
    intra, inter = bilevel_ids(dataset.ends(0, 200), clip=63)
    ids = model.bilevel_ids(tokens)
    assert torch.equal(ids[0][0], torch.from_numpy(intra)) and torch.equal(ids[1][0], torch.from_numpy(inter))
    text = json.loads((folder / "valid.jsonl").read_text().splitlines()[0])["text"]
    stored = dataset.tokens(*dataset.document_bounds()[:2].tolist()).tolist()
    assert tokenizer(text)["input_ids"][-len(stored) + 1 :] == stored[1:]  # with or without BOS
    generate = ("tools/generate.py", "--model", folder / "exported", "--prompt", "import", "--max-new-tokens", 5)
    assert "import" in python(*generate, "--output", folder / "generated.txt")
    assert "The file exists" in python(*generate, "--output", folder / "generated.txt", code=2)
    assert "existing folder" in python(*generate, "--output", folder / "no" / "generated.txt", code=2)


def test_line_bad_commands_leave_with_code_2_and_one_message(line, free_port):
    folder, data = line["folder"], line["data"]
    bare, fresh = folder / "bare", folder / "fresh"
    shutil.copytree(folder / "train", bare)
    shutil.rmtree(bare / "tokenizer")
    cases = {
        "tokenizer's files are missing": [f"data.path={bare}", f"run_dir={fresh}"],
        "did you mean 'train.steps'": ["train.step=3"],
        "not a multiple of": ["train.global_batch=6"],
        "tools/preprocess.py": [f"data.path={folder / 'absent'}"],
        "one window of": ["train.seq_len_tokens=10000000", "model.intra_size=10000000"],
        "model.intra_size=8 is smaller": ["model.intra_size=8"],
        "was 2 and is now 3": [f"run_dir={folder / 'run'}", "model.num_layers=3"],
    }
    for option in (("--stop-step", 0), ("--dry-run", -4)):
        output = pretrain(*option, settings=data, ranks=1, port=free_port(), code=2)
        assert output.count("Error: ") == 1 and "1 or more" in output, output
    for message, settings in cases.items():
        output = pretrain(settings=[*data, *settings], ranks=2, port=free_port(), code=2)
        assert output.count("Error: ") == 1 and message in output, output
    assert not fresh.exists()  # refused before anything is written
    missing = python(
        "tools/evaluate.py",
        "perplexity",
        "--model",
        folder / "none",
        "--data",
        folder / "valid",
        "--lengths",
        "32",
        "--output",
        folder / "ev2",
        code=2,
    )
    assert "Traceback" not in missing


def test_line_dry_run_describes_without_training(line):
    output = python("pretrain.py", "--ds_config", "ds_configs/zero2.json", "--dry-run", "--set", "run_dir=/none/such")
    assert "163,203,840" in output
