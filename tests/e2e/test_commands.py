"""The complete data flow as a user types it: raw text, tokenizer, dataset, two ranks, evaluation, export."""

import csv
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.segments import bilevel_ids
from megatron_bipe.data.shard_layout import SUFFIXES
from megatron_bipe.errors import BipeError, CheckpointError, ConfigError, DataError
from tests.helpers.commands import flags
from tests.helpers.docs import assert_events_are_documented, documented
from tests.helpers.errors import assert_error
from tests.helpers.small_runs import metrics
from tests.helpers.tools import call_tool, pretrain_error, run_pretrain

SETTINGS = [
    "model={num_layers: 2, hidden_size: 32, num_heads: 4, ffn_size: 48, vocab_size: 400, intra_size: 64}",
    "optimizer={lr: 1e-2, warmup_steps: 2}",
    "train={steps: 8, seq_len_tokens: 32, global_batch: 8, micro_batch: 2, precision: fp32, log_every: 3, "
    "valid_every: 4, valid_samples: 16, valid_lengths: [32, 96], save_every: 4}",
]
KEYS = ("step", "loss/train_nats", "loss/valid_nats", "optim/lr", "optim/grad_norm")


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Any:
    """Run all commands up to training: 4 steps and 4 more after a resume, and 8 steps without an interruption."""
    folder = tmp_path_factory.mktemp("commands")
    sources = sorted((Path(os.__file__).parent).glob("a*.py"))
    lines = [json.dumps({"text": source.read_text(), "meta": {"pile_set_name": "Code"}}) for source in sources]
    (folder / "train.jsonl").write_text("\n".join(lines[2:]) + "\n{broken\n")
    (folder / "valid.jsonl").write_text("\n".join(lines[:2]) + "\n")
    raw, tokenizer = folder / "train.jsonl", folder / "tokenizer"
    call_tool("train_tokenizer", "--input", raw, "--vocab-size", 400, "--output", tokenizer)
    for split in ("train", "valid"):
        files = ("--input", folder / f"{split}.jsonl", "--output", folder / split)
        call_tool("preprocess", *files, "--tokenizer", tokenizer)
    data = [f"data.path={folder / 'train'}", f"data.valid_path={folder / 'valid'}", *SETTINGS]
    interrupted = flags([*data, f"run_dir={folder / 'run'}"])
    first, _ = run_pretrain([*interrupted, "--stop-step", 4], folder / "first", 2)
    second, _ = run_pretrain(interrupted, folder / "second", 2)
    uninterrupted = flags([*data, f"run_dir={folder / 'uninterrupted'}"])
    profiled, _ = run_pretrain([*uninterrupted, "--profile", 2], folder / "profiled", 2)
    return {"folder": folder, "data": data, "outputs": (first.output, second.output, profiled.output)}


@pytest.fixture(scope="module")
def exported(commands) -> Path:
    folder = commands["folder"]
    output = call_tool("export_hf", "--checkpoint", folder / "run", "--output", folder / "exported").output
    assert "logits" in output
    return folder / "exported"


def test_dataset_is_sound(commands):
    folder = commands["folder"] / "train"
    shards = TokenDataset(folder).shards
    num_bytes = sum(shard.path(suffix).stat().st_size for shard in shards for suffix in SUFFIXES)
    verified = call_tool("inspect_data", "verify", folder).output
    assert f"{sum(shard.num_tokens for shard in shards):,} tokens" in verified and f"{num_bytes:,} bytes" in verified
    assert "400" in call_tool("inspect_data", "stats", folder).output
    assert "inter" in call_tool("inspect_data", "show", folder, "--tokens", 40).output
    assert json.loads((folder / "manifest.json").read_text())["source"]["malformed_lines"] == 1


def test_profile_reports_the_parts_of_steps_and_leaves_a_trace_of_every_rank(commands):
    shares = dict(re.findall(r"^  (\w+) .* (\d+\.\d)%$", commands["outputs"][2], re.MULTILINE))
    assert all(float(shares[part]) > 0 for part in ("data", "forward", "backward", "communication", "optimizer"))
    traces = (commands["folder"] / "uninterrupted/profile").iterdir()
    assert sorted(trace.name for trace in traces) == ["rank_0.json.gz", "rank_1.json.gz"]


