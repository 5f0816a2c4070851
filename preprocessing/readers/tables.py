"""Tables as inputs: parquet files, folders saved by `datasets`, and datasets on the Hugging Face Hub.

A dataset on the Hub is named `ORG/NAME[/CONFIG][:SPLIT]`; without a split, it is `train`. Its parts are the shards that
`datasets` sees, a file each as a rule. It is streamed: nothing of it is kept on disk, and no code of it is run.

`pyarrow` and `datasets` are optional packages, imported only where such an input is read.
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

ROWS_AT_ONCE = 4  # out of a parquet file: few enough for rows of 50 MB, and still far faster than tokenizing
HUB_ROWS_AT_ONCE = 1000
BUFFER_BYTES = 1 << 20  # of a compressed column; without it, pyarrow holds all of a row group
ARROW_FILE_START = b"ARROW1\0\0"
ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
LONGEST_REASON = 400  # characters of what `datasets` says

Batches = Iterator[tuple[Any, int]]  # a `pyarrow.RecordBatch`, or None, and the bytes on disk read for it


def read_parquet(file: Path, start: int, stop: int, keys: Keys) -> Iterator[Parsed]:
    """Rows of the row groups that begin in bytes [start, stop) of the file, in batches of about `BLOCK_BYTES` of text.

    Any way of cutting a file into ranges gives every row exactly once. Rows are numbered from 1 at the first that is
    read here; `Parsed.read_bytes` add up to `stop - start`.

    Raises:
        DataError: the file cannot be read or is damaged, or a key leads to no column.
    """
    with _optional_packages(file):
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
        raise EOFError(f"its row groups announce {rows} rows, the file {table.metadata.num_rows}")
    # Even a position that makes no sense lies in one range.
    mine = {number: group for number, group in groups.items() if start <= min(_position(group), size - 1) < stop}
    total = sum(group.num_rows for group in mine.values())
    num_rows = told_bytes = 0
    for number, group in mine.items():
        fitting_rows = BLOCK_BYTES * group.num_rows // max(group.total_byte_size, 1)
        at_once = max(min(fitting_rows, ROWS_AT_ONCE), 1)
        for batch in table.iter_batches(at_once, row_groups=[number], columns=columns, use_threads=False):
            num_rows += batch.num_rows
            if num_rows > total:
                break
            share_bytes = (stop - start) * num_rows // total
            yield batch, share_bytes - told_bytes
            told_bytes = share_bytes
    if num_rows != total:
        raise EOFError(f"{num_rows} rows were found where {total} are announced")
    yield None, stop - start - told_bytes


def _position(group: Any) -> int:
    """Byte of the file at which a row group begins: that of its first page.

    Any one byte would do to share out groups; parquet-java, and so Spark, goes by the one in the group's middle.
    """
    columns = [group.column(number) for number in range(group.num_columns)]
    pages = [page for column in columns for page in (column.data_page_offset, column.dictionary_page_offset)]
    return min((page for page in pages if page and page > 0), default=0)  # none or, by some writers, 0: no dictionary


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` saved a dataset, or one with several splits, in this folder."""
    marks = ({"dataset_dict.json"}, {"state.json", "dataset_info.json"})
    return any(all((folder / name).is_file() for name in names) for names in marks)


