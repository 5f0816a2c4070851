"""Benchmarks: training, whose peer runs under this project's engine, and the counts of kernels and bytes."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.commands import flags, run
from tests.helpers.paths import ROOT
from tests.helpers.tools import script

SETTINGS = [
    "model={num_layers: 1, hidden_size: 32, num_heads: 2, ffn_size: 48, vocab_size: 64, intra_size: 16}",
    "train={seq_len_tokens: 16, global_batch: 1, micro_batch: 1}",
]
CONTENDERS = ["BiPE-RoPE", "transformers, LlamaForCausalLM"]
LOGITS = 16 * 64


@pytest.mark.slow
def test_training_is_compared_with_transformers_in_one_run():
    ended = run("python", "tools/bench/train.py", *flags(SETTINGS), "--repeats", "1", "--only", *CONTENDERS)
    assert ended.code == 0 and not ended.left, ended.output
    rows = re.findall(rf"^({'|'.join(CONTENDERS)}) +([\d.]+) ", ended.output, re.MULTILINE)
    assert [name for name, _ in rows] == CONTENDERS and all(float(seconds) > 0 for _, seconds in rows), ended.output


@pytest.fixture(scope="module")
def counts():
    with script("bench/_counts") as module:
        yield module


def test_operators_count_what_they_read_and_write(counts):
    with counts.KernelCounts() as counted:
        x = torch.empty(4, 8, device="meta")
        for operation, num_bytes in [
            (lambda: x.view(8, 4).transpose(0, 1)[0], 0),
            (lambda: x + x[:1].expand(4, 8), 4 * (32 + 8 + 32)),
            (lambda: x.exp_(), 4 * (32 + 32)),
            (lambda: x.copy_(x.bfloat16()), (4 + 2) * 32 + (2 + 4) * 32),
            (lambda: x.gather(1, torch.empty(4, 1, dtype=torch.int64, device="meta")), 4 * (8 + 2 * 4)),
            (lambda: torch.mul(x, x, out=torch.empty(4, 8, device="meta")), 4 * (2 * 32 + 32)),
        ]:
            counted.clear()
            operation()
            assert sum(counted.bytes.values()) == num_bytes
        counted.clear()
        torch.empty(3).to("meta") + x[0, :3]
        assert (counted.host_copies, counted.kernels[counts.ELEMENTWISE]) == (1, 1)
        x @ x.T
        assert counted.bytes[counts.PRODUCTS] == 4 * (2 * 32 + 16)


def test_compiled_code_counts_fused_kernels_and_its_products(counts):
    def step(x, weight):
        return ((x @ weight).exp() + 1) * 2

    with FakeTensorMode(), counts.KernelCounts() as counted, counted.compiled(), torch.no_grad():
        for _ in range(2):  # the second call runs the code of the first
            counted.clear()
            torch.compile(step, fullgraph=True)(torch.empty(64, 32), torch.empty(32, 16))
    assert counted.kernels == {counts.PRODUCTS: 1, counts.ELEMENTWISE: 1}
    assert counted.bytes[counts.ELEMENTWISE] == 4 * 2 * 64 * 16


def test_compiled_rotation_is_one_kernel_in_each_direction(counts):
    from megatron_bipe.model.positions.functional import rotate

    with FakeTensorMode(), counts.KernelCounts() as counted, counted.compiled():
        x = torch.empty(2, 16, 3, 64, dtype=torch.bfloat16, requires_grad=True)
        cos, sin = torch.empty(2, 2, 1, 16, 32, dtype=torch.bfloat16)
        for _ in range(2):  # the second call runs the code of the first
            counted.clear()
            rotated = torch.compile(rotate, fullgraph=True)(x.transpose(1, 2), cos, sin)
            forward = counted.kernels.copy()
            torch.autograd.grad(rotated, x, torch.empty_like(rotated))
    assert forward == {counts.ELEMENTWISE: 1} and counted.kernels == {counts.ELEMENTWISE: 2}
    assert rotated.transpose(1, 2).is_contiguous()


def test_loss_of_a_factory_that_compiles_moves_six_bytes_of_a_logit_in_bf16(counts):
    from megatron_bipe.model import LocalLayers

    layers = LocalLayers(compiles=True)
    with FakeTensorMode(), counts.KernelCounts() as counted, counted.compiled():
        logits = torch.empty(2, 64, 1000, dtype=torch.bfloat16, requires_grad=True)
        losses = layers.token_losses(logits, torch.zeros(2, 64, dtype=torch.int64))
        torch.autograd.grad(losses.mean(), logits)
    assert 6 <= sum(counted.bytes.values()) / logits.numel() < 6.2
    assert sum(counted.kernels.values()) < 10


@pytest.mark.slow
def test_kernels_are_counted_and_compared_with_another_checkout():
    command = ["python", "tools/bench/kernels.py", "--config", "examples/bipe_alibi_151m.yaml", *flags(SETTINGS)]
    ended = run(*command, "--baseline", str(ROOT))
    assert ended.code == 0 and not ended.left, ended.output
    rows = dict(re.findall(r"^\| ([\w ,]+) \| (.*) \|$", ended.output, re.MULTILINE))
    baseline, eager, compiled, *ratios = rows["loss"].split(" | ")
    assert baseline == eager != compiled and ratios[0] == "100.0%" and float(ratios[1][:-1]) < 20