def test_training_learns_and_continues_bit_for_bit(commands):
    first, second, _ = commands["outputs"]
    assert "continuing" in second and "continuing" not in first
    resumed, uninterrupted = (
        metrics(commands["folder"] / "run", *KEYS),
        metrics(commands["folder"] / "uninterrupted", *KEYS),
    )
    assert resumed == uninterrupted
    assert [entry["step"] for entry in resumed if "loss/train_nats" in entry] == list(range(1, 9))
    assert resumed[-1]["loss/valid_nats"] < resumed[0]["loss/train_nats"] - 0.3


def test_validation_is_the_evaluation_of_the_checkpoint(commands):
    folder = commands["folder"]
    text = ("--data", folder / "valid", "--lengths", "32,96", "--protocol", "full", "--max-tokens", 16 * 32)
    call_tool("evaluate", "perplexity", "--model", folder / "run", *text, "--output", folder / "as-validated")
    results = json.loads((folder / "as-validated" / "perplexity.json").read_text())["models"][0]["results"]
    line = [json.loads(each) for each in (folder / "run/metrics.jsonl").read_text().splitlines()][-1]
    assert line["step"] == 8 and [each["length_tokens"] for each in results] == [32, 96]
    for each in results:
        key = f"valid/valid/{each['length_tokens']}"
        assert line[f"{key}/nats"] == pytest.approx(each["nats_per_token"], rel=1e-6)
        assert line[f"{key}/perplexity"] == pytest.approx(each["perplexity"], rel=1e-5)
        assert line[f"{key}/bits_per_byte"] == pytest.approx(each["bits_per_byte"], rel=1e-6)
        assert len(line[f"{key}/nats_by_position"]) == 16
    assert line["loss/valid_nats"] == line["valid/valid/32/nats"]


def test_run_folder_has_the_files_and_keys_of_its_page(commands):
    folder = commands["folder"] / "uninterrupted"  # the one with a profile
    assert {path.name for path in folder.iterdir()} == {
        name.rstrip("/") for name in documented("run_folder.md", "| path | contents | written |")
    } - {"running", "following", "evaluations.jsonl", "wandb", "webhook"}  # of a follower, a tracker, a webhook
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = {re.sub(r"^valid/[^/]+/\d+/", "valid/NAME/LENGTH/", key) for line in lines for key in line}
    assert keys == set(documented("run_folder.md", "| key | unit |")) - {"util/mfu"}  # of GPUs
    assert_events_are_documented(folder)
    step = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    files = {path.relative_to(folder / "checkpoints").as_posix() for path in step.iterdir()}
    pages = documented("run_folder.md", "| path | contents |\n|---|---|\n| `latest`")
    assert {re.sub(r"step-\d+|(?<=rank-)\d+", "N", name) for name in files} == {
        re.sub(r"step-\d+|(?<=rank-)\d+", "N", name) for name in pages if "/" in name
    }
    index = json.loads((step / "state.json").read_text())
    assert set(index) == set(documented("run_folder.md", "| key | meaning |\n|---|---|\n| `format_version`"))
    assert set(index["loop_state"]) == set(documented("run_folder.md", "| key | meaning |\n|---|---|\n| `step`"))
    record = json.loads((folder / "data.json").read_text())
    assert (
        record.keys() | {"blend"} == documented("run_folder.md", "| key | meaning |\n|---|---|\n| `tokenizer`").keys()
    )


def test_exported_model_equals_the_checkpoint(commands, exported):
    folder = commands["folder"]
    data = ("--data", folder / "valid", "--lengths", "32,64,128", "--max-tokens", 4000, "--output", folder / "ev")
    call_tool("evaluate", "perplexity", "--model", folder / "run", exported, *data)
    with (folder / "ev" / "perplexity.csv").open() as file:
        rows = list(csv.DictReader(file))
    figures = [[float(row["perplexity"]) for row in rows[part]] for part in (slice(0, 3), slice(3, 6))]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    assert all(2 < figure < 400 for figure in figures[0])
    assert (folder / "ev" / "perplexity.png").stat().st_size > 10_000
    assert json.loads((folder / "ev" / "perplexity.json").read_text())