def saved_files(folder: Path) -> list[Path]:
    """The `.arrow` files of a folder made by `Dataset.save_to_disk`, in order.

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
    """Rows of one Arrow file, stream or file format, in batches of about `BLOCK_BYTES` of text.

    The file is mapped, not read, into memory. `Parsed.read_bytes` add up to its size.

    Raises:
        DataError: as `read_parquet`.
    """
    with _optional_packages(file):
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
    told_bytes = 0
    for batch in reader:
        yield batch, source.tell() - told_bytes
        told_bytes = source.tell()
    # pyarrow takes a stream that was cut between two batches for a whole one.
    source.seek(max(source.tell() - len(ARROW_STREAM_END), 0))
    if source.read() != ARROW_STREAM_END:
        raise EOFError("it does not end with the mark of the end")
    yield None, source.size() - told_bytes


def _file_batches(reader: Any, size: int) -> Batches:
    count = reader.num_record_batches
    for number in range(count):
        yield reader.get_batch(number), size * (number + 1) // count - size * number // count
    if count == 0:
        yield None, size


class HubTable(NamedTuple):
    """A dataset on the Hub, as it is now."""

    parts: int
    commit: str


def open_hub(name: str) -> HubTable:
    """Look a dataset up.

    Raises:
        DataError: no network, no such dataset, configuration or split, no access, or data that only a script makes.
    """
    _hub_dataset(name, None)  # which explains best what may be wrong
    with _hub_errors(name, _OPENING):
        commit = str(huggingface_hub.HfApi().dataset_info(_parse_name(name)[0]).sha)
    return HubTable(int(_hub_dataset(name, commit).num_shards), commit)


def read_hub(name: str, part: int, commit: str, keys: Keys) -> Iterator[Parsed]:
    """Rows of one part of a dataset on the Hub, in order, in batches of about `BLOCK_BYTES` of text.

    Args:
        name: `ORG/NAME[/CONFIG][:SPLIT]`.
        part: from 0.
        commit: from `open_hub`: parts read at different times belong together.
        keys: where a row has its text. `Parsed.read_bytes` is 1 for the last batch, else 0: parts are what is counted.

    Raises:
        DataError: as `open_hub` and `read_parquet`; or the dataset has no such part.
    """
    with _optional_packages(name):
        from preprocessing.readers.arrow_rows import parse_batches
    dataset = _hub_dataset(name, commit)
    if part >= dataset.num_shards:
        raise DataError(
            f"Part {part} (from 0) is due, but the dataset has {dataset.num_shards} parts: another version of "
            "`datasets` counts them otherwise",
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
    """Repository, configuration and split."""
    path, _, split = name.partition(":")
    names = path.split("/")
    return "/".join(names[:2]), "/".join(names[2:]) or None, split or "train"


def _hub_dataset(name: str, commit: str | None) -> Any:
    with _optional_packages(name):
        from datasets import load_dataset
    repo, config, split = _parse_name(name)
    if Path(repo).exists():  # `datasets` would take that
        raise DataError(f"There is {repo} on this disk", remedy="Name files in it, or rename it", location=name)
    with _hub_errors(name, _OPENING):
        return load_dataset(repo, config, split=split, revision=commit, streaming=True)


_FETCH = "fetch its files by tools/download_data.py and name those as the input"

# What to do about the first kind that an error is of.
_OPENING = (
    (FileNotFoundError, "Check the name; for a private or gated dataset, ask for access and log in by `hf auth login`"),
    (ValueError, "Name it as ORG/NAME[/CONFIG][:SPLIT], with a configuration and a split that it has"),
    (RuntimeError, f"If only a script can load it, use another version of the dataset; else {_FETCH}"),
    (Exception, f"Check the network, HF_HUB_OFFLINE and HF_ENDPOINT; or {_FETCH}"),
)
_READING = ((Exception, f"If it is the network, run the same command again; or {_FETCH}"),)


@contextmanager
def _hub_errors(name: str, remedies: Sequence[tuple[type[Exception], str]]) -> Iterator[None]:
    """Turns whatever `datasets` raises, which names no closed set of errors, into the one error that a user reads."""
    try:
        yield
    except Exception as error:
        remedy = next(remedy for kind, remedy in remedies if isinstance(error, kind))
        said = " ".join(str(error).split())[:LONGEST_REASON]
        # A scanner of Parquet that the traceback or a cycle keeps until the end of the process aborts it:
        # https://github.com/apache/arrow/issues/45214
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        raise DataError(f"`datasets` says: {said or type(error).__name__}", remedy=remedy, location=name) from error


@contextmanager
def _optional_packages(place: Path | str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DataError(
            f"To read this input, an optional package is needed: {error}", remedy="pip install datasets", location=place
        ) from error
