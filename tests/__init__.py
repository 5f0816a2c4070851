"""All tests. They run on CPU ranks on every machine, also on one with GPUs, unless `BIPE_DEVICE` says otherwise."""

import os

from megatron_bipe.runtime.environment import DEVICE, prepare_environment

os.environ.setdefault(DEVICE, "cpu")
prepare_environment()
