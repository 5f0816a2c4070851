"""The description that --dry-run prints."""

from megatron_bipe.config import engine_config, read_ds_config
from megatron_bipe.config.load import load_run_config
from megatron_bipe.estimate.dry_run import describe
from megatron_bipe.runtime.gpus import named_gpu
from megatron_bipe.runtime.hardware import Choices, CompileChoice, PrecisionChoice
from tests.helpers.paths import ROOT

CHOICES = Choices(PrecisionChoice("bf16", "train.precision=bf16"), CompileChoice(True, "auto: on a GPU"))
BF16 = ["train.precision=bf16"]  # tests mean the same on every machine


H100, L4 = named_gpu("H100", "--gpu"), named_gpu("L4", "--gpu")


def described(run, ds_config, num_ranks, gpu=None):
    return describe(run, ds_config, num_ranks, CHOICES, gpu)


PARAMETERS = 163_203_840  # of the default run


def test_describe_names_configuration_layers_memory_length_and_missing_data(tmp_path):
    run = load_run_config(None, [*BF16, f"data.path={tmp_path / 'absent'}"])
    text = described(run, {"zero_optimization": {"stage": 1}}, num_ranks=8)
    for part in (
        "hidden_size: 768",
        "on (auto: on a GPU)",
        f"{PARAMETERS:,}",
        "Block x 12",
        "gradients, reduced",
        "131,072,000,000 tokens",
        "8 model replicas x 4 micro-batches x 8 sequences",
        "8 ranks = 1 tensor x 1 context x 1 pipeline x 8 data, ZeRO 1",
        "tools/preprocess.py",
        "2.0 GB each, 500 kept",
    ):
        assert part in text


def test_describe_existing_data_says_how_often_it_is_read(tmp_path, write_dataset):
    write_dataset(tmp_path / "data", [[[1] * 1000]])
    run = load_run_config(None, [*BF16, f"data.path={tmp_path / 'data'}", "train.steps=2", "train.seq_len_tokens=100"])
    assert "reads it 51.20 times" in described(run, {}, num_ranks=1)


def test_describe_branch_counts_its_own_steps_and_data_only(tmp_path, write_dataset):
    write_dataset(tmp_path / "data", [[[1] * 1000]])
    settings = [*BF16, f"data.path={tmp_path / 'data'}", "train.steps=1002", "train.seq_len_tokens=100"]
    run = load_run_config(None, [*settings, "train.branch_from=runs/trunk@1000"])
    text = described(run, {}, num_ranks=1, gpu=H100)
    assert "\n2 steps x 25,600 tokens = 51,200 tokens" in text and "the branch reads it 51.20 times" in text
    assert "steps 1,001 to 1,002" in text and "0.0 days" in text
    beyond = load_run_config(None, [*settings, "train.branch_from=runs/trunk@2000"])  # refused after this text
    assert "\n0 steps" in described(beyond, {}, num_ranks=1)


def test_describe_blend_says_share_and_epochs_of_each_dataset(tmp_path, write_dataset):
    for name, tokens in (("small", 1000), ("big", 4000)):
        write_dataset(tmp_path / name, [[[1] * tokens]])
    length = [*BF16, "train.steps=2", "train.seq_len_tokens=100"]  # 51,200 tokens
    small, big = str(tmp_path / "small"), str(tmp_path / "big")
    weighted = described(load_run_config(None, [f"data.path={{{small}: 1, {big}: 3}}", *length]), {}, num_ranks=1)
    assert f"{small}: 25.00% of the sequences; 1,000 tokens" in weighted and "reads it 12.80 times" in weighted
    assert f"{big}: 75.00% of the sequences; 4,000 tokens" in weighted and "reads it 9.60 times" in weighted
    by_tokens = described(load_run_config(None, [f"data.path=[{small}, {big}]", *length]), {}, num_ranks=1)
    assert by_tokens.count("reads it 10.24 times") == 2


def test_describe_empty_dataset_is_described(tmp_path, write_dataset):
    write_dataset(tmp_path / "empty", [[[]]])
    run = load_run_config(None, [*BF16, f"data.path=[{tmp_path / 'empty'}]"])
    assert f"{tmp_path / 'empty'}: 0 tokens" in described(run, {}, num_ranks=1)


def test_describe_model_replicas_share_a_batch():
    run = load_run_config(None, [*BF16, "parallel={tensor: 2, pipeline: 2}"])
    assert "8 model replicas x 4 micro-batches" in described(run, {}, num_ranks=32)


def test_describe_stages_names_layers_ranks_and_bubble():
    run = load_run_config(None, [*BF16, "parallel={tensor: 2, pipeline: 4}", "train.micro_batch=4"])
    text = described(run, {"zero_optimization": {"stage": 1}}, num_ranks=32)
    assert "32 ranks = 2 tensor x 1 context x 4 pipeline x 4 data" in text
    assert "first model replica is on ranks 0-1, 8-9, 16-17, 24-25" in text
    for stage, layers in enumerate(("0-3", "4-7", "8-11", "12-13")):
        assert f"{stage}  {layers.rjust(6)}" in text
    assert "an average stage waits" in text


def test_describe_one_rank_says_nothing_to_others():
    text = described(load_run_config(None, BF16), {}, num_ranks=1)
    assert "nothing: one rank" in text and "waits" not in text


def test_describe_for_a_gpu_says_whether_it_fits_and_predicts_the_time_of_a_step():
    run = load_run_config(ROOT / "examples" / "bipe_rope_1.6b.yaml", BF16)
    text = described(run, {"zero_optimization": {"stage": 1}}, 8, H100)
    assert "\nfits: 52.6 of 79.1 GiB of one H100" in text and "gradients, reduced" in text
    time = text.split("# Time of a step")[1].split("#")[0]
    for part in ("products", "update communication", "tokens/s", "56% MFU", "8 x H100", "compiled"):
        assert part in time
    assert "bubble" not in time
    small = described(run, {"zero_optimization": {"stage": 1}}, 8, L4)
    assert "\ndoes not fit: 52.6 of 21.9 GiB" in small and "train.micro_batch" in small
    eager = described(load_run_config(None, [*BF16, "train.compile=off"]), {}, 1, H100)
    assert "eager" in eager.split("# Time of a step")[1]


def test_describe_predicts_no_time_for_what_the_prediction_does_not_know():
    run = load_run_config(None, BF16)
    text = described(run, {}, 1)
    assert "# Time of a step" not in text and "fits" not in text and "GPU" not in text.split("# Memory")[1]
    fp32 = load_run_config(None, ["train.precision=fp32"])
    assert "not predicted" in described(fp32, {}, 1, H100).split("# Time of a step")[1]
    path = ROOT / "ds_configs" / "zero2_offload.json"
    offloaded = engine_config(run, read_ds_config(path), 1, path)
    t5 = load_run_config(None, [*BF16, "model.encoding=t5"])
    for text, reason in ((described(run, offloaded, 1, H100), "offloading"), (described(t5, {}, 1, H100), "t5")):
        time = text.split("# Time of a step")[1].split("# Length")[0]
        assert "not predicted" in time and reason in time and "MFU" not in time
