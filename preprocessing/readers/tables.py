"""Read the rows of parquet and Arrow files as documents, with the text of only a few rows in memory.

`pyarrow` loads slowly, so other modules import this one only when a table is read. Its dataset scanner is not used: it
holds more of a row group in memory, accepts row counts that disagree, and does not read Arrow streams.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.parquet import ParquetFile

from megatron_bipe.errors import DataError
from preprocessing.readers.lines import BLOCK_BYTES, reading
from preprocessing.readers.parse import Keys, Parsed, parse_rows

ROWS_AT_ONCE = 4  # of a parquet file: few enough for rows of 50 MB, and still far faster than tokenizing
BUFFER_BYTES = 1 << 20  # per compressed column; without it, pyarrow holds all of a row group
ARROW_FILE_START = b"ARROW1\0\0"
ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
LONGEST_TYPE_NAMED = 60  # characters, in messages

Batches = Iterator[tuple[pa.RecordBatch | None, int]]  # with the bytes on disk that were read for each batch


def read_parquet(file: Path, start: int, stop: int, keys: Keys) -> Iterator[Parsed]:
    """Yield the rows of the row groups that begin in bytes [start, stop) of the file, in batches of `BLOCK_BYTES`.

    Any division of a file into ranges gives every row exactly once. Rows are numbered from 1 at the first that is
    read here; `Parsed.read_bytes` add up to `stop - start`.

    Raises:
        DataError: the file cannot be read or is damaged, or a key leads to no column.
    """
    with (
        _reading_table(file),
        ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True) as table,
    ):
        require_columns(table.schema_arrow, keys, file)
        columns = list(dict.fromkeys(_split_key(table.schema_arrow, key)[0] for key in keys.in_use()))
        batches = _row_group_batches(table, file.stat().st_size, start, stop, columns)
        yield from parse_batches(str(file), batches, keys)


def _row_group_batches(table: ParquetFile, size: int, start: int, stop: int, columns: list[str]) -> Batches:
    groups = {number: table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)}
    if (rows := sum(group.num_rows for group in groups.values())) != table.metadata.num_rows:
        raise EOFError(f"its row groups declare {rows} rows, the file {table.metadata.num_rows}")
    # Even an invalid position falls into exactly one range.
    mine = {number: group for number, group in groups.items() if start <= min(_position(group), size - 1) < stop}
    total = sum(group.num_rows for group in mine.values())
    num_rows = reported_bytes = 0
    for number, group in mine.items():
        fitting_rows = BLOCK_BYTES * group.num_rows // max(group.total_byte_size, 1)
        at_once = max(min(fitting_rows, ROWS_AT_ONCE), 1)
        for batch in table.iter_batches(at_once, row_groups=[number], columns=columns, use_threads=False):
            num_rows += batch.num_rows
            if num_rows > total:
                break
            share_bytes = (stop - start) * num_rows // total
            yield batch, share_bytes - reported_bytes
            reported_bytes = share_bytes
    if num_rows != total:
        raise EOFError(f"{num_rows} rows were found, but {total} are declared")
    yield None, stop - start - reported_bytes


def _position(group: Any) -> int:
    """Return the byte of the file at which a row group begins: that of its first page.

    Any byte of a group could assign it to a range; parquet-java, and so Spark, uses the one in its middle.
    """
    columns = [group.column(number) for number in range(group.num_columns)]
    pages = [page for column in columns for page in (column.data_page_offset, column.dictionary_page_offset)]
    # A column without a dictionary has no such offset or, from some writers, 0.
    return min((page for page in pages if page and page > 0), default=0)


def read_arrow(file: Path, keys: Keys) -> Iterator[Parsed]:
    """Yield the rows of one Arrow file, in stream or file format, in batches of about `BLOCK_BYTES` of text.

    The file is memory-mapped. `Parsed.read_bytes` add up to its size.

    Raises:
        DataError: as `read_parquet`.
    """
    with _reading_table(file), pa.memory_map(str(file)) as source:
        is_stream = source.read(len(ARROW_FILE_START)) != ARROW_FILE_START
        source.seek(0)
        with (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(source) as reader:
            require_columns(reader.schema, keys, file)
            batches = _stream_batches(reader, source) if is_stream else _file_batches(reader, source.size())
            yield from parse_batches(str(file), batches, keys)


def _stream_batches(reader: Any, source: Any) -> Batches:
    reported_bytes = 0
    for batch in reader:
        yield batch, source.tell() - reported_bytes
        reported_bytes = source.tell()
    # pyarrow accepts a stream that was truncated between two batches as complete.
    source.seek(max(source.tell() - len(ARROW_STREAM_END), 0))
    if source.read() != ARROW_STREAM_END:
        raise EOFError("it does not end with the end-of-stream marker")
    yield None, source.size() - reported_bytes


def _file_batches(reader: Any, size: int) -> Batches:
    count = reader.num_record_batches
    for number in range(count):
        yield reader.get_batch(number), size * (number + 1) // count - size * number // count
    if count == 0:
        yield None, size


@contextmanager
def _reading_table(file: Path) -> Iterator[None]:
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


def parse_batches(name: str, batches: Iterable[tuple[pa.RecordBatch | None, int]], keys: Keys) -> Iterator[Parsed]:
    """Yield the documents of a table, in groups of about `BLOCK_BYTES` of text, or of one row.

    The keys were checked by `require_columns`.
    """
    records: list[dict[str, Any]] = []
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


def _records(batch: pa.RecordBatch, keys: Keys) -> Iterator[dict[str, Any]]:
    """Yield each row's values at the keys; later rows take no memory."""
    columns = {key: _column_at(batch, key) for key in keys.in_use()}
    for values in zip(*columns.values(), strict=True):
        yield {key: _decode(scalar.as_py()) for key, scalar in zip(columns, values, strict=True)}


