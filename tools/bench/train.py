"""Speed and memory of one training step (forward, backward, AdamW) of each model on one device, against transformers.

    matrix products       only the matrix products of a step, with their shapes; their rate is 100%
    BiPE-RoPE ... ALiBi   this project's models under its engine
    without the engine    BiPE-RoPE in a plain loop with the same optimizer on fp32 master weights
    LlamaForCausalLM      the installed transformers' Llama (SDPA) under the same engine and optimizer
    plain DeepSpeed       the same with DeepSpeed's own update and settings, and without those of the allocator

The share is the rate of a step's floating-point operations (docs/performance.md) over that of the matrix products.
Contenders alternate, each in its own process; the figures are medians.

Example: python tools/bench/train.py --set model.num_layers=12 --repeats 5
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._bench import describe_machine
from bench._models import PEER, Measurement, Prepare, device, make_batch, make_peer, measure
from megatron_bipe.config import RunConfig, engine_config, load_run_config, read_ds_config
from megatron_bipe.engine import base
from megatron_bipe.engine.base import make_optimizer
from megatron_bipe.engine.engines import ZeroEngine, start_engine
from megatron_bipe.engine.interface import Engine
from megatron_bipe.model import LocalLayers, build_model, train_flops_per_token
from megatron_bipe.runtime.distributed_init import join_launch
from megatron_bipe.runtime.hardware import DTYPES, choose_precision
from megatron_bipe.types import Batch

ENCODINGS = {"BiPE-RoPE": "bipe_rope", "BiPE-ALiBi": "bipe_alibi", "RoPE": "rope", "ALiBi": "alibi"}
PRODUCTS, BARE = "matrix products", "BiPE-RoPE without the engine"
PLAIN_DEEPSPEED = "transformers, plain DeepSpeed"
LR = 1e-4
Settings = tuple[Path | None, tuple[str, ...], Path]  # --config, --set, --ds_config


@command
def main(argv: Sequence[str] | None) -> None:
    arguments = _parser().parse_args(argv)
    settings: Settings = (arguments.config, tuple(arguments.set), arguments.ds_config)
    run = load(settings)
    contenders: dict[str, Prepare] = {PRODUCTS: partial(prepare_products, settings)}
    contenders |= {name: partial(prepare_ours, settings, encoding) for name, encoding in ENCODINGS.items()}
    contenders |= {BARE: partial(prepare_bare, settings), PEER: partial(prepare_peer, settings)}
    contenders |= {PLAIN_DEEPSPEED: partial(prepare_peer, settings, plain_deepspeed=True)}
    if arguments.only:
        contenders = {name: contenders[name] for name in (PRODUCTS, *arguments.only)}
    found = measure(contenders, arguments.repeats, untuned={PLAIN_DEEPSPEED})
    train, tokens = run.train, run.train.micro_batch * run.train.seq_len_tokens
    print(describe_machine("torch", "deepspeed", "transformers"))
    print(
        f"{run.model.num_layers} blocks x {run.model.hidden_size}, {train.micro_batch} x {train.seq_len_tokens} tokens "
        f"in {train.precision}, {torch.get_num_threads()} threads, {arguments.ds_config}; {arguments.repeats} repeats\n"
    )
    print_table(found, products_flops(run), train_flops_per_token(run.model, train.seq_len_tokens) * tokens, tokens)


def print_table(found: dict[str, Measurement], product_flops: float, step_flops: float, tokens: int) -> None:
    rate = product_flops / found[PRODUCTS].median_s
    print(f"{PRODUCTS}: {found[PRODUCTS].median_s:.3f} s, {rate / 1e9:.0f} GFLOP/s\n")
    print(f"{'':32} {'s/step':>9} {'tokens/s':>9} {'share':>6} {'x peer':>7} {'peak GiB':>9} {'% of peer':>9}")
    peer = found.get(PEER)
    for name, (median_s, peak_gib) in found.items():
        if name == PRODUCTS:
            continue
        speed, memory = (peer.median_s / median_s, peak_gib / peer.peak_gib) if peer else (0.0, 0.0)
        print(
            f"{name:32} {median_s:9.3f} {tokens / median_s:9.0f} "
            f"{step_flops / rate / median_s:6.1%} {speed:7.2f} {peak_gib:9.2f} {memory:9.1%}"
        )


def load(settings: Settings, encoding: str | None = None) -> RunConfig:
    """Load the run configuration of the options, with one micro-batch per step."""
    config, overrides, _ = settings
    run = load_run_config(config, [*overrides, *([f"model.encoding={encoding}"] if encoding else [])])
    precision = choose_precision(run.train.precision, device(), "train.precision").precision
    update = {"global_batch": run.train.micro_batch, "precision": precision}
    return run.model_copy(update={"train": run.train.model_copy(update=update)})


def prepare_ours(settings: Settings, encoding: str) -> Callable[[], None]:
    run, mesh = load(settings, encoding), join_launch()
    ds_config = engine_config(run, read_ds_config(settings[2]), 1, settings[2])
    engine, batch = start_engine(run, ds_config, mesh.with_layout(run.parallel)), _batch(run)
    return partial(train_step, engine, batch)


def train_step(engine: Engine, batch: Batch[Tensor]) -> None:
    float(engine.train_step([batch], LR).loss_nats)  # waits for the device


def prepare_peer(settings: Settings, plain_deepspeed: bool = False) -> Callable[[], None]:
    """Set up a step of the peer under the same engine.

    Args:
        settings: the run.
        plain_deepspeed: omit this project's update and DeepSpeed settings, except that gradients are summed in fp32.
    """
    run, mesh = load(settings, "rope"), join_launch()
    ds_config = engine_config(run, read_ds_config(settings[2]), 1, settings[2])
    if not plain_deepspeed:
        return partial(train_step, PeerEngine(run, ds_config, mesh.with_layout(run.parallel)), _batch(run))
    for key in ("communication_data_type", "timers"):
        ds_config.pop(key, None)
    ds_config["bf16"].pop("immediate_grad_update", None)
    with (
        mock.patch.object(base, "make_clipper", return_value=None),
        mock.patch.object(base, "sums_in_fp32", return_value=False),
        mock.patch.object(base, "adapt_offload"),
    ):
        return partial(train_step, PeerEngine(run, ds_config, mesh.with_layout(run.parallel)), _batch(run))


class PeerEngine(ZeroEngine):
    """This project's engine with a model that computes its own loss from tokens and labels."""

    def _build(self, run: RunConfig) -> nn.Module:
        return make_peer(run.model, run.train.seq_len_tokens)

    def _losses(self, batch: Batch[Tensor]) -> tuple[Tensor, Tensor | None]:
        tokens, labels = (ids.to(self._mesh.device).contiguous() for ids in (batch.tokens_BT, batch.labels_BT))
        return self._engine(input_ids=tokens, shift_labels=labels, labels=labels).loss, None


