"""Absolute encodings against plain formulas, and sequences that are longer than an embedding."""

import math

import pytest
import torch

from megatron_bipe.config import ModelConfig
from megatron_bipe.config.encodings import RELATIVE
from megatron_bipe.errors import ConfigError
from megatron_bipe.model.transformer import Embedding, LocalLayers, build_model
from tests.helpers.errors import raises

WIDTH = 12
LOCATION = "train.seq_len_tokens or --lengths"


def config_of(encoding, **changes):
    shape = {"num_layers": 1, "hidden_size": WIDTH, "num_heads": 2, "ffn_size": 8, "vocab_size": 20, "intra_size": 9}
    return ModelConfig(**{**shape, "encoding": encoding, "train_len_tokens": 32, **changes})


def embedding_of(encoding, **changes):
    torch.manual_seed(0)
    return Embedding(config_of(encoding, **changes), LocalLayers())


def sequences(num_tokens):
    """Return tokens, and both ids for segments of 9 tokens."""
    tokens = torch.randint(0, 20, (2, num_tokens), generator=torch.Generator().manual_seed(1))
    position_ids = torch.arange(num_tokens).expand(2, -1)
    return tokens, position_ids % 9, position_ids // 9


def added(embedding, ids):
    return embedding(ids)[0] - embedding.token(ids[0])


@pytest.mark.parametrize("encoding", ["sinusoidal", "bipe_nope"])
def test_sinusoidal_adds_sines_and_cosines_for_positions_of_any_size(encoding):
    intra = {"intra_encoding": "sinusoidal"} if encoding != "sinusoidal" else {}
    ids = sequences(500)
    found = added(embedding_of(encoding, init_std=0.3, **intra), ids)
    for t in (0, 1, 7, 31, 32, 499):
        position = t % 9 if intra else t
        angles = [position / 10_000 ** (2 * i / WIDTH) for i in range(WIDTH // 2)]
        wanted = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)]) * 0.3
        torch.testing.assert_close(found[1, t], wanted, atol=2e-5, rtol=0)  # of angles of 499, in fp32


def test_sinusoidal_has_no_parameters():
    assert [name for name, _ in embedding_of("sinusoidal").named_parameters()] == ["token.weight"]


def test_learned_adds_the_row_of_the_token_position():
    embedding, ids = embedding_of("learned"), sequences(32)
    table = dict(embedding.named_parameters())["place.weight"]
    assert table.shape == (32, WIDTH)
    torch.testing.assert_close(added(embedding, ids), table.expand(2, -1, -1))


def test_bilevel_learned_adds_the_row_of_the_position_in_the_segment():
    embedding, ids = embedding_of("bipe_xpos"), sequences(32)
    table = dict(embedding.named_parameters())["intra.weight"]
    torch.testing.assert_close(added(embedding, ids), table[ids[1]])


@pytest.mark.parametrize("encoding", ["nope", "rope", "xpos", "t5", "bipe_rope"])
def test_none_adds_nothing(encoding):
    embedding = embedding_of(encoding, **({"intra_encoding": "none"} if encoding == "bipe_rope" else {}))
    assert [name for name, _ in embedding.named_parameters()] == ["token.weight"]
    assert not added(embedding, sequences(32)).any()


@pytest.mark.parametrize(("encoding", "longest"), [("learned", 32), ("randomized_rope", 128)])
def test_sequence_longer_than_the_embedding_is_one_clear_error(encoding, longest):
    model = build_model(config_of(encoding))
    assert model(sequences(longest)).isfinite().all()
    with raises(ConfigError, longest + 1, f"{longest} ", f"model.encoding={encoding}", location=LOCATION):
        model(sequences(longest + 1))


@pytest.mark.parametrize("name", ["alibi", "bipe_alibi", "xpos", "bipe_xpos"])
def test_sequence_longer_than_attention_encodes_is_refused_before_it_is_reached(name):
    longest = RELATIVE[name.removeprefix("bipe_")].max_seq_len_tokens
    embedding = embedding_of(name)
    embedding(sequences(longest))
    with raises(ConfigError, longest + 1, f"{longest} ", f"model.encoding={name}", location=LOCATION):
        embedding(sequences(longest + 1))


def test_sinusoidal_keeps_the_precision_of_the_residual_stream():
    assert embedding_of("sinusoidal").bfloat16()(sequences(8))[0].dtype == torch.bfloat16
