"""Error and cost of the key bias of (BiPE-)ALiBi, and forward passes against attention with materialised scores.

    errors    largest relative error of the output against float64, over sampled queries of the steepest and the
              flattest head
    kernel    causal flash attention alone, forward and backward, without and with the bias channels
    models    forward pass and loss of the complete model: ours; ours with all scores, a mask and a bias of their size
              in memory and softmax in fp32, as the authors wrote attention; and the forward pass as they wrote it,
              which also holds all logits in fp32 and runs with the allocator's default settings
    longest   our forward pass and loss of one long sequence, as evaluation runs it; for BiPE-ALiBi also over all keys,
              without skipping those of negligible weight

Contenders alternate, each in its own process; the figures are medians, and the memory of the process.

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
from bench._bench import describe_machine
from bench._models import SEGMENT_TOKENS, Measurement, Prepare, device, make_batch, measure, native_precision
from megatron_bipe.config import ModelConfig, load_run_config
from megatron_bipe.model import Attention, Block, attention, build_model, causal_attention, token_losses
from megatron_bipe.model.positions.base import Prepared
from megatron_bipe.model.positions.bias import KeyBias
from megatron_bipe.model.positions.functional import BILEVEL_ALIBI_FACTOR, alibi_slopes
from megatron_bipe.runtime.hardware import DTYPES

HEAD_TOKENS, SAMPLED_QUERIES = 1024, 64
KERNELS = {"plain": False, "with key bias": True}
OURS, ALL_KEYS = "ours", "ours over all keys"
SCORES, PUBLISHED = "ours with all scores", "as published"


@command
def main(argv: Sequence[str] | None) -> None:
    arguments = _parser().parse_args(argv)
    model = load_run_config(arguments.config, arguments.set).model
    print(describe_machine("torch"))
    print(f"{model.num_layers} blocks x {model.hidden_size}, {model.num_heads} heads; {arguments.repeats} repeats\n")
    print_errors(model, arguments.errors)
    length, repeats = arguments.window, arguments.repeats
    for tokens in dict.fromkeys((1024, length)):
        kernels = {name: partial(prepare_kernel, model, tokens, biased) for name, biased in KERNELS.items()}
        title = f"kernel, {tokens} tokens, {native_precision()}, forward and backward"
        print_times(title, measure(kernels, repeats), "plain")
    for precision in dict.fromkeys((native_precision(), "fp32")):
        for encoding in ("bipe_rope", "bipe_alibi"):
            forwards: dict[str, Prepare] = {
                name: partial(prepare_model, model, encoding, precision, length, name)
                for name in (OURS, SCORES, PUBLISHED)
            }
            title = f"forward, {encoding}, {length} tokens, {precision}"
            found = measure(forwards, arguments.model_repeats, untuned={PUBLISHED})
            print_times(title, found, PUBLISHED)
    if arguments.longest:
        for encoding, variants in (("bipe_rope", (OURS,)), ("bipe_alibi", (OURS, ALL_KEYS))):
            long = {
                name: partial(prepare_model, model, encoding, native_precision(), arguments.longest, name)
                for name in variants
            }
            title = f"forward and loss, {encoding}, {arguments.longest} tokens, {native_precision()}"
            print_times(title, measure(long, 1), variants[-1])


def print_times(title: str, found: dict[str, Measurement], base: str) -> None:
    """Print seconds, speed relative to the contender `base`, and memory."""
    print(f"\n{title}")
    for name, (median_s, peak_gib) in found.items():
        speed = found[base].median_s / median_s
        print(f"  {name:26} {median_s:8.3f} s {speed:7.2f} x {peak_gib:7.2f} GiB", flush=True)


def print_errors(model: ModelConfig, lengths: list[int]) -> None:
    print("error of the output against float64, bf16")
    for tokens in lengths:
        row = "  ".join(f"{name}: {largest_error(model, tokens, biased):.2e}" for name, biased in KERNELS.items())
        print(f"  {tokens:6} tokens  {row}", flush=True)


def largest_error(
    model: ModelConfig, tokens: int, biased: bool, *, bilevel: bool = True, queries: Tensor | None = None
) -> float:
    """Return the largest error over queries of two heads, relative to the norm of the output.

    Args:
        model: shape of the heads.
        tokens: sequence length.
        biased: add the bias of the steepest and the flattest slope.
        bilevel: the bias counts segments, not tokens.
        queries: positions of the queries; None: a sample of all.
    """
    generator, width = torch.Generator().manual_seed(0), model.head_width
    shape = (1, 2, tokens, width)
    q, k, v = (torch.randn(shape, generator=generator).bfloat16().to(device()) for _ in range(3))
    positions = (inter_ids(tokens) if bilevel else torch.arange(tokens))[None].to(device())
    slopes = (extreme_slopes(model, bilevel) if biased else torch.zeros(2)).to(device())
    wide = KeyBias(slopes, width)(q, k, positions) if biased else (q, k)
    queries = (torch.linspace(0, tokens - 1, SAMPLED_QUERIES).long() if queries is None else queries).to(device())
    found = causal_attention(*wide, v)[:, :, queries].double()
    scores = q[:, :, queries].double() @ k.double().mT / math.sqrt(width)
    scores += slopes.double()[:, None, None] * (positions - positions[:, queries].T)
    scores.masked_fill_(torch.arange(tokens, device=device()) > queries[:, None], -math.inf)
    exact = scores.softmax(dim=-1) @ v.double()
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


def extreme_slopes(model: ModelConfig, bilevel: bool = True) -> Tensor:
    """Return the steepest and the flattest slope of (BiPE-)ALiBi."""
    slopes = sorted(alibi_slopes(model.num_heads))
    return torch.tensor([slopes[-1], slopes[0]]) * (BILEVEL_ALIBI_FACTOR if bilevel else 1.0)


def inter_ids(tokens: int) -> Tensor:
    return torch.arange(tokens) // SEGMENT_TOKENS


def prepare_kernel(model: ModelConfig, tokens: int, biased: bool) -> Callable[[], None]:
    """Set up forward and backward of attention alone; adding the bias channels is not timed."""
    shape = (1, model.num_heads, tokens, model.head_width)
    q, k, v = (torch.randn(shape).to(device(), DTYPES[native_precision()]) for _ in range(3))
    if biased:
        slopes = torch.tensor(alibi_slopes(model.num_heads)) * BILEVEL_ALIBI_FACTOR
        q, k = KeyBias(slopes, model.head_width)(q, k, inter_ids(tokens).to(device())[None])
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(v)
    return lambda: causal_attention(*inputs).backward(grad)


def prepare_model(model: ModelConfig, encoding: str, precision: str, tokens: int, variant: str) -> Callable[[], None]:
    """Set up forward pass and loss of a sequence without gradients, in one of the four variants."""
    config = model.model_copy(update={"encoding": encoding})
    network = build_model(config).to(device(), DTYPES[precision])
    if variant == ALL_KEYS:
        attention.MIN_WINDOWED_TOKENS = tokens + 1
    elif variant != OURS:
        make_eager(network, config)
    *inputs, labels_BT = (ids_BT.to(device()) for ids_BT in make_batch(config.vocab_size, rows=1, length=tokens)[:4])
    labels_T = labels_BT[0]

    @torch.inference_mode()
    def in_parts() -> None:
        hidden_BTD, positions_BT = network[:-1](tuple(inputs))
        for hidden_KD, labels_K in zip(hidden_BTD[0].split(HEAD_TOKENS), labels_T.split(HEAD_TOKENS), strict=True):
            float(token_losses(network[-1]((hidden_KD, positions_BT)), labels_K).sum())

    @torch.inference_mode()
    def at_once() -> None:
        float(nn.functional.cross_entropy(network(tuple(inputs))[0].float(), labels_T))

    return at_once if variant == PUBLISHED else in_parts


class EagerAttention(nn.Module):
    """Attention with the same weights that holds all scores, the mask and the bias in memory."""

    def __init__(self, attention: Attention, config: ModelConfig) -> None:
        super().__init__()
        self.inner = attention
        self.slopes_N = None
        if isinstance(attention.encoding, KeyBias):
            factor = BILEVEL_ALIBI_FACTOR if config.bilevel else 1.0
            self.slopes_N = torch.tensor(alibi_slopes(config.num_heads)) * factor

    def prepare(self, positions_BT: Tensor, dtype: torch.dtype) -> Prepared:
        return self.inner.prepare(positions_BT, dtype)

    def forward(self, hidden_BTD: Tensor, positions_BT: Tensor, prepared: Prepared) -> Tensor:
        inner, num_tokens = self.inner, hidden_BTD.shape[1]
        qkv_BTN3H = inner.qkv(hidden_BTD).unflatten(-1, (-1, 3, inner.head_width))
        q_BNTH, k_BNTH, v_BNTH = (x.transpose(1, 2) for x in qkv_BTN3H.unbind(3))
        if self.slopes_N is None:
            q_BNTH, k_BNTH = inner.encoding.encode(q_BNTH, k_BNTH, prepared.encoding)
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
    """Replace the attention of every block by `EagerAttention`."""
    for block in network:
        if isinstance(block, Block):
            block.attention = EagerAttention(block.attention, config)  # type: ignore[assignment]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--config", type=Path, metavar="YAML", help="run configuration (default: 151M with two blocks)")
    add("--set", action="append", default=["model.num_layers=2"], metavar="KEY=VALUE", help="overrides of it")
    add("--window", type=int, default=1024, metavar="N", help=f"sequence length of kernel and models {default}")
    add("--longest", type=int, default=4096, metavar="N", help=f"long sequence, in tokens; 0: none {default}")
    add("--errors", type=int, nargs="*", default=[1024, 8192, 32768], metavar="N", help=f"sequence lengths {default}")
    add("--repeats", type=int, default=7, metavar="N", help=f"timed calls of the kernels {default}")
    add("--model-repeats", type=int, default=3, metavar="N", help=f"timed forward passes {default}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
