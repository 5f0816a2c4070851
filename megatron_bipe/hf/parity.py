"""Whether an exported folder is the trained model: logits of both on the same windows, one layer in memory at a time.

B batch · T positions · V vocabulary
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.errors import CheckpointError
from megatron_bipe.hf.load import fill_layer, read_settings
from megatron_bipe.model.transformer import make_plan

SampleBatch = tuple[Tensor, Tensor, Tensor]  # tokens, intra ids, inter ids: int64 [B, T] each
_AUTO = "AutoModelForCausalLM"


def parity(
    weights: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype, folder: Path, sequences: SampleBatch
) -> float:
    """Largest difference of a logit over the largest logit, both models in fp32.

    Args:
        weights: of the training model, under the plan's names.
        config: of the model.
        dtype: what the weights are rounded to first, as in the folder.
        folder: the exported model.
        sequences: what to compare on.

    Raises:
        CheckpointError: the folder cannot be loaded and run by transformers.
    """
    with torch.inference_mode():
        expected_BTV = trained_logits(weights, config, dtype, sequences)
        found_BTV = exported_logits(folder, sequences[0])
        scale = float(expected_BTV.abs().max())
        return float(found_BTV.sub_(expected_BTV).abs_().max()) / max(scale, torch.finfo(torch.float32).tiny)


def trained_logits(
    weights: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype, sequences: SampleBatch
) -> Tensor:
    """Logits fp32 [B, T, V] of the training model."""
    payload: Any = sequences
    for planned in make_plan(config, seed=0):
        with torch.device("meta"):
            layer = planned.build()
        payload = fill_layer(layer, planned.index, weights, config, dtype)(payload)
    logits_BTV: Tensor = payload
    return logits_BTV


def exported_logits(folder: Path, tokens_BT: Tensor) -> Tensor:
    """Logits fp32 [B, T, V] of a model folder, loaded as users load it: its own code, weights read layer by layer."""
    settings = read_settings(folder)
    try:
        # The Auto class would take this package's code for that of the folder, once it is registered.
        code = settings.get("auto_map", {}).get(_AUTO)
        kind: Any = get_class_from_dynamic_module(code, folder) if code else AutoModelForCausalLM
        with _without_remark():
            model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, device_map={"": "disk"})
        return model.eval()(tokens_BT, use_cache=False).logits
    except (ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"the exported model cannot be loaded and run: {error}",
            remedy="This is a defect, please report it",
            location=folder,
        ) from error


@contextmanager
def _without_remark() -> Iterator[None]:
    """Keep accelerate from telling that weights are on the disk, where they are wanted."""
    logger = logging.getLogger("accelerate.big_modeling")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
