"""Common parts of the benchmarks of models: device, precision, the peer, and contenders in separate processes."""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Container, Mapping
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_bipe.config import AUTO, ComputePrecision, ModelConfig
from megatron_bipe.runtime.child_processes import leave_with_parent
from megatron_bipe.runtime.hardware import choose_precision, device_type, keep_freed_memory, peak_memory_gib
from megatron_bipe.types import Batch

PEER = "transformers, LlamaForCausalLM"
SEGMENT_TOKENS = 14

Prepare = Callable[[], Callable[[], None]]  # sets up a contender and returns the function to time


def device() -> torch.device:
    """Return the GPU if there is one and BIPE_DEVICE does not choose the CPU."""
    return torch.device(device_type())


def native_precision() -> ComputePrecision:
    """Return what `train.precision: auto` selects on this device."""
    return choose_precision(AUTO, device(), "precision").precision


def make_batch(vocab_size: int, rows: int, length: int) -> Batch[Tensor]:
    """Return a batch of random tokens in segments of equal length, on the CPU."""
    tokens = torch.randint(0, vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).expand(rows, length)
    return Batch(tokens[:, :-1], positions % SEGMENT_TOKENS, positions // SEGMENT_TOKENS, tokens[:, 1:])


def make_peer(model: ModelConfig, max_length: int) -> nn.Module:
    """Return an untrained transformers Llama of the same shape, with SDPA; it computes its own loss from `labels`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=max_length,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


class Measurement(NamedTuple):
    """Time and memory of a contender."""

    median_s: float
    peak_gib: float  # of the device, or of the complete process on a CPU


def measure(contenders: Mapping[str, Prepare], repeats: int, untuned: Container[str] = ()) -> dict[str, Measurement]:
    """Time contenders alternately, each in its own process, so that peaks of memory are separate.

    An additional first call of each is not counted.

    Args:
        contenders: by name; functions that can be pickled, such as partials of module-level functions.
        repeats: timed calls of each.
        untuned: names of those that run with the allocator's default settings, without `keep_freed_memory`.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    try:
        for name, prepare in contenders.items():
            pipes[name], far_end = context.Pipe()
            arguments = (prepare, far_end, name not in untuned)
            processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            processes[-1].start()
            far_end.close()  # so that a contender that fails ends this process, too: its pipe is then closed
            pipes[name].recv()  # the contender is ready
            sys.stderr.write(f"ready: {name}\n")
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for repeat in range(repeats + 1):
            for name, pipe in pipes.items():
                pipe.send("run")
                elapsed_s = pipe.recv()
                if repeat:
                    seconds[name].append(elapsed_s)
        found = {}
        for name, pipe in pipes.items():
            pipe.send("end")
            found[name] = Measurement(statistics.median(seconds[name]), pipe.recv())
        return found
    finally:
        for process in processes:
            process.kill()


def _serve(prepare: Prepare, pipe: Connection, tuned: bool) -> None:
    leave_with_parent()
    run = prepare()
    if tuned:
        keep_freed_memory(device())
    pipe.send("ready")
    while pipe.recv() == "run":
        began_s = time.perf_counter()
        run()
        if device().type == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - began_s)
    pipe.send(peak_memory_gib(device()))
    pipe.recv()  # wait to be killed, so that no process ends during another's measurement
