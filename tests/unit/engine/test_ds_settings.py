"""Keys of a DeepSpeed file are used, said to have no effect, or refused; none is ignored in silence."""

import json
from typing import ClassVar

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from megatron_bipe.config.deepspeed import engine_config, read_ds_config
from megatron_bipe.config.load import load_run_config
from megatron_bipe.engine.ds_settings import check_settings, ignored_settings
from megatron_bipe.errors import ConfigError
from tests.helpers.errors import raises
from tests.helpers.paths import DS_CONFIGS

AUTO = "auto"
# The parts of files for other trainers that several of them share, as in the documentation of such trainers.
BATCHES = {
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
    "gradient_accumulation_steps": AUTO,
    "gradient_clipping": AUTO,
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}
FP16 = {
    "enabled": AUTO,
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
ADAM = {"type": "AdamW", "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": AUTO, "warmup_max_lr": AUTO, "warmup_num_steps": AUTO}}
CPU = {"device": "cpu", "pin_memory": True}
ZERO_2 = {
    "stage": 2,
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 2e8,
    "contiguous_gradients": True,
}
ZERO_3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
BUCKETS = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


def start(values):
    check_settings(values, "ds.json")
    return engine_config(load_run_config(None, ["train.precision=bf16"]), values, 4, "ds.json")


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_settings_shipped_files_are_accepted_without_a_word(path):
    values = read_ds_config(path)
    start(values)
    assert ignored_settings(values, "fp32") == []


@pytest.mark.parametrize(
    "values",
    [
        {**BATCHES, "fp16": FP16, "zero_optimization": ZERO_2 | {"offload_optimizer": CPU}},
        {**BATCHES, "bf16": {"enabled": AUTO}, "zero_optimization": ZERO_3 | {"offload_param": CPU}},
        {
            **BATCHES,
            "zero_optimization": {"stage": 1, "round_robin_gradients": True},
            "zero_allow_untested_optimizer": True,
        },
        {"flops_profiler": {"enabled": True, "profile_step": 5, "output_file": None}, "csv_monitor": {"enabled": True}},
        {"tensorboard": {"enabled": False}, "elasticity": {"enabled": False, "max_train_batch_size": 2}, "amp": {}},
        {"timers": {"throughput": {"enabled": False, "synchronized": False}}},
        {"activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False}},
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "none"}}},
    ],
)
def test_settings_of_other_trainers_files_are_accepted(values):
    assert AUTO not in json.dumps(start(values))


def test_settings_without_effect_are_said():
    values = {**BATCHES, "fp16": FP16, "dump_state": True, "zero_optimization": ZERO_3 | {"stage": 2}}
    said = "\n".join(ignored_settings(values, "fp32"))
    for key in ("steps_per_print", "train.log_every", "dump_state", "fp16", "stage3_max_live_parameters", "export_hf"):
        assert key in said
    assert "wall_clock" not in said and "stage3_max_live" not in "".join(
        ignored_settings({"zero_optimization": ZERO_3}, "fp32")
    )


def test_settings_that_the_installed_deepspeed_does_not_read_are_said():
    said = ignored_settings({"zero_optimization": ZERO_2}, "bf16")
    assert [line.partition(":")[0].rpartition(".")[2] for line in said] == [
        "allgather_bucket_size",
        "allgather_partitions",
    ]


@pytest.mark.parametrize(
    ("stage", "reduce_scatter", "precision", "is_ignored", "is_refused"),
    [
        (0, True, "bf16", False, False),
        (1, True, "fp32", True, False),
        (1, False, "fp32", False, False),
        (1, False, "bf16", True, False),  # without DeepSpeed's reduction
        (2, True, "bf16", False, True),
        (3, True, "bf16", False, True),
        (2, False, "bf16", False, False),
    ],
)
def test_settings_of_dividing_gradients_are_used_ignored_or_refused_as_by_deepspeed(
    stage, reduce_scatter, precision, is_ignored, is_refused
):
    rescaling = {"prescale_gradients": True, "gradient_predivide_factor": 2.0}
    values = rescaling | {"zero_optimization": {"stage": stage, "reduce_scatter": reduce_scatter}}
    if is_refused:
        with raises(ConfigError, *rescaling, "reduce_scatter=false", location="ds.json"):
            check_settings(values, "ds.json")
    else:
        check_settings(values, "ds.json")
        assert len(ignored_settings(values, precision)) == len(rescaling) * is_ignored
        offloading = {"zero_optimization": values["zero_optimization"] | {"offload_optimizer": CPU}}
        said = ignored_settings(values | offloading, precision)
        assert len(said) == len(rescaling) * (is_ignored and reduce_scatter)
    off = {"prescale_gradients": False, "gradient_predivide_factor": 1.0}
    check_settings(values | off, "ds.json")
    assert ignored_settings(values | off, "bf16") == []


