"""The instructions of docs/encodings.md for adding an encoding, applied literally to a copy of the package."""

import re
import shutil

from tests.helpers.paths import ROOT
from tests.helpers.ranks import run_programs

TABLE = "RELATIVE: Mapping[str, Relative] = {\n"
USE = """
import sys

for name in [name for name in sys.modules if name.partition(".")[0] == "megatron_bipe"]:
    del sys.modules[name]
sys.path.insert(0, folder)

import torch
from megatron_bipe.config import ModelConfig
from megatron_bipe.model.transformer import build_model

tokens = torch.arange(12)[None]
shape = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "ffn_size": 8, "vocab_size": 20}
for name, positions in (("log_distance", torch.arange(12)), ("bipe_log_distance", torch.arange(12) // 3)):
    model = build_model(ModelConfig(encoding=name, **shape, init_std=0.3))
    model((tokens, tokens % 3, positions[None])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    seen, plain = [], torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = lambda *x, **k: seen.append(k["attn_mask"]) or plain(*x, **k)
    model((tokens, tokens % 3, positions[None]))
    torch.nn.functional.scaled_dot_product_attention = plain
    for t in range(12):
        for s in range(t + 1):
            wanted = -torch.log1p((positions[t] - positions[s]).double())
            assert abs(float(seen[0][0, 0, t, s]) - float(wanted)) < 1e-6
print("done")
"""


def test_encoding_of_one_file_and_one_line_trains(tmp_path):
    text = (ROOT / "docs" / "encodings.md").read_text("utf-8")
    file, line = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    path = re.search(r"`(megatron_bipe/model/positions/log_distance\.py)`", text).group(1)
    shutil.copytree(ROOT / "megatron_bipe", tmp_path / "megatron_bipe", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / path).write_text(file)
    table = tmp_path / "megatron_bipe" / "config" / "encodings.py"
    before = table.read_text("utf-8")
    assert before.count(TABLE) == 1 and line.count("\n") == 1
    table.write_text(before.replace(TABLE, TABLE + line))
    [ended] = run_programs(exec, [USE, {"folder": str(tmp_path)}], tmp_path / "log")
    assert ended == (0, "done\n")
