"""Tiny models with large weights, so that a wrong position or name shows in the logits."""

from pathlib import Path

import pytest
import torch

from megatron_bipe.config import ModelConfig
from megatron_bipe.data.segments import SegmentRule, bilevel_ids, segment_ends
from megatron_bipe.hf.card import CardFacts
from megatron_bipe.hf.configuration_bipe import BipeConfig
from megatron_bipe.hf.export import ExportOptions, export_model
from megatron_bipe.hf.hf_config import DataFields, hf_settings
from megatron_bipe.hf.modeling_bipe import BipeForCausalLM
from megatron_bipe.hf.weight_mapping import to_llama
from megatron_bipe.model.transformer import build_model
from tests.helpers.hf import PUBLISHED_ENCODINGS
from tests.helpers.paths import ORACLE

SEPARATORS = (3, 5)
DATA = DataFields("[3,5]", SEPARATORS, "f" * 64, {"bos": 1, "eos": 2})


CARD = CardFacts("Tiny", {"Data": "a|b"}, {"train.steps": "3"}, ["en"], ["org/data"])
FP32 = ExportOptions(dtype=torch.float32, card=CARD)


def tiny_config(**changes):
    shape = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "ffn_size": 48, "vocab_size": 64}
    rest = {"intra_size": 12, "train_len_tokens": 32, "init_std": 0.2}
    return ModelConfig(**{**shape, **rest, **changes})


def tiny_plan(config, seed=0):
    model = build_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def as_hf(plan, config, data=DATA):
    settings = hf_settings(config, data, torch.float32) | {"model_type": "bipe"}
    model = BipeForCausalLM(BipeConfig(**settings)).eval()
    model.load_state_dict(to_llama(plan.state_dict(), config))
    model.generation_config.eos_token_id = None  # generation continues to the requested length
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="session")
def tiny():
    return tiny_config


@pytest.fixture(scope="session")
def plan_of():
    return tiny_plan


@pytest.fixture(scope="session")
def hf_of():
    return as_hf


@pytest.fixture(scope="module", params=PUBLISHED_ENCODINGS)
def model(request):
    """Return an HF model of each encoding, with grouped queries."""
    config = tiny_config(encoding=request.param, num_kv_heads=2)
    return as_hf(tiny_plan(config), config)


@pytest.fixture(scope="module")
def bilevel():
    """Return an HF model with bilevel encoding."""
    config = tiny_config()
    return as_hf(tiny_plan(config), config)


@pytest.fixture(scope="session")
def fields():
    return DATA


@pytest.fixture(scope="session")
def tokens_of():
    """Return random tokens [rows, length] with single and consecutive separators."""

    def make(rows, length, seed=0):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(6, 64, (rows, length), generator=generator)
        chosen = torch.rand(rows, length, generator=generator)
        return tokens.masked_fill(chosen < 0.2, SEPARATORS[0]).masked_fill(chosen > 0.85, SEPARATORS[1])

    return make


@pytest.fixture(scope="session")
def golden():
    return Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def oracle():
    if not ORACLE.is_dir():
        pytest.skip(reason="the full oracle is not next to the repository")
    return ORACLE


@pytest.fixture
def sequences(tokens_of):
    tokens = tokens_of(2, 40)
    rule = SegmentRule(spec="[3,5]", token_ids=(3, 5))
    return (tokens, *map(torch.from_numpy, bilevel_ids(segment_ends(tokens.numpy(), rule), 11)))


@pytest.fixture
def export(tmp_path, tiny, plan_of, fields, sequences):
    """Return a function that exports a model to a folder of tmp_path and returns the folder."""

    def make(config=None, name="m", *, weights=None, data=fields, tokenizer=None, **options):
        config = config or tiny()
        weights = weights or plan_of(config).state_dict()
        export_model(weights, config, tmp_path / name, data, sequences, tokenizer, FP32._replace(**options))
        return tmp_path / name

    return make


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    text = "The end . Of it...\n\tdef f(x): return 10 * x  # héé ﬁne 漢字\n".splitlines(keepends=True)
    code = Path(__file__).with_name("test_export.py").read_text("utf-8")
    path.write_text("".join(line * 3 for line in text) + code, "utf-8")
    return path
