"""The benchmark of training, whose peer runs under this project's engine through a subclass of it."""

import re

import pytest

from tests.helpers.commands import flags, run

SETTINGS = [
    "model={num_layers: 1, hidden_size: 32, num_heads: 2, ffn_size: 48, vocab_size: 64, intra_size: 16}",
    "train={seq_len_tokens: 16, global_batch: 1, micro_batch: 1}",
]
CONTENDERS = ["BiPE-RoPE", "transformers, LlamaForCausalLM"]


@pytest.mark.slow
def test_training_is_compared_with_transformers_in_one_run():
    ended = run("python", "tools/bench/train.py", *flags(SETTINGS), "--repeats", "1", "--only", *CONTENDERS)
    assert ended.code == 0 and not ended.left, ended.output
    rows = re.findall(rf"^({'|'.join(CONTENDERS)}) +([\d.]+) ", ended.output, re.MULTILINE)
    assert [name for name, _ in rows] == CONTENDERS and all(float(seconds) > 0 for _, seconds in rows), ended.output
