"""Small datasets and models that evaluation tests share."""

import json

import numpy as np
import pytest
import yaml
from safetensors.torch import save_file

from megatron_bipe.config import ModelConfig
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import TokenizerRecord
from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.eval.eval_model import EvalModel
from megatron_bipe.hf.weight_mapping import to_llama
from megatron_bipe.model.transformer import build_model
from tests.helpers.checkpoints import write_checkpoint

VOCAB = 40
FINGERPRINT = "a" * 64
NEWLINE = SegmentRule(spec="newline", token_ids=(13,))


@pytest.fixture
def make_dataset(tmp_path, write_dataset):
    """Makes a TokenDataset of two shards from lists of ids; each token stands for 3 bytes of text."""

    def make(documents, rule=NEWLINE, name="corpus", vocab_size=VOCAB, fingerprint=FINGERPRINT):
        half = len(documents) // 2
        tokenizer = TokenizerRecord(name="test", fingerprint=fingerprint, vocab_size=vocab_size, special_ids={})
        shards = [documents[:half], documents[half:]]
        write_dataset(tmp_path / name, shards, rule=rule, vocab_size=vocab_size, tokenizer=tokenizer)
        return TokenDataset(tmp_path / name)

    return make


@pytest.fixture
def documents():
    """Six documents of 173 tokens together, about every eighth token a newline."""
    generator = np.random.default_rng(0)
    result = []
    for size in (31, 1, 60, 12, 40, 29):
        tokens = generator.integers(14, VOCAB, size)
        tokens[generator.random(size) < 0.12] = 13
        result.append(tokens)
    return result


@pytest.fixture(scope="session")
def make_eval_model():
    """Maker of an EvalModel whose weights are large enough for positions to matter."""

    def make(encoding="bipe_rope", rule=NEWLINE, fingerprint=FINGERPRINT, name="tiny", **changes):
        values = {
            "encoding": encoding,
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "ffn_size": 48,
            "vocab_size": VOCAB,
            "intra_size": 6,
            "train_len_tokens": 16,
            "init_std": 0.2,
        }
        config = ModelConfig(**values | changes)
        return EvalModel(name, f"runs/{name}", build_model(config, seed=3), config, fingerprint, rule)

    return make


@pytest.fixture
def save_run(tmp_path):
    """Maker of a run folder as pretrain.py leaves it; earlier steps have smaller weights."""

    def save(eval_model, dataset, steps=(5, 10)):
        run_dir = tmp_path / eval_model.name
        model = {k: v for k, v in eval_model.config.model_dump(mode="json").items() if v is not None}
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text(yaml.safe_dump({"model": model, "train": {"precision": "fp32"}}))
        for step in steps:
            weights = {name: weight * (step / steps[-1]) for name, weight in eval_model.model.state_dict().items()}
            write_checkpoint(run_dir, step, weights)
        (run_dir / "data.json").write_text(dataset.manifest.record.model_dump_json())
        return run_dir

    return save


@pytest.fixture
def save_exported(tmp_path):
    """Maker of those parts of an exported folder that loading reads."""

    def save(eval_model):
        folder, config = tmp_path / eval_model.name, eval_model.config
        folder.mkdir()
        settings = {
            "model_type": "bipe",
            "encoding": config.encoding,
            "num_hidden_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.kv_heads,
            "intermediate_size": config.ffn_size,
            "vocab_size": config.vocab_size,
            "intra_size": config.intra_size,
            "train_len_tokens": config.train_len_tokens,
            "rms_norm_eps": config.norm_eps,
            "initializer_range": config.init_std,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
            "segments": {"spec": eval_model.rule.spec, "token_ids": list(eval_model.rule.token_ids)},
            "tokenizer_fingerprint": eval_model.tokenizer_fingerprint,
        }
        (folder / "config.json").write_text(json.dumps(settings))
        weights = {
            name: weight.contiguous() for name, weight in to_llama(eval_model.model.state_dict(), config).items()
        }
        save_file(weights, folder / "model.safetensors")
        return folder

    return save