def _column_at(batch: pa.RecordBatch, key: str) -> pa.Array:
    """Return the values at a key, strings as bytes because Arrow does not guarantee UTF-8."""
    first, *inner = _split_key(batch.schema, key)
    column = batch.column(first)
    column.validate()
    for name in inner:
        if pa.types.is_null(column.type):
            break
        column = pc.struct_field(column, column.type.get_field_index(name))
    if pa.types.is_dictionary(column.type):
        column = pa.DictionaryArray.from_arrays(column.indices, _strings_as_bytes(column.dictionary), safe=False)
    column = _strings_as_bytes(column)
    column.validate(full=True)  # in a damaged file, offsets could point anywhere in memory
    return column


def _strings_as_bytes(column: pa.Array) -> pa.Array:
    return column.cast(pa.large_binary()) if _is_string(column.type) else column


def _decode(value: Any) -> Any:
    """Return bytes as a string if they are UTF-8; the row of other bytes is malformed."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def require_columns(schema: pa.Schema, keys: Keys, location: Path | str) -> None:
    """Refuse a table that lacks a column, instead of reporting each of its rows as malformed.

    Raises:
        DataError: there is nothing at a key, or no strings; to partition by, integers and booleans are also allowed.
    """
    for key in keys.in_use():
        found = _type_at(schema, key)
        values = found.value_type if found is not None and pa.types.is_dictionary(found) else found
        if values is not None and any(fits(values) for fits in _FITTING[key == keys.text]):
            continue
        message = f'There is nothing at "{key}"' if found is None else f'"{key}" holds {_shorten(found)}, not strings'
        columns = ", ".join(f"{field.name} ({_shorten(field.type)})" for field in schema) or "none"
        option = "--text-key" if key == keys.text else "--partition-by"
        raise DataError(
            f"{message}; the columns are: {columns}",
            remedy=f"Name a column of strings, or a dotted path to one inside structs, with {option}",
            location=location,
        )


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


# A column of nulls has no other type; each of its rows is malformed.
_FITTING = {
    True: (_is_string, pa.types.is_null),
    False: (_is_string, pa.types.is_null, pa.types.is_integer, pa.types.is_boolean),
}


def _shorten(kind: pa.DataType) -> str:
    name = str(kind)
    return name if len(name) <= LONGEST_TYPE_NAMED else f"{name[:LONGEST_TYPE_NAMED]}..."


def _type_at(schema: pa.Schema, key: str) -> pa.DataType | None:
    """Return the type of the values at a key; None if the schema has no such path, or two."""
    kind: Any = schema
    for name in _split_key(schema, key):
        if isinstance(kind, pa.DataType) and pa.types.is_null(kind):
            return kind
        is_nest = kind is schema or pa.types.is_struct(kind)
        index = kind.get_field_index(name) if is_nest else -1
        if index < 0:
            return None
        kind = kind.field(index).type
    return kind


def _split_key(schema: pa.Schema, key: str) -> list[str]:
    """Return the names from a column inwards. A column named like the full key has priority, as in `parse`."""
    return [key] if key in schema.names else key.split(".")