def prepare_bare(settings: Settings) -> Callable[[], None]:
    """Set up a step without an engine: gradients are copied to fp32 master weights, and these back to the model."""
    run = load(settings, "bipe_rope")
    model = build_model(run.model).to(device(), DTYPES[run.train.precision])
    masters = nn.ParameterList([p.detach().float() for p in model.parameters()])
    optimizer, layers, batch = make_optimizer(masters, run.optimizer), LocalLayers(), _batch(run)
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
    """Set up the matrix products of a step: for each weight one in the forward pass and two in the backward pass."""
    run = load(settings)
    dtype = DTYPES[run.train.precision]
    tokens = run.train.micro_batch * run.train.seq_len_tokens
    operands: list[tuple[Tensor, Tensor, Tensor, int]] = []
    for rows, columns, count in product_shapes(run):
        x, w, grad = (
            torch.randn(size).to(device(), dtype) for size in ((tokens, columns), (rows, columns), (tokens, rows))
        )
        operands.append((x, w, grad, count))

    def products() -> None:
        for x, w, grad, count in operands:
            for _ in range(count):
                _ = x @ w.T, grad @ w, grad.T @ x

    return products


def product_shapes(run: RunConfig) -> list[tuple[int, int, int]]:
    """Return (rows, columns, count) of all weight matrices."""
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
    tokens = run.train.micro_batch * run.train.seq_len_tokens
    return 3 * 2 * tokens * sum(rows * columns * count for rows, columns, count in product_shapes(run))


def _batch(run: RunConfig) -> Batch[Tensor]:
    return make_batch(run.model.vocab_size, run.train.micro_batch, run.train.seq_len_tokens)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, overrides = parser.add_argument, ["train.micro_batch=1", "model.num_layers=2"]
    add("--config", type=Path, metavar="YAML", help="run configuration (default: 151M with two blocks)")
    add("--set", action="append", default=overrides, metavar="KEY=VALUE", help="overrides of the run configuration")
    add("--ds_config", type=Path, default=Path("ds_configs/zero1.json"), metavar="JSON", help="(default: %(default)s)")
    add("--repeats", type=int, default=3, metavar="N", help="timed steps of each contender (default: %(default)s)")
    add("--only", nargs="*", metavar="NAME", help="contenders to run, by their names in the table (default: all)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
