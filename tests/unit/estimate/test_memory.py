"""Memory of one rank of a layout."""

import pytest

from megatron_bipe.config.deepspeed import engine_config, read_ds_config
from megatron_bipe.config.load import load_run_config
from megatron_bipe.config.validate import validate_run
from megatron_bipe.errors import ConfigError
from megatron_bipe.estimate.memory import block_bytes_per_token, stage_memories
from megatron_bipe.model.transformer import count_parameters
from megatron_bipe.runtime.gpus import named_gpu
from tests.helpers.paths import DS_CONFIGS, ROOT

BF16 = ["train.precision=bf16"]  # tests mean the same on every machine

PARAMETERS = 163_203_840  # of the default run
NORMS_AND_INTRA = 25 * 768 + 1024 * 768  # replicated on every tensor-parallel rank


def memories(zero, num_ranks, *settings, on_gpu=False, **knobs):
    run = load_run_config(None, [*BF16, *settings])
    return stage_memories(run, {"zero_optimization": {"stage": zero, **knobs}}, num_ranks, on_gpu=on_gpu)


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


GIB = 2**30
LOSS_PARTS = 3 * 4 * 2**26 / GIB


def gpu_part(zero, num_ranks, *settings, **knobs):
    """Return what a GPU needs besides tensors, less fragmentation, of each stage in GiB."""
    stages = memories(zero, num_ranks, *settings, on_gpu=True, **knobs)
    assert [stage.device for stage in stages] == [stage.tensors + stage.gpu for stage in stages]
    return [(stage.gpu - 0.05 * stage.tensors) / GIB for stage in stages]


def test_gpu_needs_more_than_tensors_and_a_cpu_does_not():
    assert gpu_part(1, 1) == [pytest.approx(1.5)]
    assert memories(1, 1)[0].gpu == 0


def test_gpu_has_communicators_of_each_axis_that_has_ranks():
    assert gpu_part(1, 4) == [pytest.approx(1.5 + 2 * 0.5)]  # of all ranks, and of replicas
    assert gpu_part(1, 16, "parallel={tensor: 2, context: 2, pipeline: 2}") == [pytest.approx(1.5 + 5 * 0.5)] * 2


def test_gpu_has_fp32_parts_of_logits_unless_the_loss_is_compiled():
    for zero, choice, more in ((1, "auto", 0), (1, "off", LOSS_PARTS), (3, "auto", LOSS_PARTS)):
        found = gpu_part(zero, 1, f"train.compile={choice}", contiguous_gradients=False)
        assert found == [pytest.approx(1.5 + more)]
    few_logits = gpu_part(1, 1, "train.compile=off", "train.micro_batch=1")
    assert few_logits == [pytest.approx(1.5 + 3 * 4 * 1024 * 32_000 / GIB)]
    first, last = gpu_part(1, 2, "parallel.pipeline=2", "train.compile=off")
    assert last == pytest.approx(first + LOSS_PARTS)


@pytest.mark.parametrize(
    ("zero", "options", "buckets"),
    [
        (1, {}, 0),
        (1, {"precision": "fp32"}, 2),
        (2, {}, 1),
        (2, {"overlap_comm": True}, 2),
        (2, {"overlap_comm": True, "contiguous_gradients": False}, 0),
        (3, {"overlap_comm": True}, 1),
    ],
)
def test_gpu_has_gradient_buckets(zero, options, buckets):
    precision = options.pop("precision", "bf16")
    found = gpu_part(zero, 1, f"train.precision={precision}", reduce_bucket_size=2**29, **options)
    parts = LOSS_PARTS if zero == 3 else 0  # not compiled
    assert found == [pytest.approx(1.5 + buckets + parts)]


def test_host_has_the_copy_from_which_checkpoints_are_written():
    assert memories(1, 4)[0].checkpoint_copy == memories(0, 4)[0].checkpoint_copy == 12 * PARAMETERS / 4
    assert memories(1, 4, "checkpoint.asynchronous=false")[0].checkpoint_copy == 0


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_fit_an_h100_of_80_gb_in_their_layout(path):
    run = load_run_config(path, BF16)
    one_replica = run.parallel.tensor * run.parallel.context * run.parallel.pipeline
    tried = 0
    for num_ranks in sorted({one_replica, 8, 64}):
        try:
            validate_run(run, num_ranks)
        except ConfigError:  # the batch is too small for so many ranks
            continue
        ds_config = engine_config(run, read_ds_config(DS_CONFIGS / "zero1.json"), num_ranks, "")
        stages = stage_memories(run, ds_config, num_ranks, on_gpu=True)
        assert max(stage.device for stage in stages) / GIB < named_gpu("H100", "").memory_gib, num_ranks
        tried += 1
    assert tried
    assert tried == 3 or "1.6b" not in path.stem  # on 1, 8 and 64 GPUs
