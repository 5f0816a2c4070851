"""Writes a safetensors file, one tensor in memory at a time, and takes its checksum on the way.

The library's own `save_file` holds all tensors and a copy of them, and takes no checksum, so that the file would have
to be read again, and what went wrong between memory and disk would be part of it.
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

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_ALIGNMENT = 8  # of the first tensor's bytes
_CHUNK_BYTES = 1 << 22  # hashed and then written while a processor's cache still has it


class WrittenFile(NamedTuple):
    """A file as it was when it was written."""

    bytes: int
    sha256: str  # lower-case hex


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor] | None = None,
) -> WrittenFile:
    """Write a file that is on the disk when this returns.

    Source: the format's description, https://huggingface.co/docs/safetensors.

    Args:
        path: of the file.
        tensors: in the CPU's memory, contiguous, wider types before narrower ones.
        metadata: for the file's header.
        read: gives a tensor by its name, once each and in order; `tensors` then only tell types and shapes.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as stream:
        heading = [memoryview(len(header).to_bytes(8, "little")), memoryview(header)]
        for view in itertools.chain(heading, (_bytes((read or tensors.__getitem__)(name)) for name in tensors)):
            for start in range(0, len(view), _CHUNK_BYTES):
                chunk = view[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                while chunk:  # a disk that is nearly full takes a part, and refuses the rest
                    chunk = chunk[stream.write(chunk) :]
        os.fsync(stream.fileno())
        return WrittenFile(stream.tell(), digest.hexdigest())


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
