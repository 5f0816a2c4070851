"""Files that an earlier revision wrote: this code reads them, gets the same results, and writes the same keys.

tests/golden/revision_1278d65/README.md says how they were made.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_bipe.config.load import load_run_config
from megatron_bipe.hf.load import load_exported
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.train.batch_loader import BatchLoader
from tests.helpers.commands import flags
from tests.helpers.paths import ROOT
from tests.helpers.tools import call_tool, run_pretrain

GOLDEN = ROOT / "tests" / "golden" / "revision_1278d65"
SUBSETS = ("prose", "code")
# Another CPU may add fp32 numbers in another order. One such sum differs by about 1e-7 of its value, and these models
# have two layers and are trained for two steps.
TOLERANCE = 1e-6
MACHINE_KEYS = {"seconds", "torch", "source", "time", "time/step_s", "rate/tokens_per_s", "mem/peak_gib", "run/goodput"}


@pytest.fixture(scope="module")
def golden(tmp_path_factory) -> Path:
    """A copy of the stored files; tests of this module share it."""
    folder = tmp_path_factory.mktemp("golden") / "files"
    shutil.copytree(GOLDEN, folder)
    return folder


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "expected.npz"))


@pytest.fixture(scope="module")
def resumed(golden, tmp_path_factory) -> Path:
    """A copy of the stored run that this code has trained for two more steps."""
    run_dir = tmp_path_factory.mktemp("resumed") / "run"
    shutil.copytree(golden / "run", run_dir)
    settings = (f"run_dir={run_dir}", f"data.path={[str(golden / 'data' / name) for name in SUBSETS]}")
    config = ("--config", golden / "run" / "config.yaml", "--ds_config", "ds_configs/zero1.json")
    [ended] = run_pretrain([*config, *flags(settings)], run_dir.parent / "logs")
    assert "from step 4" in ended.output
    return run_dir


@pytest.fixture(scope="module")
def exported_again(golden, tmp_path_factory) -> Path:
    """The folder that this code exports from the stored checkpoint."""
    folder = tmp_path_factory.mktemp("export") / "exported"
    call_tool("export_hf", "--checkpoint", golden / "run", "--output", folder)
    return folder


def test_stored_dataset_is_verified(golden):
    assert "complete" in call_tool("inspect_data", "verify", golden / "data", "--workers", 1).output


def test_stored_dataset_gives_the_same_batches(golden, expected):
    paths = [str(golden / "data" / name) for name in SUBSETS]
    run = load_run_config(golden / "run" / "config.yaml", [f"data.path={paths}"])
    loader = BatchLoader(run, Mesh(0, 0, 1, 1, torch.device("cpu")))
    batches = [batch for step in range(2) for batch in loader.train_batches(step * run.train.global_batch)]
    for field in ("tokens_BT", "intra_BT", "inter_BT", "labels_BT"):
        found = torch.cat([getattr(batch, field) for batch in batches]).numpy()
        np.testing.assert_array_equal(found, expected[field], err_msg=field)


def test_preprocessing_writes_the_same_dataset_again(golden, tmp_path):
    tokenizer = golden / "data" / "prose" / "tokenizer"
    given = ("--input", golden / "text.jsonl", "--tokenizer", tokenizer, "--output", tmp_path / "data")
    call_tool("preprocess", *given, "--partition-by", "meta.pile_set_name", "--workers", 1)
    for name in SUBSETS:
        stored, made = GOLDEN / "data" / name, tmp_path / "data" / name
        assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in stored.iterdir())
        for suffix in ("bin", "idx", "seg"):
            assert (made / f"tokens-00000.{suffix}").read_bytes() == (stored / f"tokens-00000.{suffix}").read_bytes()
        manifest = read_json(made / "manifest.json")
        manifest["source"]["inputs"][0]["file"] = "text.jsonl"  # it is recorded as it was given
        assert manifest == read_json(stored / "manifest.json")


def test_stored_checkpoint_continues_as_the_undisturbed_run(resumed):
    assert_same(read_lines(resumed / "metrics.jsonl"), read_lines(GOLDEN / "metrics.jsonl"))


ADDED = {  # fields of the configuration that the stored run did not have
    *("alerts", "alerts/webhook", "checkpoint/after_save", "checkpoint/max_failures", "data/valid"),
    *("optimizer/decay_start", "tracking", "tracking/trackio", "tracking/wandb", "train/branch_from"),
    *("train/compile", "train/deterministic", "train/valid_lengths"),
}


def test_resumed_run_writes_the_same_keys(resumed):
    step = Path("checkpoints") / "step-00000006"
    before = {path.relative_to(GOLDEN / "run") for path in (GOLDEN / "run").rglob("*") if path.is_file()}
    after = {path.relative_to(resumed) for path in resumed.rglob("*") if path.is_file()}
    written = {step / path.name for path in before if path.parent.name == "step-00000004"}
    assert {path for path in after - before if path.parts[0] != "tensorboard"} == written
    states = [read_json(GOLDEN / "run" / step.with_name("step-00000004") / "state.json")]
    states.append(read_json(resumed / step / "state.json"))
    assert keys_of(states[1]) == keys_of(states[0]) | {f"/config/{key}" for key in ADDED} | {"/data/special_in_text"}
    assert states[0]["parameters"] == states[1]["parameters"]
    events = read_lines(resumed / "events.jsonl")
    assert [event["event"] for event in events] == ["start", "done", "start", "saved", "done"]
    assert keys_of(events[2:3]) > keys_of(events[:1])  # a start also records its provenance
    assert keys_of(events[4:]) == keys_of(events[1:2])
    recorded = keys_of(read_json(GOLDEN / "run" / "data.json"))
    assert keys_of(read_json(resumed / "data.json")) == recorded | {"/special_in_text"}


@pytest.mark.parametrize("export", ["stored", "exported again"])
def test_exported_model_gives_the_same_logits(golden, exported_again, expected, export):
    folder = golden / "exported" if export == "stored" else exported_again
    tokens, intra, inter = (
        torch.from_numpy(expected[field][:2].astype(np.int64)) for field in ("tokens_BT", "intra_BT", "inter_BT")
    )
    with torch.inference_mode():
        ours = load_exported(folder).model((tokens, intra, inter))
        theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()(tokens).logits
    for logits_BTV in (ours, theirs):
        found, wanted = logits_BTV[:, -4:], torch.from_numpy(expected["logits_BKV"])
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


def assert_kept(old, new):
    """Assert that later versions only add keys, and replace null, such as for the padding token."""
    if isinstance(old, dict):
        for key in old:
            assert_kept(old[key], new[key])
    else:
        assert old in (None, new)


def test_stored_checkpoint_exports_to_the_same_files(exported_again):
    stored = GOLDEN / "exported"
    found, wanted = (load_file(folder / "model.safetensors") for folder in (exported_again, stored))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert_kept(read_json(stored / name), read_json(exported_again / name))
    for path in stored.iterdir():
        assert (exported_again / path.name).is_file() or path.suffix == ".py", path.name


def test_perplexity_report_is_the_same(golden, tmp_path):
    models = ("--model", golden / "run", golden / "exported", "--data", golden / "data" / "prose")
    precision = ("--device", "cpu", "--dtype", "fp32", "--output", tmp_path)
    call_tool("evaluate", "perplexity", *models, "--lengths", "16,32,64", *precision)
    assert_same(read_json(tmp_path / "perplexity.json"), read_json(GOLDEN / "perplexity.json"))
    headers = [(folder / "perplexity.csv").read_text().splitlines()[0] for folder in (tmp_path, GOLDEN)]
    assert headers[0] == headers[1]


def test_extrapolation_report_is_the_same(golden, tmp_path):
    given = ("--model", golden / "exported", "--data", golden / "data" / "code", "--lengths", 32)
    call_tool("evaluate", "extrapolation", *given, "--device", "cpu", "--dtype", "fp32", "--output", tmp_path)
    assert_same(read_json(tmp_path / "extrapolation.json"), read_json(GOLDEN / "extrapolation.json"))


def test_statistics_are_the_same(golden, tmp_path):
    call_tool("inspect_data", "stats", golden / "data", "--json", tmp_path / "stats.json", "--workers", 1)
    assert_same(read_json(tmp_path / "stats.json"), read_json(GOLDEN / "stats.json"))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def keys_of(value: Any) -> set[str]:
    """Return the paths of all keys in nested objects; items of a list count as one."""
    return {path for path, _ in _items(value)}


def _items(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, nested in value.items():
            yield f"{path}/{key}", nested
            yield from _items(nested, f"{path}/{key}")
    elif isinstance(value, list):
        for nested in value:
            yield from _items(nested, f"{path}/*")


def assert_same(found: Any, stored: Any, path: str = "") -> None:
    """Assert that keys and values are the same: numbers within `TOLERANCE`, without sentences and the machine's own."""
    assert type(found) is type(stored), path
    if isinstance(stored, dict):
        assert found.keys() == stored.keys(), path
        for key in stored.keys() - MACHINE_KEYS:
            assert_same(found[key], stored[key], f"{path}/{key}")
    elif isinstance(stored, list):
        assert len(found) == len(stored), path
        for number, (one, other) in enumerate(zip(found, stored, strict=True)):
            assert_same(one, other, f"{path}/{number}")
    elif isinstance(stored, float):
        assert found == pytest.approx(stored, rel=TOLERANCE), path
    elif not (isinstance(stored, str) and " " in stored):
        assert found == stored, path
