"""What of a model's configuration a run that goes on from it may change."""

import pytest

from megatron_bipe.config.schema import ModelConfig, RopeScaling
from megatron_bipe.train.init_from import _differences


@pytest.mark.parametrize(
    ("encoding", "changes", "named"),
    [
        ("bipe_rope", {"train_len_tokens": 64, "init_std": 0.3, "rope_scaling": RopeScaling(type="ntk", factor=2)}, []),
        ("learned", {"train_len_tokens": 64, "init_std": 0.3}, ["train_len_tokens"]),
        ("randomized_rope", {"train_len_tokens": 64}, ["train_len_tokens"]),
        ("sinusoidal", {"train_len_tokens": 64, "init_std": 0.3}, ["init_std"]),
        ("bipe_t5", {"intra_encoding": "none", "encoding": "bipe_nope"}, ["encoding", "intra_encoding"]),
    ],
)
def test_differences_name_what_is_built_into_the_weights(encoding, changes, named):
    model = ModelConfig(encoding=encoding, train_len_tokens=32)
    found = _differences(model, model.model_copy(update=changes))
    assert [key for key, _, _ in found] == named
