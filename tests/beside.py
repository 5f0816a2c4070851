"""What may lie beside the repository: tests that want it are skipped where it does not."""

from pathlib import Path

_SHARED = Path(__file__).parents[2] / "shared"
ORACLE = _SHARED / "oracle"
LLAMA = _SHARED / "llama_tokenizer"
