"""A writer of safetensors files that holds one tensor in memory at a time and computes the checksum while writing.

The library's `save_file` holds all tensors and a copy of them, and computes no checksum. The file would have to be read
again for it, and the checksum would then include any corruption between memory and disk.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_bipe.errors import writing

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_ALIGNMENT = 8  # bytes to which the start of the first tensor is aligned
_CHUNK_BYTES = 1 << 22  # small enough that a chunk is still in the CPU cache when it is written after hashing


class WrittenFile(NamedTuple):
    """Length and checksum of a file at the time of writing."""

    bytes: int
    sha256: str  # lower-case hex


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> WrittenFile:
    """Write a safetensors file and fsync it before returning.

    Source: the format's description, https://huggingface.co/docs/safetensors.

    Args:
        path: file to write.
        tensors: contiguous CPU tensors, wider dtypes before narrower ones.
        metadata: content of the header's `__metadata__` entry.
        read: returns a tensor by name, called once per name and in order; `tensors` then only gives dtypes and shapes.
        advance: called after each chunk.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    digest = hashlib.sha256()
    with writing(path), path.open("wb", buffering=0) as stream:
        heading = [memoryview(len(header).to_bytes(8, "little")), memoryview(header)]
        for view in itertools.chain(heading, (_bytes((read or tensors.__getitem__)(name)) for name in tensors)):
            for start in range(0, len(view), _CHUNK_BYTES):
                chunk = view[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                while chunk:  # a nearly full disk accepts only part of a chunk, then fails
                    chunk = chunk[stream.write(chunk) :]
                advance()
        os.fsync(stream.fileno())
        return WrittenFile(stream.tell(), digest.hexdigest())


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
