"""Tensor and sequence parallelism without an engine: losses and gradients of one process, and communication.

Measured in fp32 (largest over models and layouts): losses differ by 2e-7 relative, gradients by 2e-6 of the largest.
"""

from typing import Any

import pytest
import torch

from megatron_bipe.config import ModelConfig
from megatron_bipe.model.layer_factory import shard_of
from megatron_bipe.model.transformer import LocalLayers, build_model
from megatron_bipe.parallel.mesh import Mesh
from tests.helpers.ranks import run_ranks
from tests.helpers.tiers import slow

SEED = 3
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5
MODELS = {
    **{name: {"encoding": name} for name in ("bipe_rope", "bipe_alibi", "rope", "alibi")},
    "grouped": {"encoding": "bipe_alibi", "num_kv_heads": 4},
    "one group": {"encoding": "bipe_rope", "num_kv_heads": 1},
    "one group with slopes": {"encoding": "bipe_alibi", "num_kv_heads": 1, "log_scale": True},
    "t5": {"encoding": "t5", "num_kv_heads": 4},
    "sinusoidal": {"encoding": "bipe_xpos", "intra_encoding": "sinusoidal"},
    "no intra": {"encoding": "bipe_xpos", "intra_encoding": "none"},
    "learned": {"encoding": "learned", "train_len_tokens": 16},
    "drawn": {"encoding": "randomized_rope", "train_len_tokens": 16},
    "padding row": {"encoding": "bipe_rope", "zero_last_row": True},
}


def config(**more: Any) -> ModelConfig:
    sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 8, "ffn_size": 96, "vocab_size": 64, "intra_size": 16}
    return ModelConfig(**sizes, **more)


def batch() -> tuple[torch.Tensor, ...]:
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    tokens[0, 5] = 63  # the padding row
    positions = torch.arange(16).expand(2, 16)
    return tokens[:, :-1], positions % 5, positions // 5, tokens[:, 1:]


def loss_and_gradients(model: torch.nn.Sequential, layers: Any) -> tuple[float, dict[str, torch.Tensor]]:
    *ids, labels = batch()
    loss = layers.token_losses(model(tuple(ids)), labels).mean()
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


def split_model(mesh: Mesh) -> dict[tuple[str, bool], Any]:
    """Compare every model, with and without sequence parallelism, with the unsharded one."""
    import torch.distributed as dist
    from torch.distributed.tensor.debug import CommDebugMode

    from megatron_bipe.parallel.tensor_parallel import TensorParallelLayers

    dist.init_process_group("gloo")
    results = {}
    for name, more in MODELS.items():
        unsharded = build_model(config(**more), SEED)
        expected_loss, expected = loss_and_gradients(unsharded, LocalLayers())
        for sequence in (False, True):
            layers = TensorParallelLayers(dist.group.WORLD, sequence)
            model = build_model(config(**more), SEED, layers)
            communicated = CommDebugMode()
            with communicated:
                loss, gradients = loss_and_gradients(model, layers)
            worst = 0.0
            for key, parameter in model.named_parameters():
                shard, target = shard_of(parameter), dict(unsharded.named_parameters())[key]
                torch.testing.assert_close(parameter, shard.select(target) if shard else target, rtol=0, atol=0)
                wanted = shard.select(expected[key]) if shard else expected[key]
                worst = max(worst, float((gradients[key] - wanted).abs().max() / expected[key].abs().max()))
            results[name, sequence] = {
                "loss": abs(loss / expected_loss - 1),
                "gradients": worst,
                "communicated": {str(kind): count for kind, count in communicated.get_comm_counts().items()},
                "replicated": {key: gradients[key] for key, p in model.named_parameters() if shard_of(p) is None},
            }
    return results


@pytest.fixture(scope="module", params=[2, *slow([4])])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(split_model, request.param, tmp_path_factory.mktemp("tensor"))


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_tensor_parallel_model_gives_the_loss_and_gradients_of_one_process(
    ranks: list[Any], name: str, sequence: bool
) -> None:
    for result in ranks:
        assert result[name, sequence]["loss"] < LOSS_TOLERANCE
        assert result[name, sequence]["gradients"] < GRADIENT_TOLERANCE


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_tensor_parallel_gradients_of_replicated_parameters_are_bit_identical(
    ranks: list[Any], name: str, sequence: bool
) -> None:
    first = ranks[0][name, sequence]["replicated"]
    for result in ranks[1:]:
        for key, gradient in result[name, sequence]["replicated"].items():
            assert torch.equal(gradient, first[key]), key


def test_tensor_parallel_communication_is_the_textbooks(ranks: list[Any]) -> None:
    """Two sums per block and direction; with sequence parallelism four pairs, and the small sums of norms."""
    blocks = 2
    plain, sequence = (ranks[0]["rope", split]["communicated"] for split in (False, True))
    embedding, head, loss = 1, 1, 2
    assert sum(plain.values()) == 4 * blocks + embedding + head + loss
    norms = 2 * blocks + 1
    gathers = sum(count for key, count in sequence.items() if "gather" in key)
    scatters = sum(count for key, count in sequence.items() if "scatter" in key)
    assert gathers == scatters == 4 * blocks + embedding + head
    assert sum(sequence.values()) - gathers - scatters == norms + loss
