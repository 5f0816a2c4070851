"""The compute precisions of the run configuration as torch's types."""

import torch

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
