"""Text for benchmarks: sources and documentation that lie on every machine."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson
import zstandard

SUFFIXES = (".py", ".rst", ".txt", ".md", ".html", ".h", ".c", ".hpp", ".js", ".pyi")
MAX_FILE_BYTES = 2_000_000  # larger ones are data
SKIPPED = ("/proc", "/sys", "/dev", "/tmp")
SPECIAL = (b"<s>", b"</s>", b"<unk>")  # libraries disagree on whether these are special tokens in a text


def collect(file: Path, roots: Sequence[Path], max_bytes: float) -> int:
    """Write texts found under `roots`, each once, as lines of a .jsonl.zst; returns the bytes of text."""
    text_bytes = 0
    seen: set[bytes] = set()
    with file.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as stream:
        for source in _sources(roots):
            text = source.read_bytes()
            digest = hashlib.blake2b(text).digest()
            if digest in seen or not text or any(mark in text for mark in SPECIAL):
                continue
            seen.add(digest)
            try:
                line = orjson.dumps({"text": text.decode(), "meta": {"file": source.name}})
            except ValueError:  # not UTF-8, in the text or the name
                continue
            stream.write(line + b"\n")
            text_bytes += len(text)
            if text_bytes > max_bytes:
                break
    return text_bytes


def _sources(roots: Sequence[Path]) -> list[Path]:
    """In an order of no meaning, so that the first part of a corpus is like all of it."""
    return sorted(_files_below(roots), key=lambda path: hashlib.md5(os.fsencode(path)).digest())


def _files_below(roots: Sequence[Path]) -> Iterator[Path]:
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if str(Path(folder) / name) not in SKIPPED)
            for name in sorted(names):
                path = Path(folder) / name
                if name.endswith(SUFFIXES) and path.is_file() and path.stat().st_size < MAX_FILE_BYTES:
                    yield path
