"""Maps `train.precision` of the run configuration to torch dtypes."""

import torch

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
