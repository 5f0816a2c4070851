"""Parity check of an exported folder: compares its logits with the training model's, one layer in memory at a time.

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
from megatron_bipe.hf.load import load_layer, read_settings
from megatron_bipe.model.transformer import make_plan

SampleBatch = tuple[Tensor, Tensor, Tensor]  # tokens, intra ids, inter ids: int64 [B, T] each
_AUTO = "AutoModelForCausalLM"


def parity(
    weights: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype, folder: Path, sequences: SampleBatch
) -> float:
    """Return the largest difference of a logit over the largest logit, both models in fp32.

    Args:
        weights: weights of the training model by its names.
        config: configuration of the model.
        dtype: dtype to which the weights are rounded first, as in the folder.
        folder: the exported model.
        sequences: sequences to compare on.

    Raises:
        CheckpointError: transformers cannot load or run the folder.
    """
    with torch.inference_mode():
        expected_BTV = trained_logits(weights, config, dtype, sequences)
        found_BTV = exported_logits(folder, sequences[0])
        scale = float(expected_BTV.abs().max())
        return float(found_BTV.sub_(expected_BTV).abs_().max()) / max(scale, torch.finfo(torch.float32).tiny)


def trained_logits(
    weights: Mapping[str, Tensor], config: ModelConfig, dtype: torch.dtype, sequences: SampleBatch
) -> Tensor:
    """Return the training model's logits, fp32 [B, T, V]."""
    payload: Any = sequences
    for planned in make_plan(config, seed=0):
        with torch.device("meta"):
            layer = planned.build()
        payload = load_layer(layer, planned.index, weights, config, dtype)(payload)
    logits_BTV: Tensor = payload
    return logits_BTV


def exported_logits(folder: Path, tokens_BT: Tensor) -> Tensor:
    """Return the logits, fp32 [B, T, V], of a folder with its own code, weights read layer by layer."""
    settings = read_settings(folder)
    try:
        # Once this package's code is registered, the Auto class would use it instead of the folder's.
        code = settings.get("auto_map", {}).get(_AUTO)
        kind: Any = get_class_from_dynamic_module(code, folder) if code else AutoModelForCausalLM
        with _silence_accelerate():
            model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, device_map={"": "disk"})
        return model.eval()(tokens_BT, use_cache=False).logits
    except (ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"the exported model cannot be loaded and run: {error}",
            remedy="Report this as a bug",
            location=folder,
        ) from error


@contextmanager
def _silence_accelerate() -> Iterator[None]:
    """Suppress accelerate's message that weights are on disk, which is intended here."""
    logger = logging.getLogger("accelerate.big_modeling")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
