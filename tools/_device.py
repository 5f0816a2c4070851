"""The options `--device` and `--dtype`: where a command's model runs, and in which precision."""

import argparse
from typing import TYPE_CHECKING

from megatron_bipe.config.schema import AUTO, PRECISIONS, Precision
from megatron_bipe.errors import ConfigError

if TYPE_CHECKING:
    import torch


def add_device_options(parser: argparse.ArgumentParser, dtype: Precision = "fp32") -> None:
    """Add both options; `dtype` is the default of `--dtype`."""
    parser.add_argument("--device", default=AUTO, help="auto (the default), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype",
        choices=PRECISIONS,
        default=dtype,
        help="precision the model runs in; auto: bf16 if the device multiplies it natively (default: %(default)s)",
    )


def pick_device(name: str) -> str:
    """Return the torch device of a `--device` option; `auto` is `BIPE_DEVICE`, else a GPU if there is one."""
    import torch

    from megatron_bipe.runtime.hardware import device_type

    if name == AUTO:
        return device_type()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r}: {reason}", remedy="Use auto, cpu or cuda", location="--device") from error
    return name


def pick_dtype(name: Precision, device: str) -> "torch.dtype":
    """Return the torch dtype of a `--dtype` option for a model on that device, and warn if bf16 is slow there."""
    import torch

    from megatron_bipe.model.precision import DTYPES
    from megatron_bipe.runtime.hardware import choose_precision

    return DTYPES[choose_precision(name, torch.device(device), "--dtype").precision]
