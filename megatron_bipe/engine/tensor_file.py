"""Writes a safetensors file and takes its checksum on the way.

The library's own `save_file` takes none, so that the file would have to be read again, and what went wrong between
memory and disk would be part of it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_bipe.data.records import FileRecord

_TYPES = {torch.float32: "F32", torch.uint8: "U8"}
_ALIGNMENT = 8  # of the first tensor's bytes
_CHUNK_BYTES = 1 << 22  # hashed and then written while a processor's cache still has it


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileRecord:
    """Write tensors that lie in the CPU's memory, contiguous, fp32 before uint8; on the disk when this returns.

    Source: the format's description, https://huggingface.co/docs/safetensors.
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
        for view in (*heading, *(_bytes(tensor) for tensor in tensors.values())):
            for start in range(0, len(view), _CHUNK_BYTES):
                chunk = view[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                while chunk:  # a disk that is nearly full takes a part, and refuses the rest
                    chunk = chunk[stream.write(chunk) :]
        os.fsync(stream.fileno())
        return FileRecord(bytes=stream.tell(), sha256=digest.hexdigest())


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
