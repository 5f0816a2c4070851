"""Variables that are set before torch is imported."""

import os
import subprocess
import sys
from unittest import mock

import pytest

import pretrain
from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime import environment
from megatron_bipe.runtime.environment import prepare_environment, requested_device
from megatron_bipe.runtime.launcher_env import Launch, Rendezvous
from tests.helpers.errors import raises
from tests.helpers.paths import ROOT
from tests.helpers.tools import own_logging


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    with mock.patch.dict(os.environ):
        for name in ("BIPE_DEVICE", "DS_ACCELERATOR", "OMP_WAIT_POLICY", "CUDA_DEVICE_MAX_CONNECTIONS"):
            os.environ.pop(name, None)
        monkeypatch.setattr(environment, "has_gpu_driver", lambda: False)
        yield


@pytest.mark.parametrize(("value", "device"), [("cpu", "cpu"), ("cuda", "cuda"), ("", None), (None, None)])
def test_requested_device_is_what_the_variable_holds(value, device):
    if value is not None:
        os.environ["BIPE_DEVICE"] = value
    assert requested_device() == device


def test_requested_device_of_another_name_is_refused():
    os.environ["BIPE_DEVICE"] = "CPU"
    with raises(ConfigError, "'CPU'", location="BIPE_DEVICE"):
        requested_device()


def test_prepare_for_cpu_configures_deepspeed_and_lets_threads_sleep():
    os.environ.update(BIPE_DEVICE="cpu", DS_ACCELERATOR="cuda")
    prepare_environment()
    assert os.environ["DS_ACCELERATOR"] == "cpu" and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_prepare_without_a_gpu_does_the_same_but_keeps_a_chosen_accelerator():
    prepare_environment()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE" and os.environ["DS_ACCELERATOR"] == "cpu"
    os.environ["DS_ACCELERATOR"] = "xpu"
    prepare_environment()
    assert os.environ["DS_ACCELERATOR"] == "xpu"


@pytest.mark.parametrize("device", ["cuda", None])
def test_prepare_with_a_gpu_changes_nothing(monkeypatch, device):
    monkeypatch.setattr(environment, "has_gpu_driver", lambda: True)
    if device:
        os.environ["BIPE_DEVICE"] = device
    prepare_environment()
    assert "OMP_WAIT_POLICY" not in os.environ and "DS_ACCELERATOR" not in os.environ


@pytest.mark.parametrize(("has_driver", "seen"), [(True, "1"), (False, None)])
def test_pretrain_sets_what_cuda_reads_before_it_imports_what_starts_cuda(monkeypatch, has_driver, seen):
    monkeypatch.setattr(pretrain, "has_gpu_driver", lambda: has_driver)
    for name in ("deepspeed", "torch", "megatron_bipe.data.dataset"):
        monkeypatch.setitem(sys.modules, name, None)  # an import raises an error
    args = pretrain.parse_args(["--ds_config", str(ROOT / "ds_configs/zero1.json"), "--set", "parallel.tensor=2"])
    with own_logging(), pytest.raises(ImportError):
        pretrain.main(args, Launch(0, 0, 2, 2, Rendezvous("127.0.0.1", 1)))
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == seen


def test_prepare_keeps_a_chosen_wait_policy():
    os.environ["OMP_WAIT_POLICY"] = "ACTIVE"
    prepare_environment()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_environment_is_prepared_without_importing_torch():
    code = "import sys, megatron_bipe.runtime.environment; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
