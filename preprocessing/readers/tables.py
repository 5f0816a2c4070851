"""Tables as inputs: parquet files, folders saved by `datasets`, and datasets on the Hugging Face Hub.

A dataset on the Hub is named `ORG/NAME[/CONFIG][:SPLIT]`; the default split is `train`. Its parts are the shards that
`datasets` sees, usually one file each. It is streamed: nothing of it is kept on disk, and none of its code is run.

`pyarrow` and `datasets` are slow to import, and are imported only when such an input is read.
"""

import gc
import json
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub

from megatron_bipe.errors import DataError
from preprocessing.readers.lines import BLOCK_BYTES, reading
from preprocessing.readers.parse import Keys, Parsed

ROWS_AT_ONCE = 4  # of a parquet file: few enough for rows of 50 MB, and still far faster than tokenizing
HUB_ROWS_AT_ONCE = 1000
BUFFER_BYTES = 1 << 20  # per compressed column; without it, pyarrow holds all of a row group
ARROW_FILE_START = b"ARROW1\0\0"
ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
LONGEST_REASON = 400  # characters of a message from `datasets`

Batches = Iterator[tuple[Any, int]]  # a `pyarrow.RecordBatch`, or None, and the bytes on disk read for it


def read_parquet(file: Path, start: int, stop: int, keys: Keys) -> Iterator[Parsed]:
    """Yield the rows of the row groups that begin in bytes [start, stop) of the file, in batches of `BLOCK_BYTES`.

    Any division of a file into ranges gives every row exactly once. Rows are numbered from 1 at the first that is
    read here; `Parsed.read_bytes` add up to `stop - start`.

    Raises:
        DataError: the file cannot be read or is damaged, or a key leads to no column.
    """
    with _import_errors(file):
        from pyarrow.parquet import ParquetFile

        from preprocessing.readers.arrow_rows import parse_batches, reading_table, require_columns, top_columns
    with (
        reading_table(file),
        ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True) as table,
    ):
        require_columns(table.schema_arrow, keys, file)
        columns = top_columns(table.schema_arrow, keys)
        batches = _row_group_batches(table, file.stat().st_size, start, stop, columns)
        yield from parse_batches(str(file), batches, keys)


def _row_group_batches(table: Any, size: int, start: int, stop: int, columns: list[str]) -> Batches:
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


def is_saved_dataset(folder: Path) -> bool:
    """Return True if `datasets` saved a dataset, or one with several splits, in this folder."""
    marks = ({"dataset_dict.json"}, {"state.json", "dataset_info.json"})
    return any(all((folder / name).is_file() for name in names) for names in marks)


