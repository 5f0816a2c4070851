"""Where benchmarks run, and in which precision."""

import torch

from megatron_bipe.config.schema import AUTO, ComputePrecision
from megatron_bipe.runtime.hardware import choose_precision, device_type


def device() -> torch.device:
    """Return the GPU if there is one, unless BIPE_DEVICE says otherwise."""
    return torch.device(device_type())


def native_precision() -> ComputePrecision:
    """Return what `train.precision: auto` would choose here."""
    return choose_precision(AUTO, device(), "precision").precision