def test_exported_model_works_with_hugging_face(commands, exported):
    folder = commands["folder"]
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert model.config.model_type == "bipe"
    dataset = TokenDataset(folder / "valid")
    tokens = torch.from_numpy(dataset.tokens(0, 200).astype("int64"))[None]
    intra, inter = bilevel_ids(dataset.ends(0, 200), clip=63)
    ids = model.bilevel_ids(tokens)
    assert torch.equal(ids[0][0], torch.from_numpy(intra)) and torch.equal(ids[1][0], torch.from_numpy(inter))
    text = json.loads((folder / "valid.jsonl").read_text().splitlines()[0])["text"]
    stored = dataset.tokens(*dataset.document_bounds()[:2].tolist()).tolist()
    assert tokenizer(text)["input_ids"][-len(stored) + 1 :] == stored[1:]  # with or without BOS


def test_exported_model_generates_text(commands, exported):
    generate = ("--model", exported, "--prompt", "import", "--max-new-tokens", 5, "--output")
    file = commands["folder"] / "generated.txt"
    assert "import" in call_tool("generate", *generate, file).output
    for refused in (file, commands["folder"] / "no" / "generated.txt"):
        output = call_tool("generate", *generate, refused, code=2).output
        assert "DataError" in output and f"[{refused}]" in output


def test_bad_arguments_are_refused_before_anything_is_written(commands):
    folder, data = commands["folder"], commands["data"]
    bare, fresh = folder / "bare", folder / "fresh"
    shutil.copytree(folder / "train", bare)
    shutil.rmtree(bare / "tokenizer")
    cases: list[tuple[list[str], type[BipeError], tuple[str, ...]]] = [
        ([f"data.path={bare}", f"run_dir={fresh}"], DataError, ("tokenizer",)),
        (["train.step=3"], ConfigError, ("train.step",)),
        (["train.global_batch=6"], ConfigError, ("train.global_batch=6",)),
        ([f"data.path={folder / 'absent'}"], DataError, ()),
        (["train.seq_len_tokens=10000000", "model.intra_size=10000000"], DataError, ("10000000",)),
        (["model.intra_size=8"], ConfigError, ("model.intra_size=8",)),
        ([f"run_dir={folder / 'run'}", "model.num_layers=3"], CheckpointError, ("model.num_layers", "2", "3")),
    ]
    for settings, kind, observed in cases:
        error = pretrain_error(*flags([*data, *settings]), num_ranks=2)
        assert_error(error, kind, *observed)
    for option, value in (("--stop-step", 0), ("--dry-run", -4), ("--network", 0), ("--gpu", "H100")):
        assert_error(pretrain_error(*flags(data), option, value), ConfigError, value, location=option)
    assert not fresh.exists()
    run_dir = (f"run_dir={fresh}", "train.global_batch=6")
    main, other = run_pretrain(flags([*data, *run_dir]), folder / "refused", 2, code=None)
    assert main.code == 2 and other.code != 0
    assert main.output.count("ConfigError: ") == 1 and "Traceback" not in main.output + other.output


def test_model_that_is_not_there_cannot_be_evaluated(commands):
    folder = commands["folder"]
    arguments = ("--data", folder / "valid", "--lengths", "32", "--output", folder / "ev2")
    output = call_tool("evaluate", "perplexity", "--model", folder / "none", *arguments, code=2).output
    assert CheckpointError.__name__ in output and str(folder / "none") in output


def test_dry_run_describes_without_training_and_fails_like_the_start(commands, tmp_path):
    planned = ["--dry-run", "8", "--gpu", "h100", "--network", "200", "--set", f"run_dir={tmp_path / 'new'}"]
    [described] = run_pretrain(planned, tmp_path / "log", code=2)
    assert "163,203,840" in described.output and described.output.count("DataError: ") == 1
    assert "bf16 (auto: H100" in described.output and "8 x H100" in described.output
    [fits] = run_pretrain([*flags(commands["data"]), "--dry-run"], tmp_path / "fits")
    assert "# Checkpoints" in fits.output and "Error" not in fits.output
    assert not (tmp_path / "new").exists()
