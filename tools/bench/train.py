"""One training step (forward, backward, AdamW) of each model on one device, against what the machine could do.

    matrix products       all products of a step on their shapes, nothing else: the rate that the rest is a share of
    BiPE-RoPE ... ALiBi   this project's models under its engine
    without the engine    BiPE-RoPE in a bare loop with the same optimizer on fp32 masters
    transformers          the installed LlamaForCausalLM (SDPA) under the same engine and optimizer
    as it comes           the same under plain DeepSpeed: no settings but ours for ZeRO, the allocator as it is

A share is the step's floating-point operations (docs/performance.md) at the rate of the matrix products, over its time.

Example: python tools/bench/train.py --set model.num_layers=12 --repeats 5
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._device import device
from bench._machine import describe_machine
from bench._peer import PEER, make_peer
from bench._turns import Prepare, Turns, take_turns
from megatron_bipe.config.deepspeed import engine_config, read_ds_config
from megatron_bipe.config.load import load_run_config
from megatron_bipe.config.schema import RunConfig
from megatron_bipe.engine.base import make_optimizer
from megatron_bipe.engine.engines import ZeroEngine, start_engine
from megatron_bipe.engine.interface import Engine
from megatron_bipe.model.precision import DTYPES
from megatron_bipe.model.transformer import LocalLayers, build_model, train_flops_per_token
from megatron_bipe.runtime.distributed_init import join_launch
from megatron_bipe.runtime.hardware import choose_precision
from megatron_bipe.types import Batch

ENCODINGS = {"BiPE-RoPE": "bipe_rope", "BiPE-ALiBi": "bipe_alibi", "RoPE": "rope", "ALiBi": "alibi"}
PRODUCTS, BARE = "matrix products", "BiPE-RoPE without the engine"
AS_IT_COMES = "transformers, as it comes"
LR, SEGMENT_TOKENS = 1e-4, 14
Settings = tuple[Path | None, tuple[str, ...], Path]  # --config, --set, --ds_config


@command
def main(argv: Sequence[str] | None) -> None:
    """Let the contenders take turns, print the table."""
    arguments = _parser().parse_args(argv)
    settings: Settings = (arguments.config, tuple(arguments.set), arguments.ds_config)
    run = load(settings)
    contenders: dict[str, Prepare] = {PRODUCTS: partial(prepare_products, settings)}
    contenders |= {name: partial(prepare_ours, settings, encoding) for name, encoding in ENCODINGS.items()}
    contenders |= {BARE: partial(prepare_bare, settings), PEER: partial(prepare_peer, settings)}
    contenders |= {AS_IT_COMES: partial(prepare_peer, settings, as_it_comes=True)}
    if arguments.only:
        contenders = {name: contenders[name] for name in (PRODUCTS, *arguments.only)}
    found = take_turns(contenders, arguments.repeats, as_it_comes={AS_IT_COMES})
    train, tokens = run.train, run.train.micro_batch * run.train.seq_len_tokens
    print(describe_machine("torch", "deepspeed", "transformers"))
    print(
        f"{run.model.num_layers} blocks x {run.model.hidden_size}, {train.micro_batch} x {train.seq_len_tokens} tokens "
        f"in {train.precision}, {torch.get_num_threads()} threads, {arguments.ds_config}; {arguments.repeats} turns\n"
    )
    print_table(found, products_flops(run), train_flops_per_token(run.model, train.seq_len_tokens) * tokens, tokens)


def print_table(found: dict[str, Turns], product_flops: float, step_flops: float, tokens: int) -> None:
    """Steps in seconds, tokens/s, shares of the products' rate, ratios against transformers, memory."""
    rate = product_flops / found[PRODUCTS].median_s
    print(f"{PRODUCTS}: {found[PRODUCTS].median_s:.3f} s, {rate / 1e9:.0f} GFLOP/s\n")
    print(f"{'':32} {'s a step':>9} {'tokens/s':>9} {'share':>6} {'x peer':>7} {'peak GiB':>9} {'of peer':>8}")
    peer = found.get(PEER)
    for name, turns in found.items():
        if name == PRODUCTS:
            continue
        times, memory = (peer.median_s / turns.median_s, turns.peak_gib / peer.peak_gib) if peer else (0.0, 0.0)
        print(
            f"{name:32} {turns.median_s:9.3f} {tokens / turns.median_s:9.0f} "
            f"{step_flops / rate / turns.median_s:6.1%} {times:7.2f} {turns.peak_gib:9.2f} {memory:8.1%}"
        )


def load(settings: Settings, encoding: str | None = None) -> RunConfig:
    """The run that the options name; one micro-batch a step."""
    config, overrides, _ = settings
    run = load_run_config(config, [*overrides, *([f"model.encoding={encoding}"] if encoding else [])])
    precision = choose_precision(run.train.precision, device(), "train.precision").precision
    update = {"global_batch": run.train.micro_batch, "precision": precision}
    return run.model_copy(update={"train": run.train.model_copy(update=update)})