@pytest.mark.parametrize(
    ("values", "observed"),
    [
        ({"zero_optimisation": {"stage": 2}}, ["'zero_optimisation'", "'zero_optimization'"]),
        ({"stage": 2}, ["'stage'", "'zero_optimization.stage'"]),
        ({"offload_optimizer": CPU}, ["'offload_optimizer'", "'zero_optimization.offload_optimizer'"]),
        ({"optimiser": ADAM}, ["'optimiser'", "'optimizer'"]),
        ({"zero_optimization": {"stge": 2}}, ["'zero_optimization.stge'", "'zero_optimization.stage'"]),
        (
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 5}},
            ["stage3_prefetch_bucket'", "'zero_optimization.stage3_prefetch_bucket_size'"],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}},
            ["'zero_optimization.offload_optimizer.devise'", "'zero_optimization.offload_optimizer.device'"],
        ),
        ({"bf16": {"enable": True}}, ["'bf16.enable'", "'bf16.enabled'"]),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, ["grad_acum_dtype", "'data_types.grad_accum_dtype'"]),
        ({"flops_profiler": {"profile_steps": 1}}, ["'flops_profiler.profile_steps'", "'flops_profiler.profile_step'"]),
        ({"a": 1, "zero_optimization": {"b": 2}}, ["'a'", "'zero_optimization.b'"]),
        ({"bfloat16": {"enabled": True}}, ["bfloat16", "bf16"]),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            ["cpu_offload", "zero_optimization.offload_optimizer"],
        ),
        (
            {"activation_checkpointing": {"partition_activations": True}},
            ["activation_checkpointing", "parallel.recompute"],
        ),
        ({"amp": {"enabled": True}}, ["amp", "train.precision"]),
        ({"data_types": {"param_dtype": "fp16"}}, ["data_types.param_dtype", "train.precision"]),
        ({"curriculum_learning": {"enabled": True}}, ["curriculum_learning"]),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op"]),
        ({"bf16": {"check_grad_overflow": False}}, ["bf16.check_grad_overflow=false"]),
        (
            {"zero_optimization": {"stage": 1, "compute_grad_norm": False}},
            ["zero_optimization.compute_grad_norm=false"],
        ),
        ({"zero_optimization": {"stage": 2, "offload_param": CPU}}, ["zero_optimization.offload_param", "stage 2"]),
        ({"zero_optimization": {"offload_optimizer": CPU}}, ["zero_optimization.offload_optimizer", "stage 0"]),
        ({"zero_optimization": {"overlap_comm": "ture"}}, ["zero_optimization.overlap_comm", "'ture'"]),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, ["zero_optimization.reduce_bucket_size", "'5e8'"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, ["offload_optimizer.device", "'gpu'"]),
        ({"prescale_gradients": "yes"}, ['prescale_gradients="yes"']),
        ({"gradient_predivide_factor": True}, ["gradient_predivide_factor=true"]),
        ({"gradient_predivide_factor": 0}, ["gradient_predivide_factor=0"]),
        ({"communication_data_type": "float16"}, ['communication_data_type="float16"', "fp16"]),
        ({"csv_monitor": True}, ["csv_monitor=true"]),
    ],
)
def test_settings_that_would_be_ignored_or_fail_later_are_named(values, observed):
    with raises(ConfigError, *observed, location="ds.json"):
        check_settings(values, "ds.json")


def test_settings_rule_on_several_keys_is_said_without_the_complete_section():
    values = {"zero_optimization": {"stage": 2, "offload_optimizer": CPU | {"ratio": 0.3}}}
    with raises(ConfigError, "zero_optimization: Partial offloading", location="ds.json") as caught:
        check_settings(values, "ds.json")
    assert "reduce_bucket_size" not in str(caught.value)


def test_settings_auto_for_the_engine_and_optimizers_are_refused_in_words():
    values = {
        **BATCHES,
        "optimizer": ADAM,
        "scheduler": WARMUP,
        "zero_optimization": ZERO_3 | dict.fromkeys(BUCKETS, AUTO),
    }
    with raises(ConfigError, "optimizer", "scheduler", *BUCKETS, location="ds.json"):
        start(values)


class LookUps(dict):
    """Settings that record the keys that are looked up."""

    asked: ClassVar[set[str]] = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self


def test_settings_every_key_that_the_installed_deepspeed_reads_is_known():
    DeepSpeedConfig(LookUps(train_batch_size=1))
    assert {"zero_optimization", "bf16", "elasticity"} <= LookUps.asked
    with raises(ConfigError, "'no_such_key'") as error:
        check_settings({key: {} for key in [*LookUps.asked, "no_such_key"]}, "ds.json")
    assert str(error.value).count("unknown key") == 1
