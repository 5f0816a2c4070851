"""Training from a model of another origin, which is imported as checkpoint 0 of a run or named by its configuration."""

import numpy as np
import pytest
import torch
import yaml

from megatron_bipe.checkpoint.find import find_checkpoint
from megatron_bipe.checkpoint.verify import CheckpointWeights
from megatron_bipe.config import ModelConfig, TrainConfig
from megatron_bipe.data.blend import Blend
from megatron_bipe.data.collate import make_batch
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.hf.export import ExportOptions, export_model
from megatron_bipe.hf.hf_config import DataFields
from megatron_bipe.model.loss import token_losses
from megatron_bipe.model.transformer import build_model
from tests.helpers.commands import MODEL, options
from tests.helpers.small_runs import losses
from tests.helpers.tools import call_tool, run_pretrain


def model_config(**changes):
    return ModelConfig(**yaml.safe_load(MODEL.partition("=")[2]) | changes, train_len_tokens=32, init_std=0.2)


def export(folder, data, weights, config, **changes):
    """Export a model that fits the data, except for `changes`."""
    dataset = TokenDataset(data)
    batch = make_batch(Blend([dataset], None, 32, 0), np.arange(2), 32, config.intra_size - 1)
    known = dataset.manifest
    fields = DataFields(known.rule.spec, known.rule.token_ids, known.tokenizer.fingerprint, {"bos": 1})._replace(
        **changes
    )
    samples = tuple(batch)[:3]
    if fields.token_ids != known.rule.token_ids:
        samples = (torch.full((1, 4), 99), torch.arange(4)[None], torch.zeros(1, 4, dtype=torch.long))
    export_model(weights, config, folder, fields, samples, None, ExportOptions(dtype=torch.float32))
    return folder


def first_loss(model, data, config):
    """Return the loss of a model over the first global batch of a run."""
    blend = Blend([TokenDataset(data)], None, 32, TrainConfig().seed)
    batch = make_batch(blend, blend.sequence_indices(0, 8), 32, config.intra_size - 1)
    with torch.no_grad():
        return float(token_losses(model(tuple(batch)[:3]), batch.labels_BT).mean())


def import_model(folder, run_dir, settings, code=0):
    return call_tool("import_hf", "--input", folder, "--checkpoint", run_dir, *settings, code=code).output


@pytest.mark.parametrize("tied", [False, True])
def test_training_continues_from_an_imported_model(tmp_path, text_dataset, tied):
    config, run_dir = model_config(tied_output=tied), tmp_path / "run"
    model = build_model(config, seed=9)
    folder = export(tmp_path / "model", text_dataset, dict(model.named_parameters()), config)
    settings = options(text_dataset, run_dir, f"model.tied_output={str(tied).lower()}")
    import_model(folder, run_dir, settings)
    [trained] = run_pretrain(settings, tmp_path)
    assert "continuing" in trained.output
    assert losses(run_dir)[0] == pytest.approx(first_loss(model, text_dataset, config), rel=1e-5)
    assert "CheckpointError" in import_model(folder, run_dir, settings, code=2)  # into a run that has checkpoints


def test_training_begins_from_the_model_that_the_run_names(tmp_path, text_dataset):
    config, run_dir, next_dir = model_config(), tmp_path / "run", tmp_path / "next"
    model = build_model(config, seed=9)
    folder = export(tmp_path / "model", text_dataset, dict(model.named_parameters()), config)
    from_folder = options(text_dataset, run_dir, f"train.init_from={folder}")
    run_pretrain([*from_folder, "--stop-step", 1], tmp_path / "first")
    [onwards] = run_pretrain(from_folder, tmp_path / "second")
    run_pretrain(options(text_dataset, next_dir, f"train.init_from={run_dir}@2"), tmp_path / "third")

    assert losses(run_dir)[0] == pytest.approx(first_loss(model, text_dataset, config), rel=1e-5)
    assert "continuing" in onwards.output  # from its own checkpoint, not from the model again
    trained = build_model(config)
    trained.load_state_dict(dict(CheckpointWeights(find_checkpoint(f"{run_dir}@2"), torch.float32)))
    expected = first_loss(trained, text_dataset, config)
    assert losses(next_dir)[0] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(losses(run_dir)[0], rel=1e-3)


def test_training_from_a_model_that_is_not_there_is_refused(tmp_path, text_dataset):
    settings = options(text_dataset, tmp_path / "run", "train.init_from=no/such@3")
    [refused] = run_pretrain(settings, tmp_path, code=2)
    assert "CheckpointError" in refused.output and "no/such" in refused.output and "Traceback" not in refused.output


def test_import_into_a_run_that_the_model_does_not_fit_is_refused(tmp_path, text_dataset):
    config, run_dir = model_config(), tmp_path / "run"
    weights = build_model(config).state_dict()
    good = export(tmp_path / "model", text_dataset, weights, config)
    other_rule = export(tmp_path / "rule", text_dataset, weights, config, segments_spec="[7]", token_ids=(7,))
    other_tokenizer = export(tmp_path / "tokens", text_dataset, weights, config, tokenizer_fingerprint="e" * 64)
    cases = {  # what the error reports -> a model and the settings of a run
        ("ConfigError", "intra_size is 64", "--set=model.intra_size=64"): (good, ["model.intra_size=32"]),
        ("DataError", "[7]", "segment"): (other_rule, []),
        ("DataError", "e" * 64): (other_tokenizer, []),
        ("DataError", str(tmp_path / "gone")): (good, [f"data.path={tmp_path / 'gone'}"]),
    }
    for observed, (folder, changes) in cases.items():
        output = import_model(folder, run_dir, options(text_dataset, run_dir, *changes), code=2)
        assert all(part in output for part in observed), output
    assert not run_dir.exists()