def prepare_ours(settings: Settings, encoding: str) -> Callable[[], None]:
    """A step of this project's engine."""
    run, mesh = load(settings, encoding), join_launch()
    ds_config = engine_config(run, read_ds_config(settings[2]), 1, settings[2])
    engine, batch = start_engine(run, ds_config, mesh.with_layout(run.parallel)), make_batch(run)
    return partial(train_step, engine, batch)


def train_step(engine: Engine, batch: Batch[Tensor]) -> None:
    """One update, until its loss is known."""
    float(engine.train_step([batch], LR).loss_nats)


def prepare_peer(settings: Settings, as_it_comes: bool = False) -> Callable[[], None]:
    """The same of transformers' model, which is handed to the same engine in place of ours.

    `as_it_comes`: without what this project sets in DeepSpeed, but for fp32 sums of gradients.
    """
    run, mesh = load(settings, "rope"), join_launch()
    ds_config = engine_config(run, read_ds_config(settings[2]), 1, settings[2])
    if as_it_comes:
        ds_config.pop("communication_data_type", None)
        ds_config["bf16"].pop("immediate_grad_update", None)
    engine = PeerEngine(run, ds_config, mesh.with_layout(run.parallel))
    if as_it_comes:
        engine._engine.enable_backward_allreduce = True
    return partial(train_step, engine, make_batch(run))


class PeerEngine(ZeroEngine):
    """Our engine around a model that computes its own loss from tokens and labels."""

    def _build(self, run: RunConfig) -> nn.Module:
        return make_peer(run.model, run.train.seq_len_tokens)

    def _loss(self, batch: Batch[Tensor]) -> Tensor:
        tokens, labels = (ids.to(self._mesh.device) for ids in (batch.tokens_BT, batch.labels_BT))
        loss: Tensor = self._engine(input_ids=tokens, shift_labels=labels, labels=labels).loss
        return loss


def prepare_bare(settings: Settings) -> Callable[[], None]:
    """The model and the optimizer without an engine: fp32 masters, gradients copied up, weights copied down."""
    run = load(settings, "bipe_rope")
    model = build_model(run.model).to(device(), DTYPES[run.train.precision])
    masters = nn.ParameterList([p.detach().float() for p in model.parameters()])
    optimizer, layers, batch = make_optimizer(masters, run.optimizer), LocalLayers(), make_batch(run)
    pairs = list(zip(masters, model.parameters(), strict=True))
    tokens, intra, inter, labels = (ids.to(device()) for ids in batch[:4])

    def step() -> None:
        layers.token_losses(model((tokens, intra, inter)), labels).mean().backward()
        for master, parameter in pairs:
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        nn.utils.clip_grad_norm_(masters.parameters(), run.optimizer.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = LR
        optimizer.step()
        with torch.no_grad():
            for master, parameter in pairs:
                parameter.copy_(master)
                master.grad = None

    return step


def prepare_products(settings: Settings) -> Callable[[], None]:
    """Every matrix product of a step: forward, and two backward."""
    run = load(settings)
    dtype = DTYPES[run.train.precision]
    tokens = run.train.micro_batch * run.train.seq_len_tokens
    held: list[tuple[Tensor, Tensor, Tensor, int]] = []
    for rows, columns, times in product_shapes(run):
        x, w, grad = (
            torch.randn(size).to(device(), dtype) for size in ((tokens, columns), (rows, columns), (tokens, rows))
        )
        held.append((x, w, grad, times))

    def products() -> None:
        for x, w, grad, times in held:
            for _ in range(times):
                _ = x @ w.T, grad @ w, grad.T @ x

    return products


def product_shapes(run: RunConfig) -> list[tuple[int, int, int]]:
    """(rows, columns, how many) of every matrix."""
    model = run.model
    heads_width, layers = model.num_heads * model.head_width, model.num_layers
    qkv = (model.num_heads + 2 * model.kv_heads) * model.head_width
    return [
        (qkv, model.hidden_size, layers),
        (model.hidden_size, heads_width, layers),
        (2 * model.ffn_size, model.hidden_size, layers),
        (model.hidden_size, model.ffn_size, layers),
        (model.vocab_size, model.hidden_size, 1),
    ]


def products_flops(run: RunConfig) -> float:
    """Of `prepare_products`."""
    tokens = run.train.micro_batch * run.train.seq_len_tokens
    return 3 * 2 * tokens * sum(rows * columns * times for rows, columns, times in product_shapes(run))


def make_batch(run: RunConfig) -> Batch[Tensor]:
    """Random tokens in segments of equal length."""
    rows, length = run.train.micro_batch, run.train.seq_len_tokens
    tokens = torch.randint(0, run.model.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    places = torch.arange(length).expand(rows, length)
    return Batch(tokens[:, :-1], places % SEGMENT_TOKENS, places // SEGMENT_TOKENS, tokens[:, 1:])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, help="run configuration (default: 151M with two blocks, a window at once)"
    )
    parser.add_argument(
        "--set", action="append", default=["train.micro_batch=1", "model.num_layers=2"], metavar="KEY=VALUE"
    )
    parser.add_argument("--ds_config", type=Path, default=Path("ds_configs/zero1.json"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", metavar="NAME", help="of the contenders (default: all)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
