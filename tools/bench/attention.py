"""Attention: what the key bias of (BiPE-)ALiBi costs and how exact it is, and whole models against materialised scores.

    kernel    causal flash attention alone, forward and backward, without and with the bias channels
    errors    of the output against float64, the largest over sampled queries of the steepest and the flattest head
    models    forward passes of the whole model at one window: ours; with all scores in memory, a mask and a bias of
              their size, softmax in fp32, as the authors wrote attention; and the whole pass as they wrote it, which
              has all logits in fp32, too, and runs as it comes, without what this project tells the allocator
    longest   our forward pass and loss of one long window, as evaluation runs it, and the memory of its process; for
              BiPE-ALiBi, also over all keys, those beyond reach included

Example: python tools/bench/attention.py --set model.num_layers=12 --window 4096 --longest 32768
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._device import device, native_precision
from bench._machine import describe_machine
from bench._turns import Prepare, Turns, take_turns
from megatron_bipe.config.load import load_run_config
from megatron_bipe.config.schema import ModelConfig
from megatron_bipe.model import attention
from megatron_bipe.model.attention import Attention, causal_attention
from megatron_bipe.model.loss import token_losses
from megatron_bipe.model.positions.bias import KeyBias
from megatron_bipe.model.positions.functional import BILEVEL_ALIBI_FACTOR, alibi_slopes
from megatron_bipe.model.precision import DTYPES
from megatron_bipe.model.transformer import Block, build_model

SEGMENT_TOKENS, HEAD_TOKENS = 14, 1024
SAMPLED_QUERIES = 64


@command
def main(argv: Sequence[str] | None) -> None:
    """All four parts."""
    arguments = _parser().parse_args(argv)
    model = load_run_config(arguments.config, arguments.set).model
    print(describe_machine("torch"))
    print(f"{model.num_layers} blocks x {model.hidden_size}, {model.num_heads} heads; {arguments.repeats} turns\n")
    print_errors(model, arguments.errors)
    length, repeats = arguments.window, arguments.repeats
    for tokens in dict.fromkeys((1024, length)):
        kernels = {name: partial(prepare_kernel, model, tokens, biased) for name, biased in KERNELS.items()}
        print_turns(
            f"kernel, {tokens} tokens, {native_precision()}, forward and backward",
            take_turns(kernels, repeats),
            "plain",
        )
    for precision in dict.fromkeys((native_precision(), "fp32")):
        for encoding in ("bipe_rope", "bipe_alibi"):
            forwards: dict[str, Prepare] = {
                name: partial(prepare_model, model, encoding, precision, length, name) for name in (OURS, SCORES, WHOLE)
            }
            title = f"forward, {encoding}, {length} tokens, {precision}"
            print_turns(title, take_turns(forwards, arguments.model_repeats, as_it_comes={WHOLE}), WHOLE)
    if arguments.longest:
        for encoding, manners in (("bipe_rope", (OURS,)), ("bipe_alibi", (OURS, ALL_KEYS))):
            long = {
                name: partial(prepare_model, model, encoding, native_precision(), arguments.longest, name)
                for name in manners
            }
            title = f"forward and loss, {encoding}, {arguments.longest} tokens, {native_precision()}"
            print_turns(title, take_turns(long, 1), manners[-1])


KERNELS = {"plain": False, "with key bias": True}
OURS, ALL_KEYS = "ours", "ours over all keys"
SCORES, WHOLE = "ours with all scores", "as the authors wrote it"


def print_turns(title: str, found: dict[str, Turns], against: str) -> None:
    """Seconds, how many times as fast as one of them, memory."""
    print(f"\n{title}")
    for name, turns in found.items():
        times = found[against].median_s / turns.median_s
        print(f"  {name:26} {turns.median_s:8.3f} s {times:7.2f} x {turns.peak_gib:7.2f} GiB", flush=True)


def print_errors(model: ModelConfig, lengths: list[int]) -> None:
    """Largest relative error of outputs, by window."""
    print("error of the output against float64, bf16")
    for tokens in lengths:
        row = "  ".join(f"{name}: {error(model, tokens, biased):.2e}" for name, biased in KERNELS.items())
        print(f"  {tokens:6} tokens  {row}", flush=True)


def error(model: ModelConfig, tokens: int, biased: bool) -> float:
    """Of sampled queries of two heads, relative to the norm of the output."""
    generator, width = torch.Generator().manual_seed(0), model.head_width
    q, k, v = (torch.randn(1, 2, tokens, width, generator=generator).bfloat16() for _ in range(3))
    positions, slopes = segments(tokens)[None], two_slopes(model) if biased else torch.zeros(2)
    wide = KeyBias(slopes, width)(q, k, positions) if biased else (q, k)
    queries = torch.linspace(0, tokens - 1, SAMPLED_QUERIES).long()
    found = causal_attention(*wide, v)[:, :, queries].double()
    scores = q[:, :, queries].double() @ k.double().mT / math.sqrt(width)
    scores += slopes.double()[:, None, None] * (positions - positions[:, queries].T)
    scores.masked_fill_(torch.arange(tokens) > queries[:, None], -math.inf)
    exact = scores.softmax(dim=-1) @ v.double()
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


def two_slopes(model: ModelConfig) -> Tensor:
    """The steepest and the flattest of BiPE-ALiBi."""
    slopes = sorted(alibi_slopes(model.num_heads))
    return torch.tensor([slopes[-1], slopes[0]]) * BILEVEL_ALIBI_FACTOR


def segments(tokens: int) -> Tensor:
    """Inter-segment ids of a window in segments of equal length."""
    return torch.arange(tokens) // SEGMENT_TOKENS


def prepare_kernel(model: ModelConfig, tokens: int, biased: bool) -> Callable[[], None]:
    """Forward and backward of attention itself; the channels are there before."""
    shape = (1, model.num_heads, tokens, model.head_width)
    q, k, v = (torch.randn(shape).to(device(), DTYPES[native_precision()]) for _ in range(3))
    if biased:
        slopes = torch.tensor(alibi_slopes(model.num_heads)) * BILEVEL_ALIBI_FACTOR
        q, k = KeyBias(slopes, model.head_width)(q, k, segments(tokens).to(device())[None])
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(v)
    return lambda: causal_attention(*inputs).backward(grad)


def prepare_model(model: ModelConfig, encoding: str, precision: str, tokens: int, manner: str) -> Callable[[], None]:
    """Forward pass and loss of a window without gradients, in one of four manners."""
    config = model.model_copy(update={"encoding": encoding})
    network = build_model(config).to(device(), DTYPES[precision])
    if manner == ALL_KEYS:
        attention.MIN_WINDOWED_TOKENS = tokens + 1
    elif manner != OURS:
        make_eager(network, config)
    ids = torch.randint(0, config.vocab_size, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    places = torch.arange(tokens)[None]
    on_host = (ids[:, :-1], places % SEGMENT_TOKENS, places // SEGMENT_TOKENS)
    inputs, labels = tuple(x.to(device()) for x in on_host), ids[0, 1:].to(device())

    @torch.inference_mode()
    def in_parts() -> None:
        hidden_BTD, positions_BT = network[:-1](inputs)
        for hidden_KD, labels_K in zip(hidden_BTD[0].split(HEAD_TOKENS), labels.split(HEAD_TOKENS), strict=True):
            float(token_losses(network[-1]((hidden_KD, positions_BT)), labels_K).sum())

    @torch.inference_mode()
    def at_once() -> None:
        float(nn.functional.cross_entropy(network(inputs)[0].float(), labels))

    return at_once if manner == WHOLE else in_parts


class EagerAttention(nn.Module):
    """The same weights; every score is in memory, and so are the mask and the bias."""

    def __init__(self, attention: Attention, config: ModelConfig) -> None:
        super().__init__()
        self.inner = attention
        self.slopes_N = None
        if isinstance(attention.encoding, KeyBias):
            factor = BILEVEL_ALIBI_FACTOR if config.bilevel else 1.0
            self.slopes_N = torch.tensor(alibi_slopes(config.num_heads)) * factor

    def forward(self, hidden_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """As `Attention.forward`."""
        inner, num_tokens = self.inner, hidden_BTD.shape[1]
        qkv_BTN3H = inner.qkv(hidden_BTD).unflatten(-1, (-1, 3, inner.head_width))
        q_BNTH, k_BNTH, v_BNTH = (x.transpose(1, 2) for x in qkv_BTN3H.unbind(3))
        if self.slopes_N is None:
            q_BNTH, k_BNTH = inner.encoding(q_BNTH, k_BNTH, positions_BT)
        scores_BNTT = q_BNTH @ k_BNTH.transpose(2, 3) / math.sqrt(inner.head_width)
        if self.slopes_N is not None:
            slopes_N11 = self.slopes_N.to(scores_BNTT)[:, None, None]
            scores_BNTT = scores_BNTT + slopes_N11 * positions_BT[:, None, None].to(scores_BNTT.dtype)
        mask_TT = torch.full((num_tokens, num_tokens), torch.finfo(scores_BNTT.dtype).min, device=hidden_BTD.device)
        scores_BNTT = scores_BNTT + mask_TT.triu(1).to(scores_BNTT.dtype)
        weights_BNTT = scores_BNTT.softmax(dim=-1, dtype=torch.float32).to(q_BNTH.dtype)
        mixed: Tensor = inner.out((weights_BNTT @ v_BNTH).transpose(1, 2).flatten(2))
        return mixed


def make_eager(network: nn.Sequential, config: ModelConfig) -> None:
    """Put such attention into every block."""
    for block in network:
        if isinstance(block, Block):
            block.attention = EagerAttention(block.attention, config)  # type: ignore[assignment]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="run configuration (default: 151M with two blocks)")
    parser.add_argument("--set", action="append", default=["model.num_layers=2"], metavar="KEY=VALUE")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=4096, help="0: leave it out")
    parser.add_argument("--errors", type=int, nargs="*", default=[1024, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=7, help="of the kernels")
    parser.add_argument("--model-repeats", type=int, default=3)
    return parser


if __name__ == "__main__":
    sys.exit(main())
