"""The choice whether blocks are compiled."""

import pytest

from megatron_bipe.config.load import load_run_config
from megatron_bipe.errors import ConfigError
from megatron_bipe.runtime.hardware import choose_compile


@pytest.mark.parametrize(
    ("asked", "device", "zero", "compiles"),
    [
        ("auto", "cuda", 1, True),
        ("auto", "cuda", 3, False),
        ("auto", "cpu", 1, False),
        ("on", "cpu", 2, True),
        ("on", "cuda", 0, True),
        ("off", "cuda", 1, False),
        ("off", "cuda", 3, False),
    ],
)
def test_choice_follows_setting_device_and_zero_stage(asked, device, zero, compiles):
    run = load_run_config(None, [f"train.compile={asked}"])
    choice = choose_compile(run, zero, on_gpu=device == "cuda")
    assert choice.compiles is compiles
    assert choice.reason.startswith("auto:" if asked == "auto" else f"train.compile={asked}")
    assert str(choice).startswith("on (" if compiles else "off (")


def test_compilation_cannot_be_forced_with_zero_3():
    run = load_run_config(None, ["train.compile=on"])
    with pytest.raises(ConfigError, match=r"stage=3.*zero1\.json"):
        choose_compile(run, 3, on_gpu=False)
