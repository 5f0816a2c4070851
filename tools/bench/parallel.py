"""What ranks tell each other, and what it costs, on this machine's CPU ranks: medians over interleaved repeats.

    split matrix   forward and backward of a column-split matrix: the sum of gradients beside the product for that of
                   the weight, against autograd's order, which waits for the sum first
    exchange       queries, keys and values to whole windows of some heads, and the output back, forward and backward:
                   one exchange for the three against DeepSpeed's DistributedAttention, which makes one for each
    replicas       a comparison of all weights and of what tensor-parallel ranks hold alike, against a training step

Example: python tools/bench/parallel.py --ranks 2 --layers 12
"""

import argparse
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._device import native_precision
from bench._machine import describe_machine
from megatron_bipe.config.deepspeed import engine_config
from megatron_bipe.config.load import load_run_config
from megatron_bipe.engine.base import start_deepspeed
from megatron_bipe.engine.engines import start_engine
from megatron_bipe.parallel.collectives import column_parallel_linear, copy_to_ranks
from megatron_bipe.parallel.context_parallel import UlyssesExchange
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.runtime.distributed_init import join_launch
from megatron_bipe.types import Batch

TOKENS, WIDTH, WIDTH_OUT = 1024, 2048, 8192  # a feed-forward matrix of the 1.6B model, a window
WINDOW, HEADS, HEAD_WIDTH = 4096, 16, 128  # its attention, on a long window
TIMEOUT_S = 600


@command
def main(argv: Sequence[str] | None) -> None:
    """Start the ranks; the first of them prints."""
    arguments = _parser().parse_args(argv)
    print(describe_machine("torch", "deepspeed"))
    print(f"{arguments.ranks} ranks of one thread, gloo; seconds, medians of {arguments.repeats}\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(run_rank, (arguments, port), nprocs=arguments.ranks)


def run_rank(rank: int, arguments: argparse.Namespace, port: int) -> None:
    """One rank's part of every measurement."""
    ranks = arguments.ranks
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    mesh = join_launch()
    torch.set_num_threads(1)
    start_deepspeed(mesh, TIMEOUT_S)
    _print(rank, "split matrix", compare(split_matrix(ranks), arguments.repeats))
    _print(rank, "exchange", compare(exchanges(), arguments.repeats))
    for name, layout in {"data": "{}", "tensor": f"{{tensor: {ranks}}}"}.items():
        _print(rank, f"replicas, {name}", compare(replicas(mesh, layout, arguments.layers), arguments.steps))
    dist.destroy_process_group()


def compare(contenders: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, in turns, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            dist.barrier()
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def split_matrix(ranks: int) -> dict[str, Callable[[], None]]:
    """A rank's share of a column-split matrix."""
    group = dist.group.WORLD
    assert group is not None
    hidden = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    weight = torch.randn(WIDTH_OUT // ranks, WIDTH, requires_grad=True)
    grad = torch.randn(1, TOKENS, WIDTH_OUT // ranks)
    return {
        "sum beside the product": lambda: column_parallel_linear(hidden, weight, group, False).backward(grad),
        "sum, then the product": lambda: F.linear(copy_to_ranks(hidden, group), weight).backward(grad),
    }


def exchanges() -> dict[str, Callable[[], None]]:
    """Attention that is an identity, so that only the exchange is measured."""
    from deepspeed.sequence.layer import DistributedAttention

    group = dist.group.WORLD
    assert group is not None
    sequences = UlyssesExchange(group)
    qkv = torch.randn(1, WINDOW // group.size(), HEADS, 3, HEAD_WIDTH, requires_grad=True)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q + k + v

    peer = DistributedAttention(attention, group, scatter_idx=2, gather_idx=1)
    return {
        "one exchange for three": lambda: (
            sequences.to_tokens(attention(*sequences.to_heads(qkv).unbind(3))).sum().backward()
        ),
        "DeepSpeed's, one for each": lambda: peer(*qkv.unbind(3), 0).sum().backward(),
    }


def replicas(mesh: Mesh, layout: str, num_layers: int) -> dict[str, Callable[[], None]]:
    """A model of the 151M shape (12 layers), fp32 masters, one window of 1024 a copy of the model."""
    train = f"{{global_batch: {mesh.num_ranks}, micro_batch: 1, precision: {native_precision()}}}"
    settings = [f"model.num_layers={num_layers}", f"train={train}", f"parallel={layout}"]
    run = load_run_config(None, settings)
    mesh_here = mesh.with_layout(run.parallel)
    engine = start_engine(run, engine_config(run, {"zero_optimization": {"stage": 1}}, mesh.num_ranks, ""), mesh_here)
    length = run.train.seq_len_tokens
    tokens, places = torch.randint(0, run.model.vocab_size, (1, length)), torch.arange(length)[None]
    batches = [Batch(tokens, places % 14, places // 14, tokens)] * (mesh.num_ranks // mesh_here.data_ranks)

    def step() -> None:
        float(engine.train_step(batches, 1e-4).loss_nats)

    step()
    return {"comparison": lambda: engine.check_replicas(1), "step": step}


def _print(rank: int, title: str, seconds: dict[str, float]) -> None:
    if rank:
        return
    (first, ours), (second, theirs) = seconds.items()
    print(f"{title:18} {first}: {ours:.3f}   {second}: {theirs:.3f}   ratio {ours / theirs:.3f}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11, help="of the small measurements")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the model whose replicas are compared")
    parser.add_argument("--steps", type=int, default=3, help="training steps and comparisons")
    return parser


if __name__ == "__main__":
    sys.exit(main())
