"""Read a dataset on the Hugging Face Hub, named `ORG/NAME[/CONFIG][:SPLIT]`; the default split is `train`.

Its parts are the shards that `datasets` sees, usually one file each. It is streamed: nothing of it is kept on disk, and
none of its code is run. `datasets` loads slowly, so it is imported only when such an input is read.
"""

import gc
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub

from megatron_bipe.data.hub import protect_token
from megatron_bipe.errors import DataError
from preprocessing.readers.lines import reading
from preprocessing.readers.parse import Keys, Parsed

ROWS_AT_ONCE = 1000
LONGEST_REASON = 400  # characters of a message from `datasets`


class HubDataset(NamedTuple):
    """Number of parts and current commit of a dataset on the Hub."""

    parts: int
    commit: str


def open_hub(name: str) -> HubDataset:
    """Look up a dataset.

    Raises:
        DataError: no network, an unknown dataset, configuration or split, no access, or data that needs a script.
    """
    _load(name, None)  # first, because its errors explain most
    with _hub_errors(name, _OPENING):
        commit = str(huggingface_hub.HfApi().dataset_info(_parse_name(name)[0]).sha)
    return HubDataset(int(_load(name, commit).num_shards), commit)


def read_hub(name: str, part: int, commit: str, keys: Keys) -> Iterator[Parsed]:
    """Yield the rows of one part of a dataset on the Hub, in order, in batches of about `BLOCK_BYTES` of text.

    `Parsed.read_bytes` is 1 for the last batch, else 0: it counts parts. The commit is that of `open_hub`, so that
    parts read at different times are of one version.

    Raises:
        DataError: as `open_hub` and `read_parquet`; or the dataset has no such part.
    """
    from preprocessing.readers.tables import parse_batches

    dataset = _load(name, commit)
    if part >= dataset.num_shards:
        raise DataError(
            f"Part {part} (from 0) was planned, but the dataset has {dataset.num_shards} parts: another version of "
            "`datasets` counts them differently",
            remedy="Start over with --overwrite",
            location=name,
        )
    shard = dataset.shard(num_shards=dataset.num_shards, index=part).with_format("arrow")
    yield from parse_batches(name, _hub_batches(name, shard.iter(ROWS_AT_ONCE), keys), keys)


def _hub_batches(name: str, tables: Iterator[Any], keys: Keys) -> Iterator[tuple[Any, int]]:
    from preprocessing.readers.tables import require_columns

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


def _load(name: str, commit: str | None) -> Any:
    with reading(name):
        from datasets import load_dataset
    protect_token()
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
