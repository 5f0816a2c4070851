"""Greedy continuations of many prompts by an exported model, with its cache, in batches of like length."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_bipe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.eval.options import PROMPT_BATCH_TOKENS
from megatron_bipe.hf.checksums import check_folder
from megatron_bipe.hf.load import model_config, read_settings
from megatron_bipe.types import TokenArray


class Generator(NamedTuple):
    """An exported model, ready to go on with prompts."""

    model: Any  # transformers' types do not say what can be called
    tokenizer: Tokenizer
    max_seq_len_tokens: int | None
    """Beyond this its encoding has no positions; None: no such limit."""


class Limits(NamedTuple):
    """How much is generated, and how much at once."""

    new_tokens: int
    """Most tokens of a continuation, EOS included."""
    batch_tokens: int = PROMPT_BATCH_TOKENS
    """Most tokens of a batch, padding and continuations included; one prompt is always taken."""


def load_generator(folder: Path, device: str, dtype: torch.dtype) -> Generator:
    """The model and the tokenizer of an exported folder.

    Raises:
        CheckpointError: there is no exported model, it is damaged, or it has no EOS token to end an answer with.
        DataError: its tokenizer cannot be read.
    """
    config = model_config(read_settings(folder), folder)
    check_folder(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.eos_id is None:
        raise CheckpointError(
            "its tokenizer has no end-of-sequence token, which ends every answer",
            remedy="Fine-tune and evaluate a model whose tokenizer has one",
            location=folder,
        )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"transformers cannot load it: {' '.join(str(error).split())[:300]}",
            remedy="Name a folder with weights and tokenizer, made by tools/export_hf.py or tools/import_hf.py",
            location=folder,
        ) from error
    return Generator(model.to(device).eval(), tokenizer, config.max_seq_len_tokens)


def generate(
    generator: Generator, prompts: Sequence[TokenArray], limits: Limits, advance: Callable[[int], object] | None = None
) -> list[list[int]]:
    """The most likely token after token, up to EOS, which is left out.

    Args:
        generator: that goes on.
        prompts: tokens of each, BOS first.
        limits: see there.
        advance: told the prompts that have been done.

    Returns:
        New tokens of each prompt, in the order of the prompts.

    Raises:
        ConfigError: the longest prompt, gone on with, exceeds the windows that the model can encode.
    """
    _check_room(generator, prompts, limits)
    found: list[list[int]] = [[] for _ in prompts]
    for rows in batches([len(prompt) for prompt in prompts], limits):
        for row, tokens in zip(rows, _generate_batch(generator, [prompts[row] for row in rows], limits), strict=True):
            found[row] = tokens
        if advance:
            advance(len(rows))
    return found


def _check_room(generator: Generator, prompts: Sequence[TokenArray], limits: Limits) -> None:
    longest, room = max(map(len, prompts), default=0), generator.max_seq_len_tokens
    if room is not None and longest + limits.new_tokens > room:
        raise ConfigError(
            f"prompts of up to {longest} tokens and {limits.new_tokens} new ones exceed the {room} that the encoding "
            "of the model has positions for",
            remedy="Give shorter prompts, or train a model for longer windows",
            location=generator.model.name_or_path,
        )


def batches(lengths: Sequence[int], limits: Limits) -> list[list[int]]:
    """Rows that are done together: the longest first, so that what does not fit the machine fails at once."""
    batch: list[int] = []
    made = [batch]
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        longest = lengths[batch[0]] if batch else lengths[row]
        if batch and (len(batch) + 1) * (longest + limits.new_tokens) > limits.batch_tokens:
            batch = []
            made.append(batch)
        batch.append(row)
    return made if lengths else []


@torch.inference_mode()
def _generate_batch(generator: Generator, prompts: Sequence[TokenArray], limits: Limits) -> list[list[int]]:
    model, eos_id = generator.model, generator.tokenizer.eos_id
    assert eos_id is not None  # or it would not have been loaded
    tokens, mask = _pad_left(prompts, eos_id)
    output = model.generate(
        tokens.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=limits.new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
    )
    new = output[:, tokens.shape[1] :].tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in new]


def _pad_left(prompts: Sequence[TokenArray], fill: int) -> tuple[Tensor, Tensor]:
    """Tokens and mask, int64 [B, T] each."""
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), fill, dtype=np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return torch.from_numpy(tokens), torch.from_numpy(mask)
