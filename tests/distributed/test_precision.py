"""`train.precision: auto` on a processor without native bf16, emulated where this one has it."""

import sys
from pathlib import Path

import pytest
import yaml

from megatron_bipe.runtime.cpu import cpu_bf16_support, cpu_facts
from tests.helpers.commands import ROOT, TEXTS, Ended, options, run

WEAK = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


def train(data: Path, run_dir: Path, *settings: str, steps: int, env: dict[str, str], allow: bool = False) -> Ended:
    command = [sys.executable, str(ROOT / "pretrain.py"), "--ds_config", str(ROOT / "ds_configs" / "zero1.json")]
    command += options(data, run_dir, *settings, steps=steps)
    return run(*command, *(["--allow", "train.precision"] if allow else []), env=env)


def recorded(run_dir: Path) -> str:
    precision: str = yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["precision"]
    return precision


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, write_text_dataset):
    """A run of two steps that began with `auto` on a weak processor."""
    folder = tmp_path_factory.mktemp("weak")
    write_text_dataset(folder / "data", TEXTS)
    ended = train(folder / "data", folder / "run", "train.precision=auto", steps=2, env=WEAK)
    assert ended.code == 0, ended.output
    assert "precision   fp32 (auto: " in ended.output and "step 2/2 | loss" in ended.output
    return folder / "run"


def test_auto_trains_in_fp32_where_bf16_is_not_native(run_dir):
    assert recorded(run_dir) == "fp32"


def test_auto_keeps_the_precision_of_the_run_on_a_machine_of_another_kind(run_dir):
    ended = train(run_dir.parent / "data", run_dir, "train.precision=auto", steps=3, env={})
    assert ended.code == 0, ended.output
    assert f"precision   fp32 (auto: {run_dir} began in it)" in ended.output
    assert recorded(run_dir) == "fp32"


def test_bf16_asked_for_where_it_is_not_native_warns_once_and_is_what_is_done(run_dir, tmp_path):
    ended = train(run_dir.parent / "data", tmp_path / "run", "train.precision=bf16", steps=1, env=WEAK)
    assert ended.code == 0, ended.output
    is_limited = cpu_bf16_support(cpu_facts().flags, "").is_native
    reason = "ONEDNN_MAX_CPU_ISA=AVX2" if is_limited else "does not multiply bf16 natively"
    assert ended.output.count("WARNING: train.precision=bf16") == 1 and reason in ended.output
    assert recorded(tmp_path / "run") == "bf16"
