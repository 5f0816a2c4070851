"""Kernels, bytes and copies of a micro-batch's forward and backward pass on a GPU, counted without one.

    matrix products   weights, forward and backward
    attention         the fused kernels, forward and backward
    elementwise       everything else of the model: norms, positional encoding, SwiGLU, additions, copies, embedding
    loss              cross-entropy with its gradient; also in bytes per logit
    host copies       copies from host to device within the model, which wait for all queued work

`eager` is the model as it runs without torch.compile, `compiled` with compiled blocks and loss. Gradients are those of
one micro-batch; the engine's sums of gradients and the optimizer's update are not counted. With `--baseline`, the eager
code of another checkout is counted by the same rules, and ratios to it are shown.

Example: python tools/bench/kernels.py --baseline ../v1
"""

import argparse
import inspect
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from subprocess import PIPE
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/, where _cli is

from _cli import command
from bench._counts import KINDS, LOSS, KernelCounts, fused_kernels
from megatron_bipe.config import RunConfig, load_run_config
from megatron_bipe.model import LocalLayers, build_model, loss, transformer
from megatron_bipe.runtime.child_processes import run_command

CONFIGS = [
    Path(f"examples/{encoding}_{size}.yaml") for size in ("151m", "1.6b") for encoding in ("bipe_rope", "bipe_alibi")
]
EAGER, COMPILED, BASELINE = "eager", "compiled", "baseline"
Counts = dict[str, dict[str, Any]]  # by EAGER, COMPILED, BASELINE: "kernels" and "bytes" by kind, "host_copies"


@command
def main(argv: Sequence[str] | None) -> None:
    arguments = _parser().parse_args(argv)
    runs = {str(path): load_run_config(path, arguments.set) for path in arguments.config}
    found = {path: count_modes(run) for path, run in runs.items()}
    if arguments.json:
        print(json.dumps(found))
        return
    if arguments.baseline:
        for path, counts in count_baseline(arguments).items():
            found[path][BASELINE] = counts[EAGER]
    print(f"torch {torch.__version__}, bf16, forward and backward of one micro-batch\n")
    for path, counts in found.items():
        print_table(path, runs[path], counts)


def count_modes(run: RunConfig) -> Counts:
    """Count eager code, and compiled code if this checkout has it."""
    modes = [EAGER, COMPILED] if "compiles" in inspect.signature(LocalLayers).parameters else [EAGER]
    return {mode: count(run, compiles=mode == COMPILED) for mode in modes}


def count_baseline(arguments: argparse.Namespace) -> dict[str, Counts]:
    """Count by this file's rules with the package and the YAML files of another checkout."""
    overrides = [part for item in arguments.set for part in ("--set", item)]
    options = ["--json", "--config", *map(str, arguments.config), *overrides]
    environment = os.environ | {"PYTHONPATH": str(arguments.baseline.resolve())}
    command_line = [sys.executable, str(Path(__file__).resolve()), *options]
    ended = run_command(command_line, cwd=arguments.baseline, env=environment, stdout=PIPE, check=True)
    counts: dict[str, Counts] = json.loads(ended.stdout)
    return counts


def count(run: RunConfig, compiles: bool) -> dict[str, Any]:
    """Count a micro-batch after one that fills the caches.

    Eager code runs on the meta device, where it takes the paths for GPUs. torch.compile needs fake CPU tensors.
    """
    device, layers = ("cpu", LocalLayers(compiles=True)) if compiles else ("meta", LocalLayers())
    counts, shape = KernelCounts(), (run.train.micro_batch, run.train.seq_len_tokens)
    with FakeTensorMode(allow_non_fake_inputs=True) if compiles else nullcontext(), _gpu_paths():
        with torch.device(device):
            model = _bf16(build_model(run.model, layers=layers))
        with counts, counts.compiled() if compiles else nullcontext():
            for _ in range(2):
                tokens, intra, inter, labels = torch.zeros(4, *shape, dtype=torch.int64, device=device)
                counts.clear()
                logits = model((tokens, intra, inter))
                leaf = logits.detach().requires_grad_()
                with counts.part(LOSS):
                    (grad,) = torch.autograd.grad(layers.token_losses(leaf, labels).mean(), leaf)
                logits.backward(grad)
                model.zero_grad()
    return {"kernels": counts.kernels, "bytes": counts.bytes, "host_copies": counts.host_copies}


def _bf16(model: nn.Module) -> nn.Module:
    """Convert the weights; `Module.to` does not convert fake tensors."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(weight.detach().bfloat16()))
    return model


@contextmanager
def _gpu_paths() -> Iterator[None]:
    """Make the model run as on a GPU where it distinguishes devices."""

    def rms_norm(hidden_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return F.rms_norm(hidden_BTD, weight_D.shape, weight_D, eps)

    parts = mock.patch.dict(loss._PART_ELEMENTS, meta=loss._PART_ELEMENTS["cuda"])
    with fused_kernels(), parts, mock.patch.object(transformer, "rms_norm", rms_norm):
        yield


def print_table(path: str, run: RunConfig, counts: Counts) -> None:
    micro_batch, seq_len_tokens = run.train.micro_batch, run.train.seq_len_tokens
    modes = [mode for mode in (BASELINE, EAGER, COMPILED) if mode in counts]
    compared = modes[1:] if BASELINE in modes else []
    num_logits = micro_batch * seq_len_tokens * run.model.vocab_size
    rows = [["kernels and GB", *modes, *(f"{mode}/{BASELINE}" for mode in compared)]]
    for kind in KINDS:
        moved = {mode: counts[mode]["bytes"].get(kind, 0) for mode in modes}
        row = [kind, *(f"{counts[mode]['kernels'].get(kind, 0)}, {moved[mode] / 1e9:.2f}" for mode in modes)]
        rows.append([*row, *(f"{moved[mode] / moved[BASELINE]:.1%}" for mode in compared)])
    rows.append(["loss, bytes per logit", *(f"{counts[mode]['bytes'][LOSS] / num_logits:.1f}" for mode in modes)])
    rows.append(["host copies", *("" if mode == COMPILED else str(counts[mode]["host_copies"]) for mode in modes)])
    rows.insert(1, ["---"] * len(rows[0]))
    print(f"{path}, {micro_batch} x {seq_len_tokens} tokens\n")
    for row in rows:
        print(f"| {' | '.join(row + [''] * (len(rows[0]) - len(row)))} |")
    print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--config",
        type=Path,
        nargs="+",
        default=CONFIGS,
        metavar="YAML",
        help="run configurations (default: 151M and 1.6B)",
    )
    add("--set", action="append", default=["train.micro_batch=8"], metavar="KEY=VALUE", help="overrides of them")
    add("--baseline", type=Path, metavar="DIR", help="another checkout, whose eager code is counted for comparison")
    add("--json", action="store_true", help="print all counts as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