def saved_files(folder: Path) -> list[Path]:
    """Return the `.arrow` files of a folder made by `Dataset.save_to_disk`, in order.

    Raises:
        DataError: the folder holds several splits, or is damaged or incomplete.
    """
    listing = folder / "state.json"
    if not listing.exists():
        splits = sorted(state.parent for state in folder.glob("*/state.json"))
        raise DataError(
            f"This is a dataset saved with its splits: {', '.join(split.name for split in splits) or 'none is here'}",
            remedy=f"Name the folder of one split as the input, such as {splits[0] if splits else folder / 'train'}",
            location=folder,
        )
    try:
        with reading(listing):
            files = [folder / entry["filename"] for entry in json.loads(listing.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"This does not list files as `Dataset.save_to_disk` does ({type(error).__name__}: {error})",
            remedy="Copy or save the dataset again",
            location=listing,
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(
            f"The saved dataset lacks {', '.join(missing[:3]) or 'any file'}{', ...' if len(missing) > 3 else ''}",
            remedy="Copy or save the dataset again",
            location=folder,
        )
    return files


def read_arrow(file: Path, keys: Keys) -> Iterator[Parsed]:
    """Yield the rows of one Arrow file, in stream or file format, in batches of about `BLOCK_BYTES` of text.

    The file is memory-mapped. `Parsed.read_bytes` add up to its size.

    Raises:
        DataError: as `read_parquet`.
    """
    with _import_errors(file):
        import pyarrow

        from preprocessing.readers.arrow_rows import parse_batches, reading_table, require_columns
    with reading_table(file), pyarrow.memory_map(str(file)) as source:
        is_stream = source.read(len(ARROW_FILE_START)) != ARROW_FILE_START
        source.seek(0)
        with (pyarrow.ipc.open_stream if is_stream else pyarrow.ipc.open_file)(source) as reader:
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


class HubTable(NamedTuple):
    """Number of parts and current commit of a dataset on the Hub."""

    parts: int
    commit: str


def open_hub(name: str) -> HubTable:
    """Look up a dataset.

    Raises:
        DataError: no network, an unknown dataset, configuration or split, no access, or data that needs a script.
    """
    _hub_dataset(name, None)  # first, because its errors explain most
    with _hub_errors(name, _OPENING):
        commit = str(huggingface_hub.HfApi().dataset_info(_parse_name(name)[0]).sha)
    return HubTable(int(_hub_dataset(name, commit).num_shards), commit)


def read_hub(name: str, part: int, commit: str, keys: Keys) -> Iterator[Parsed]:
    """Yield the rows of one part of a dataset on the Hub, in order, in batches of about `BLOCK_BYTES` of text.

    `Parsed.read_bytes` is 1 for the last batch, else 0: it counts parts. The commit is that of `open_hub`, so that
    parts read at different times are of one version.

    Raises:
        DataError: as `open_hub` and `read_parquet`; or the dataset has no such part.
    """
    with _import_errors(name):
        from preprocessing.readers.arrow_rows import parse_batches
    dataset = _hub_dataset(name, commit)
    if part >= dataset.num_shards:
        raise DataError(
            f"Part {part} (from 0) was planned, but the dataset has {dataset.num_shards} parts: another version of "
            "`datasets` counts them differently",
            remedy="Start over with --overwrite",
            location=name,
        )
    shard = dataset.shard(num_shards=dataset.num_shards, index=part).with_format("arrow")
    yield from parse_batches(name, _hub_batches(name, shard.iter(HUB_ROWS_AT_ONCE), keys), keys)


def _hub_batches(name: str, tables: Iterator[Any], keys: Keys) -> Batches:
    from preprocessing.readers.arrow_rows import require_columns

    while True:
        with _hub_errors(name, _READING):
            table = next(tables, None)
        if table is None:
            break
        require_columns(table.schema, keys, name)
        for batch in table.to_batches():
            yield batch, 0
    yield None, 1


def _parse_name(name: str) -> tuple[str, str | None, str]:
    """Return repository, configuration and split."""
    path, _, split = name.partition(":")
    names = path.split("/")
    return "/".join(names[:2]), "/".join(names[2:]) or None, split or "train"


def _hub_dataset(name: str, commit: str | None) -> Any:
    with _import_errors(name):
        from datasets import load_dataset
    repo, config, split = _parse_name(name)
    if Path(repo).exists():  # `datasets` would read that
        raise DataError(f"{repo} is also a path on this disk", remedy="Name files in it, or rename it", location=name)
    with _hub_errors(name, _OPENING):
        return load_dataset(repo, config, split=split, revision=commit, streaming=True)


_FETCH = "fetch its files with tools/download_data.py and name those as the input"

# Remedies by exception type; the first match applies.
_OPENING = (
    (
        FileNotFoundError,
        "Check the name; for a private or gated dataset, ask for access and run `hf auth login`",
    ),
    (ValueError, "Name it as ORG/NAME[/CONFIG][:SPLIT], with a configuration and a split that it has"),
    (RuntimeError, f"If only a script can load it, use another version of the dataset; else {_FETCH}"),
    (Exception, f"Check the network, HF_HUB_OFFLINE and HF_ENDPOINT; or {_FETCH}"),
)
_READING = ((Exception, f"If it is the network, run the same command again; or {_FETCH}"),)


@contextmanager
def _hub_errors(name: str, remedies: Sequence[tuple[type[Exception], str]]) -> Iterator[None]:
    """Turn any exception of `datasets`, which documents no fixed set of them, into a `DataError`."""
    try:
        yield
    except Exception as error:
        remedy = next(remedy for kind, remedy in remedies if isinstance(error, kind))
        text = " ".join(str(error).split())[:LONGEST_REASON]
        # A Parquet scanner that the traceback or a cycle keeps alive until the end of the process aborts it:
        # https://github.com/apache/arrow/issues/45214
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        raise DataError(f"`datasets` failed: {text or type(error).__name__}", remedy=remedy, location=name) from error


@contextmanager
def _import_errors(location: Path | str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DataError(
            f"A package for this input cannot be imported: {error}",
            remedy="Run make setup, or pip install datasets",
            location=location,
        ) from error
