"""Run configuration and DeepSpeed JSON become one dictionary, or one error."""

import json
from pathlib import Path

import pytest

from megatron_bipe.config.deepspeed import engine_config, read_ds_config
from megatron_bipe.config.load import load_run_config
from megatron_bipe.errors import ConfigError
from tests.helpers.errors import raises

BF16 = ["train.precision=bf16"]  # tests mean the same on every machine

DS_CONFIGS = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_engine_config_shipped_files_are_filled_from_the_run(path, precision):
    run = load_run_config(None, [f"train.precision={precision}"])
    filled = engine_config(run, read_ds_config(path), num_ranks=4, location=path)
    assert "auto" not in json.dumps(filled)
    assert filled["train_batch_size"] == 256 == 8 * filled["gradient_accumulation_steps"] * 4
    assert filled["bf16"]["enabled"] is (precision == "bf16")
    assert filled["gradient_clipping"] == run.optimizer.grad_clip
    assert filled["zero_optimization"]["stage"] == int(path.stem.removesuffix("_offload")[-1])
    assert ("offload_optimizer" in filled["zero_optimization"]) is path.stem.endswith("_offload")


def test_engine_config_all_stages_are_shipped():
    assert [path.stem for path in DS_CONFIGS] == [
        "zero0",
        "zero1",
        "zero2",
        "zero2_offload",
        "zero3",
        "zero3_offload",
    ]


def test_engine_config_bf16_gradients_add_up_in_fp32_from_zero_1_on():
    run = load_run_config(None, BF16)
    dtypes = [engine_config(run, {"zero_optimization": {"stage": s}}, 1, "x")["data_types"] for s in range(4)]
    assert [d["grad_accum_dtype"] for d in dtypes] == ["bf16", "fp32", "fp32", "fp32"]


def test_engine_config_bf16_gradients_are_exchanged_in_fp32_with_zero_1():
    def settings_of(precision, stage):
        filled = engine_config(
            load_run_config(None, [f"train.precision={precision}"]), {"zero_optimization": {"stage": stage}}, 1, "x"
        )
        return filled.get("communication_data_type"), filled["bf16"].get("immediate_grad_update")

    assert settings_of("bf16", 1) == ("fp32", True)
    assert [settings_of("bf16", stage) for stage in (0, 2, 3)] == [(None, None)] * 3
    assert settings_of("fp32", 1) == (None, None)  # DeepSpeed exchanges what the model computes in


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_engine_config_deepspeeds_timer_which_waits_for_the_device_is_off(precision, stage):
    run = load_run_config(None, [f"train.precision={precision}"])
    filled = engine_config(run, {"zero_optimization": {"stage": stage}}, 1, "x")
    assert filled["timers"] == {"throughput": {"enabled": False}}


@pytest.mark.parametrize(
    ("stage", "num_ranks", "settings", "overlaps"),
    [
        (2, 1, [], False),
        (2, 2, ["parallel.tensor=2"], False),
        (2, 2, [], True),
        (3, 1, [], True),
    ],
)
def test_engine_config_zero_2_without_replicas_overlaps_no_communication(stage, num_ranks, settings, overlaps):
    given = {"zero_optimization": {"stage": stage, "overlap_comm": True}}
    filled = engine_config(load_run_config(None, [*BF16, *settings]), given, num_ranks, "x")
    assert filled["zero_optimization"]["overlap_comm"] is overlaps


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_engine_config_states_on_nvme_are_refused(key):
    with raises(ConfigError, f'zero_optimization.{key}.device="nvme"', location="x.json"):
        engine_config(
            load_run_config(None, BF16), {"zero_optimization": {"stage": 3, key: {"device": "nvme"}}}, 1, "x.json"
        )


def test_engine_config_interval_of_deepspeeds_own_log_may_be_any():
    quiet = engine_config(load_run_config(None, BF16), {}, 1, "x")["steps_per_print"]
    assert engine_config(load_run_config(None, BF16), {"steps_per_print": 10}, 1, "x")["steps_per_print"] == quiet


def test_engine_config_literal_that_agrees_is_fine():
    assert engine_config(load_run_config(None, BF16), {"train_batch_size": 256}, 1, "x")["train_batch_size"] == 256


@pytest.mark.parametrize(
    ("literal", "named"),
    [
        ({"train_batch_size": 128}, ["train_batch_size=128", "train.global_batch x parallel.context", "256"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["train_micro_batch_size_per_gpu=4", "train.micro_batch", "8"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping=0.5", "optimizer.grad_clip", "1.0"]),
        ({"bf16": {"enabled": False}}, ["bf16.enabled=False", "train.precision"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled=True", "train.precision"]),
        ({"timers": {"throughput": {"enabled": True}}}, ["timers.throughput.enabled=True", "False"]),
        ({"optimizer": {"type": "Adam"}}, ["'optimizer'"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage=4"]),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, ["zero_optimization.reduce_bucket_size", '"auto"']),
    ],
)
def test_engine_config_literal_that_disagrees_names_both(literal, named):
    with raises(ConfigError, *named, location="ds.json"):
        engine_config(load_run_config(None, BF16), literal, 1, "ds.json")


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"zero_optimization": 2}, ["zero_optimization=2"]),
        ({"bf16": True, "data_types": "fp32"}, ["bf16=true", 'data_types="fp32"']),
        ({"timers": {"throughput": False}}, ["timers.throughput=false"]),
        ({"zero_optimization": None}, ["zero_optimization=null"]),
        ({"fp16": None}, ["fp16=null"]),
        ({"zero_optimization": {"offload_optimizer": None}}, ["zero_optimization.offload_optimizer=null"]),
        ({"zero_optimization": {"offload_param": "cpu"}}, ['zero_optimization.offload_param="cpu"']),
        ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage=True"]),
    ],
)
def test_engine_config_section_that_is_none_is_named(sections, named):
    with raises(ConfigError, *named, location="ds.json"):
        engine_config(load_run_config(None, BF16), sections, 1, "ds.json")


@pytest.mark.parametrize(
    ("text", "observed"),
    [
        ("{", ["column 2"]),
        ("[]", []),
        ("", ["column 1"]),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', ["'stage'"]),
        ('{"bf16": {}, "fp16": {}, "bf16": {}}', ["'bf16'"]),
        ('{"gradient_clipping": NaN}', ["NaN"]),
    ],
)
def test_read_ds_config_damaged_file_is_named(tmp_path, text, observed):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with raises(ConfigError, *observed, location=path):
        read_ds_config(path)


def test_read_ds_config_missing_file_is_named(tmp_path):
    with raises(ConfigError, location=tmp_path / "ds.json", remedy="ds_configs/"):
        read_ds_config(tmp_path / "ds.json")
