"""Generation with an exported model and its cache: greedy for many prompts in batches, or sampled for a few texts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import set_seed

from megatron_bipe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bipe.errors import CheckpointError, ConfigError
from megatron_bipe.eval.sequences import PROMPT_BATCH_TOKENS
from megatron_bipe.hf.load import model_config, read_settings
from megatron_bipe.hf.transformers_models import load_auto_tokenizer, load_causal_lm
from megatron_bipe.types import TokenArray


class Generator(NamedTuple):
    """An exported model with its tokenizer, ready to generate."""

    model: Any  # transformers' types do not cover generate()
    tokenizer: Tokenizer
    max_seq_len_tokens: int | None
    """Longest sequence that the encoding supports; None: unlimited."""


class Limits(NamedTuple):
    """Limits on the generated tokens and on the batch size."""

    new_tokens: int
    """Maximum tokens of a continuation, including EOS."""
    batch_tokens: int = PROMPT_BATCH_TOKENS
    """Maximum tokens of a batch, including padding and continuations; a single prompt is always accepted."""


class Sampling(NamedTuple):
    """How prompts are continued."""

    max_new_tokens: int = 60
    temperature: float = 0.8
    """0: greedy."""
    seed: int = 0
    """Seed of the sampling, set again for each prompt."""
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


def continue_texts(
    folder: Path, prompts: Sequence[str], sampling: Sampling, *, trust_remote_code: bool = False
) -> list[str]:
    """Continue prompts through transformers' own `generate`; return them with their continuations.

    Raises:
        CheckpointError: the folder is not an exported model, or is damaged.
    """
    model = load_causal_lm(folder, sampling.dtype, trust_remote_code=trust_remote_code).to(sampling.device)
    tokenizer = load_auto_tokenizer(folder, trust_remote_code=trust_remote_code)
    options = {"do_sample": True, "temperature": sampling.temperature} if sampling.temperature > 0 else {}
    texts = []
    for prompt in prompts:
        set_seed(sampling.seed)
        encoded = tokenizer(prompt, return_tensors="pt").to(sampling.device)
        output = model.generate(**encoded, max_new_tokens=sampling.max_new_tokens, **options)
        texts += tokenizer.batch_decode(output, skip_special_tokens=True)
    return texts


def load_generator(folder: Path, device: str, dtype: torch.dtype, trust_remote_code: bool = False) -> Generator:
    """Load the model and the tokenizer of an exported folder; `trust_remote_code` as in `load_causal_lm`.

    Raises:
        CheckpointError: the folder is not an exported model, is damaged, or its tokenizer has no EOS token.
        DataError: its tokenizer cannot be read.
    """
    settings = read_settings(folder)
    config = model_config(settings, folder)
    tokenizer = load_tokenizer(folder, settings.get("special_in_text") is True)
    if tokenizer.eos_id is None:
        raise CheckpointError(
            "the tokenizer has no end-of-sequence token, which every answer must end with",
            remedy="Fine-tune and evaluate a model whose tokenizer has one",
            location=folder,
        )
    model = load_causal_lm(folder, dtype, trust_remote_code=trust_remote_code)
    return Generator(model.to(device), tokenizer, config.max_seq_len_tokens)


def generate_batches(
    generator: Generator, prompts: Sequence[TokenArray], limits: Limits, advance: Callable[[int], object] | None = None
) -> list[list[int]]:
    """Generate greedily up to EOS, which is not returned.

    Args:
        generator: the model.
        prompts: tokens of each prompt, BOS first.
        limits: limits on the generated tokens and on the batch size.
        advance: called with the number of completed prompts after each batch.

    Returns:
        New tokens of each prompt, in the order of the prompts.

    Raises:
        ConfigError: the longest prompt and its continuation exceed the sequence length that the model supports.
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
            f"prompts of up to {longest} tokens and {limits.new_tokens} new ones exceed the {room} positions of the "
            "model's encoding",
            remedy="Use shorter prompts, or a model trained on longer sequences",
            location=generator.model.name_or_path,
        )


def batches(lengths: Sequence[int], limits: Limits) -> list[list[int]]:
    """Group rows into batches, the longest first, so that out-of-memory errors occur at once."""
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
    assert eos_id is not None  # load_generator refuses it
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
    """Return tokens and attention mask, int64 [B, T] each."""
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), fill, dtype=np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return torch.from_numpy(tokens), torch.from_numpy(mask)
