"""`train.precision: auto` on a processor without native bf16, emulated where this one has it."""

import pytest
import yaml

from megatron_bipe.runtime.environment import cpu_bf16_support, cpu_facts
from tests.helpers.commands import options
from tests.helpers.tools import run_pretrain

WEAK = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.fixture(scope="module")
def train(tmp_path_factory, text_dataset):
    """Return a function that trains a run by name and returns its folder and output."""
    folder = tmp_path_factory.mktemp("precision")

    def started(name, *arguments, precision, steps, env):
        chosen = f"train.precision={precision}", "optimizer.decay_steps=10"  # the same for every number of steps
        settings = options(text_dataset, folder / name, *chosen, steps=steps)
        [ended] = run_pretrain([*settings, *arguments], folder / f"{name}-{steps}", env=env)
        return folder / name, ended.output

    return started


@pytest.fixture(scope="module")
def begun(train):
    """Return a run of two steps that started with `auto` on a processor without native bf16."""
    return train("weak", precision="auto", steps=2, env=WEAK)


def recorded(run_dir):
    return yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["precision"]


def test_auto_trains_in_fp32_where_bf16_is_not_native(begun):
    run_dir, output = begun
    assert "fp32 (auto" in output and "step 2/2" in output
    assert recorded(run_dir) == "fp32"


def test_auto_keeps_the_precision_of_the_run_on_a_machine_of_another_kind(begun, train):
    run_dir, output = train("weak", precision="auto", steps=3, env={})
    assert run_dir == begun[0]
    assert f"fp32 (auto: the precision of {run_dir}" in output and "step 3/3" in output
    assert recorded(run_dir) == "fp32"


def test_bf16_asked_for_where_it_is_not_native_warns_once_and_is_what_is_done(train):
    run_dir, output = train("asked", precision="bf16", steps=1, env=WEAK)
    is_limited = cpu_bf16_support(cpu_facts().flags, "").is_native
    reason = "ONEDNN_MAX_CPU_ISA=AVX2" if is_limited else "natively"
    assert output.count("WARNING: train.precision=bf16") == 1 and reason in output
    assert recorded(run_dir) == "bf16"
