"""Reader of the file of an offline run of Weights & Biases: records of protobuf in the log format of LevelDB."""

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

_BLOCK_BYTES, _HEAD_BYTES, _FILE_HEAD_BYTES = 32768, 7, 7
_FULL, _LAST = 1, 4  # kinds of a part that completes a record


class WandbRun(NamedTuple):
    """What an offline run holds."""

    name: str
    group: str
    tags: set[str]
    values: dict[int, dict[str, Any]]  # by step
    times: dict[int, float]


def read_wandb_file(path: Path) -> WandbRun:
    """Read all records of a file."""
    from wandb.proto.wandb_internal_pb2 import Record

    name, group, tags = "", "", set[str]()
    values, times = dict[int, dict[str, Any]](), dict[int, float]()
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            name, group, tags = record.run.display_name, record.run.run_group, set(record.run.tags)
        elif kind == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            step = row.pop("_step")
            assert step not in values, f"step {step} is there twice"
            times[step] = row.pop("_timestamp")
            values[step] = {key: value for key, value in row.items() if not key.startswith("_")}
    return WandbRun(name, group, tags, values, times)


def _records(data: bytes) -> list[bytes]:
    found, parts, position = [], bytearray(), _FILE_HEAD_BYTES
    while position + _HEAD_BYTES <= len(data):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _HEAD_BYTES:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        position += _HEAD_BYTES
        parts += data[position : position + size]
        position += size
        if kind in (_FULL, _LAST):
            found.append(bytes(parts))
            parts.clear()
    return found
