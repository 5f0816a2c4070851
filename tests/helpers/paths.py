"""Paths of the repository and of optional data next to it; tests that need the latter are skipped without it."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DS_CONFIGS = ROOT / "ds_configs"
_SHARED = ROOT.parent / "shared"
ORACLE = _SHARED / "oracle"
LLAMA = _SHARED / "llama_tokenizer"
