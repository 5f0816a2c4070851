"""Summary lines at a run's start and end."""

import pytest
import torch

from megatron_bipe.checkpoint.find import step_folder
from megatron_bipe.config.load import load_run_config
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.runtime.hardware import Choices, CompileChoice, PrecisionChoice
from megatron_bipe.train.run_folder import end_summary, start_summary

CHOICES = Choices(PrecisionChoice("fp32", "auto: no native bf16"), CompileChoice(True, "auto: on a GPU"))


@pytest.fixture
def run(tmp_path):
    return load_run_config(
        None,
        [f"run_dir={tmp_path / 'my run'}", "train.steps=10", "train.precision=fp32", "train.seq_len_tokens=128"],
    )


def test_start_summary_names_model_device_precision_layout_batch_and_length(run):
    threads = torch.get_num_threads()
    mesh = Mesh(0, 0, 4, 4, torch.device("cpu"), tensor=2)
    lines = start_summary(run, {"zero_optimization": {"stage": 2}}, mesh, CHOICES).splitlines()
    found = {line.split("  ")[0]: line for line in lines}
    assert "bipe_rope" in found["model"] and "parameters" in found["model"]
    assert "4 ranks" in found["device"] and f"{threads} thread" in found["device"]
    assert "fp32 (auto: no native bf16)" in found["precision"]
    assert "on (auto: on a GPU)" in found["compile"]
    assert "2 tensor x 2 data, ZeRO 2" in found["layout"]
    assert "32,768 tokens a step: 2 x 16 micro-batches of 8 x 128" in found["batch"]
    assert "10 steps, 327,680 tokens" in found["length"]
    assert str(run.run_dir) in found["run folder"]


def test_end_summary_of_a_finished_run_names_its_checkpoint_and_commands_that_follow(run):
    text = end_summary(run, 10)
    assert "checkpoints/step-00000010" in text
    assert f"evaluate.py perplexity --model '{run.run_dir}'" in text and "--lengths 128,256,512,1024" in text
    assert f"export_hf.py --checkpoint '{run.run_dir}' --output exported/'my run'" in text


def test_end_summary_of_a_run_stopped_early_says_so(run):
    text = end_summary(run, 4)
    assert "step 4 of 10" in text and "evaluate" not in text


@pytest.mark.parametrize(("stop_step", "expected"), [(10, "step-00000012"), (4, "step 6 of 10"), (6, "as requested")])
def test_end_summary_of_a_run_beyond_the_requested_step_states_the_step_of_its_checkpoint(run, stop_step, expected):
    step_folder(run.run_dir, 12 if stop_step == 10 else 6).mkdir(parents=True)
    text = end_summary(run, stop_step)
    assert expected in text and ("requested" in text) == (stop_step == 6)
