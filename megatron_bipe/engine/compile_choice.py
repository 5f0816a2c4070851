"""The choice whether blocks and the loss run as compiled code."""

from typing import NamedTuple

import torch

from megatron_bipe.config import AUTO, RunConfig
from megatron_bipe.errors import ConfigError


class CompileChoice(NamedTuple):
    """True if torch.compile fuses blocks and the loss, and why."""

    compiles: bool
    reason: str

    def __str__(self) -> str:
        return f"{'on' if self.compiles else 'off'} ({self.reason})"


def choose_compile(run: RunConfig, device: torch.device, zero_stage: int) -> CompileChoice:
    """Return the choice for a run; `auto` compiles on a GPU, unless the ZeRO stage rules it out.

    Raises:
        ConfigError: `train.compile=on` with ZeRO 3.
    """
    asked = run.train.compile
    if asked == "off":
        return CompileChoice(compiles=False, reason="train.compile=off")
    if zero_stage == 3:
        if asked == "on":
            raise ConfigError(
                "train.compile=on with zero_optimization.stage=3: DeepSpeed gathers the weights of ZeRO 3 in hooks of "
                "each layer, which cannot be part of a compiled block",
                remedy="Set train.compile=auto or off, or use ds_configs/zero1.json or zero2.json",
                location="train.compile",
            )
        return CompileChoice(compiles=False, reason="auto: ZeRO 3 gathers weights between the layers of a block")
    if asked == AUTO and device.type != "cuda":
        return CompileChoice(compiles=False, reason="auto: not on a CPU")
    return CompileChoice(compiles=True, reason="auto: on a GPU" if asked == AUTO else "train.compile=on")
