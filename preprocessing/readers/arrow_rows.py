"""Convert batches of Arrow tables to documents, with the text of only a few rows in memory.

Only readers of tables import this module, because it imports `pyarrow`, which is slow.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from megatron_bipe.errors import DataError
from preprocessing.readers.lines import BLOCK_BYTES, reading
from preprocessing.readers.parse import Keys, Parsed, parse_rows

LONGEST_TYPE_NAMED = 60  # characters, in messages

Record = dict[str, Any]  # a row's value at each of the keys


def parse_batches(name: str, batches: Iterable[tuple[pa.RecordBatch | None, int]], keys: Keys) -> Iterator[Parsed]:
    """Yield the documents of a table, in groups of about `BLOCK_BYTES` of text, or of one row.

    Each batch comes with the bytes on disk that were read for it. The keys were checked by `require_columns`.
    """
    records: list[Record] = []
    first_row = 1
    text_size = read_bytes = 0
    for batch, batch_bytes in batches:
        for record in _records(batch, keys) if batch is not None else ():
            records.append(record)
            text_size += len(record[keys.text] or "")
            if text_size >= BLOCK_BYTES:
                yield parse_rows(name, first_row, records, keys, read_bytes)
                first_row += len(records)
                records, text_size, read_bytes = [], 0, 0
        read_bytes += batch_bytes
    if records or read_bytes:
        yield parse_rows(name, first_row, records, keys, read_bytes)


def _records(batch: pa.RecordBatch, keys: Keys) -> Iterator[Record]:
    """Yield each row's values at the keys; later rows take no memory."""
    columns = {key: _column(batch, key) for key in _wanted(keys)}
    for values in zip(*columns.values(), strict=True):
        yield {key: _value(scalar) for key, scalar in zip(columns, values, strict=True)}


def _column(batch: pa.RecordBatch, key: str) -> pa.Array:
    """Return the values at a key, strings as bytes because Arrow does not guarantee UTF-8."""
    first, *inner = _path(batch.schema, key)
    column = batch.column(first)
    column.validate()
    for name in inner:
        if pa.types.is_null(column.type):
            break
        column = pc.struct_field(column, column.type.get_field_index(name))
    if pa.types.is_dictionary(column.type):
        column = pa.DictionaryArray.from_arrays(column.indices, _as_bytes(column.dictionary), safe=False)
    column = _as_bytes(column)
    column.validate(full=True)  # in a damaged file, offsets could point anywhere in memory
    return column


def _as_bytes(column: pa.Array) -> pa.Array:
    return column.cast(pa.large_binary()) if _is_string(column.type) else column


def _value(scalar: pa.Scalar) -> Any:
    value = scalar.as_py()
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value  # the row is then malformed: it holds bytes, not a string


def require_columns(schema: pa.Schema, keys: Keys, location: Path | str) -> None:
    """Refuse a table that lacks a column, instead of reporting each of its rows as malformed.

    Raises:
        DataError: there is nothing at a key, or no strings; to partition by, integers and booleans are also allowed.
    """
    for key in _wanted(keys):
        found = _type_at(schema, key)
        values = found.value_type if found is not None and pa.types.is_dictionary(found) else found
        if values is not None and any(fits(values) for fits in _FITTING[key == keys.text]):
            continue
        message = f'There is nothing at "{key}"' if found is None else f'"{key}" holds {_named(found)}, not strings'
        columns = ", ".join(f"{field.name} ({_named(field.type)})" for field in schema) or "none"
        option = "--text-key" if key == keys.text else "--partition-by"
        raise DataError(
            f"{message}; the columns are: {columns}",
            remedy=f"Name a column of strings, or a dotted path to one inside structs, with {option}",
            location=location,
        )


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


# A column of nulls has no other type; each of its rows is malformed.
_FITTING = {
    True: (_is_string, pa.types.is_null),
    False: (_is_string, pa.types.is_null, pa.types.is_integer, pa.types.is_boolean),
}


def _named(kind: pa.DataType) -> str:
    name = str(kind)
    return name if len(name) <= LONGEST_TYPE_NAMED else f"{name[:LONGEST_TYPE_NAMED]}..."


def _type_at(schema: pa.Schema, key: str) -> pa.DataType | None:
    """Return the type of the values at a key; None if the schema has no such path, or two."""
    kind: Any = schema
    for name in _path(schema, key):
        if isinstance(kind, pa.DataType) and pa.types.is_null(kind):
            return kind
        is_nest = kind is schema or pa.types.is_struct(kind)
        index = kind.get_field_index(name) if is_nest else -1
        if index < 0:
            return None
        kind = kind.field(index).type
    return kind


def top_columns(schema: pa.Schema, keys: Keys) -> list[str]:
    """Return the names of the columns that contain the keys."""
    return list(dict.fromkeys(_path(schema, key)[0] for key in _wanted(keys)))


def _wanted(keys: Keys) -> list[str]:
    """Return the keys in use, each once."""
    return list(dict.fromkeys(key for key in keys if key is not None))


def _path(schema: pa.Schema, key: str) -> list[str]:
    """Return the names from a column inwards. A column named like the full key has priority, as in `parse`."""
    return [key] if key in schema.names else key.split(".")


@contextmanager
def reading_table(file: Path) -> Iterator[None]:
    """Turn failures of `pyarrow` to read a file into a `DataError` that names it."""
    with reading(file):
        try:
            yield
        except pa.ArrowNotImplementedError as error:
            raise DataError(
                f"pyarrow {pa.__version__} cannot read this: {error}",
                remedy="Write the file again with common types and compression, or install a newer pyarrow",
                location=file,
            ) from error
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk or the path, not the content
            raise EOFError(" ".join(str(error).split())) from error
