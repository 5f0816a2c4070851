"""What a run would be, in words and numbers."""

from megatron_bipe.config.load import load_run_config
from megatron_bipe.train.dry_run import describe, memory_estimate_gib

PARAMETERS = 163_203_840  # of the default run


def test_describe_names_configuration_layers_memory_length_and_missing_data(tmp_path):
    run = load_run_config(None, [f"data.path={tmp_path / 'absent'}"])
    text = describe(run, {"zero_optimization": {"stage": 1}}, num_ranks=8)
    for part in (
        "hidden_size: 768",
        f"{PARAMETERS:,}",
        "Block x 12",
        "131,072,000,000 tokens",
        "8 ranks x 4 micro-batches x 8 windows",
        "ZeRO 1, 8 ranks",
        "tools/preprocess.py",
    ):
        assert part in text


def test_describe_existing_data_says_how_often_it_is_read(tmp_path, write_dataset):
    write_dataset(tmp_path / "data", [[[1] * 1000]])
    run = load_run_config(None, [f"data.path={tmp_path / 'data'}", "train.steps=2", "train.seq_len_tokens=100"])
    assert "reads it 51.20 times" in describe(run, {}, num_ranks=1)


def test_memory_estimate_shards_what_the_zero_stage_shards():
    run = load_run_config(None)
    whole = {"weights": 2, "gradients": 4, "optimizer": 12}  # bytes a parameter in bf16
    sharded = {0: set(), 1: {"optimizer"}, 2: {"optimizer", "gradients"}, 3: {"optimizer", "gradients", "weights"}}
    for stage, names in sharded.items():
        sizes = memory_estimate_gib(run, stage, num_ranks=4)
        for name, width in whole.items():
            share = 4 if name in names else 1
            assert sizes[name] * 2**30 == PARAMETERS * width / share
