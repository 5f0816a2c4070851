"""A model that is no run's: into checkpoint 0 of a run, and trained from there."""

import json
import re
import sys

import numpy as np
import pytest
import torch
import yaml

from megatron_bipe.config.schema import ModelConfig, TrainConfig
from megatron_bipe.data.blend import Blend
from megatron_bipe.data.collate import make_batch
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.engine.checkpoint import find_checkpoint
from megatron_bipe.hf.export import ExportOptions, export_model
from megatron_bipe.hf.settings import DataFields
from megatron_bipe.model.loss import token_losses
from megatron_bipe.model.plan import build_model
from megatron_bipe.train.models import WeightsOnDisk
from tests.helpers.commands import MODEL, TEXTS, options, run_all

IMPORT = [sys.executable, "tools/import_hf.py", "--input"]


def model_folder(folder, data, weights, config, **changes):
    """An exported model that suits the data, but for `changes`."""
    dataset = TokenDataset(data)
    batch = make_batch(Blend([dataset], None, 32, 0), np.arange(2), 32, config.intra_size - 1)
    known = dataset.manifest
    fields = DataFields(known.rule.spec, known.rule.token_ids, known.tokenizer.fingerprint, {"bos": 1})._replace(
        **changes
    )
    windows = tuple(batch)[:3]
    if fields.token_ids != known.rule.token_ids:
        windows = (torch.full((1, 4), 99), torch.arange(4)[None], torch.zeros(1, 4, dtype=torch.long))
    export_model(weights, config, folder, fields, windows, None, ExportOptions(dtype=torch.float32))
    return folder


@pytest.fixture
def place(tmp_path, write_text_dataset):
    write_text_dataset(tmp_path / "data", TEXTS)
    return tmp_path


@pytest.mark.parametrize("tied", [False, True])
def test_training_goes_on_from_an_imported_model(place, tied):
    model = yaml.safe_load(MODEL.partition("=")[2]) | {"tied_output": tied}
    config = ModelConfig(**model, train_len_tokens=32, init_std=0.2)
    plan = build_model(config, seed=9)
    folder = model_folder(place / "model", place / "data", dict(plan.named_parameters()), config)
    settings = options(place / "data", place / "run", f"model.tied_output={str(tied).lower()}")
    done = run_all([[*IMPORT, str(folder), "--checkpoint", str(place / "run"), *settings]])[0]
    assert done.code == 0, done.output
    trained = run_all([[sys.executable, "pretrain.py", "--ds_config", "ds_configs/zero1.json", *settings]])[0]
    assert trained.code == 0 and "continuing" in trained.output, trained.output
    first = json.loads((place / "run" / "metrics.jsonl").read_text().splitlines()[0])
    blend = Blend([TokenDataset(place / "data")], None, 32, TrainConfig().seed)
    batch = make_batch(blend, blend.window_indices(0, 8), 32, config.intra_size - 1)
    with torch.no_grad():
        expected = float(token_losses(plan(tuple(batch)[:3]), batch.labels_BT).mean())
    assert first["step"] == 1
    assert first["loss/train_nats"] == pytest.approx(expected, rel=1e-5)
    again = run_all([[*IMPORT, str(folder), "--checkpoint", str(place / "run"), *settings]])[0]
    assert again.code == 2 and "the run has checkpoints already" in again.output


PRETRAIN = [sys.executable, "pretrain.py", "--ds_config", "ds_configs/zero1.json"]


def first_line(run_dir):
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])


def test_training_begins_from_the_model_that_the_run_names(place):
    config = ModelConfig(**yaml.safe_load(MODEL.partition("=")[2]), train_len_tokens=32, init_std=0.2)
    plan = build_model(config, seed=9)
    folder = model_folder(place / "model", place / "data", dict(plan.named_parameters()), config)
    from_folder = options(place / "data", place / "run", f"train.init_from={folder}")
    gone = options(place / "data", place / "gone", "train.init_from=no/such@3")
    done, refused = run_all([[*PRETRAIN, *from_folder, "--stop-step", "2"], [*PRETRAIN, *gone]])
    assert done.code == 0, done.output
    assert refused.code == 2 and "no such folder" in refused.output and "Traceback" not in refused.output

    from_run = options(place / "data", place / "next", f"train.init_from={place / 'run'}@2")
    onwards, begun = run_all([[*PRETRAIN, *from_folder], [*PRETRAIN, *from_run]])
    assert onwards.code == begun.code == 0, onwards.output + begun.output

    blend = Blend([TokenDataset(place / "data")], None, 32, TrainConfig().seed)
    batch = make_batch(blend, blend.window_indices(0, 8), 32, config.intra_size - 1)

    def loss_of(model):
        with torch.no_grad():
            return float(token_losses(model(tuple(batch)[:3]), batch.labels_BT).mean())

    assert first_line(place / "run")["loss/train_nats"] == pytest.approx(loss_of(plan), rel=1e-5)
    assert "continuing" in onwards.output  # from its own checkpoint, not from the model again
    trained = build_model(config)
    trained.load_state_dict(dict(WeightsOnDisk(find_checkpoint(f"{place / 'run'}@2"), torch.float32)))
    assert first_line(place / "next")["loss/train_nats"] == pytest.approx(loss_of(trained), rel=1e-5)
    assert loss_of(trained) != pytest.approx(loss_of(plan), rel=1e-3)


def test_import_into_a_run_that_it_does_not_suit_refuses(place):
    config = ModelConfig(**yaml.safe_load(MODEL.partition("=")[2]), train_len_tokens=32)
    weights = build_model(config).state_dict()
    good = model_folder(place / "model", place / "data", weights, config)
    other_rule = model_folder(place / "rule", place / "data", weights, config, segments_spec="[7]", token_ids=(7,))
    other_tokenizer = model_folder(place / "tokens", place / "data", weights, config, tokenizer_fingerprint="e" * 64)
    run = options(place / "data", place / "run")
    wrong = {
        "intra_size is 64 in the model and 32 in the run.* Give --set=model.intra_size=64": (
            good,
            ["model.intra_size=32"],
        ),
        "segment rule .* is expected here": (other_rule, []),
        "e{64}": (other_tokenizer, []),
        "no such folder": (good, [f"data.path={place / 'gone'}"]),
    }
    commands = [
        [*IMPORT, str(folder), "--checkpoint", str(place / "run"), *run, *(p for c in changes for p in ("--set", c))]
        for folder, changes in wrong.values()
    ]
    for message, ended in zip(wrong, run_all(commands), strict=True):
        assert ended.code == 2, ended.output
        assert re.search(message, ended.output), ended.output
        assert "Traceback" not in ended.output
    assert not (place / "run").exists()
