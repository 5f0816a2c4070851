"""Memory of one rank of a layout."""

import pytest

from megatron_bipe.config.load import load_run_config
from megatron_bipe.estimate.memory import block_bytes_per_token, stage_memories
from megatron_bipe.model.transformer import count_parameters

BF16 = ["train.precision=bf16"]  # tests mean the same on every machine

PARAMETERS = 163_203_840  # of the default run
NORMS_AND_INTRA = 25 * 768 + 1024 * 768  # replicated on every tensor-parallel rank


def memories(zero, num_ranks, *settings, **knobs):
    run = load_run_config(None, [*BF16, *settings])
    return stage_memories(run, {"zero_optimization": {"stage": zero, **knobs}}, num_ranks)


def test_state_is_divided_by_what_the_zero_stage_shards():
    widths = {"weights": 2, "gradients": 4, "optimizer": 12}  # bytes per parameter in bf16
    sharded = {1: {"optimizer"}, 2: {"optimizer", "gradients"}}
    for zero, names in sharded.items():
        (stage,) = memories(zero, 4)
        for name, width in widths.items():
            assert getattr(stage, name) == PARAMETERS * width / (4 if name in names else 1)


def test_state_zero_0_in_bf16_has_gradients_in_bf16_and_nothing_sharded():
    (stage,) = memories(0, 4)
    assert (stage.weights, stage.gradients, stage.optimizer) == (2 * PARAMETERS, 2 * PARAMETERS, 12 * PARAMETERS)


def test_state_in_fp32_has_master_weights_only_with_zero():
    assert memories(0, 4, "train.precision=fp32")[0].optimizer == 8 * PARAMETERS
    assert memories(1, 4, "train.precision=fp32")[0].optimizer == 12 * PARAMETERS / 4


def test_state_is_sharded_over_all_ranks_with_the_same_weights():
    shared = memories(1, 8, "parallel={context: 2, tensor: 2}")[0].optimizer
    assert shared == memories(1, 4, "parallel.tensor=2")[0].optimizer / 2


def test_state_zero_3_has_its_shard_of_the_weights_and_two_full_layers():
    largest = max(count_parameters(load_run_config(None, BF16).model))
    assert memories(3, 4)[0].weights == 2 * PARAMETERS / 4 + 2 * 2 * largest


def test_state_offloaded_is_on_the_host():
    (stage,) = memories(2, 4, offload_optimizer={"device": "cpu"})
    assert (stage.gradients, stage.optimizer, stage.host) == (0, 0, 16 * PARAMETERS / 4)


def test_state_weights_that_are_offloaded_are_on_the_host_but_for_two_layers():
    largest = max(count_parameters(load_run_config(None, BF16).model))
    (stage,) = memories(3, 4, offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"})
    assert (stage.weights, stage.host) == (2 * 2 * largest, (2 + 4 + 12) * PARAMETERS / 4)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("pipeline", [1, 2, 5])
def test_parameters_of_all_stages_and_tensor_ranks_are_the_model_and_its_replicas(tensor, pipeline):
    stages = memories(1, tensor * pipeline, f"parallel={{tensor: {tensor}, pipeline: {pipeline}}}")
    held = sum(stage.parameters for stage in stages) * tensor
    assert held - (tensor - 1) * NORMS_AND_INTRA == PARAMETERS
    assert sum(stage.cost_share for stage in stages) == pytest.approx(1)
    assert [stage.first_layer for stage in stages[1:]] == [stage.last_layer + 1 for stage in stages[:-1]]


def test_parameters_tied_output_is_held_twice_by_stages_and_once_by_one():
    table = 32_000 * 768
    assert memories(1, 2, "model.tied_output=true")[0].parameters == PARAMETERS - table
    staged = memories(1, 2, "model.tied_output=true", "parallel.pipeline=2")
    assert sum(stage.parameters for stage in staged) == PARAMETERS


def test_activations_earlier_stages_keep_more_micro_batches():
    stages = memories(1, 4, "parallel.pipeline=4")
    # Tokens of a micro-batch; bytes per token, as measured by test_activations.py.
    a_block, tables = 8 * 1024 * 35_384, 8 * 1024 * 128
    assert [stage.activations for stage in stages] == [
        4 * (3 * a_block + tables),  # micro-batches in flight x blocks
        3 * (4 * a_block + tables),
        2 * (4 * a_block + tables),
        1 * (1 * a_block + tables),
    ]


def test_activations_few_micro_batches_are_all_that_is_kept():
    few, many = (memories(1, 4, "parallel.pipeline=4", f"train.global_batch={n}")[0] for n in (16, 256))
    assert few.activations == many.activations / 2


def test_activations_recomputation_and_splitting_keep_less():
    def kept(*settings):
        run = load_run_config(None, [*BF16, *settings])
        return block_bytes_per_token(run.model, run.parallel, 2, run.parallel.recompute, run.train.seq_len_tokens)

    assert memories(1, 2, "parallel.context=2")[0].logits == memories(1, 2)[0].logits / 2
    layouts = ["parallel.tensor=4", "parallel={tensor: 4, sequence: true}"]
    assert kept() > kept(layouts[0]) > kept(layouts[1])
    modes = [kept(f"parallel={{tensor: 4, recompute: {mode}}}") for mode in ("none", "selective", "full")]
    assert modes[0] > modes[1] > modes[2]


def test_logits_are_on_the_last_stage_alone_and_split():
    stages = memories(1, 4, "parallel={tensor: 2, pipeline: 2}")
    assert [stage.logits for stage in stages] == [0, 8 * 1024 * 32_000 * 2 / 2]


def test_device_memory_is_the_sum_of_its_parts():
    (stage,) = memories(1, 2)
    assert stage.device == stage.weights + stage.gradients + stage.optimizer + stage.activations + stage.logits
