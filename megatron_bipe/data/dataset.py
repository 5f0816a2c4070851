"""A dataset folder as one concatenated array of tokens, the sequences cut from it, and the search for dataset folders.

This module does not import torch.
"""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from megatron_bipe.data.manifest import MANIFEST_NAME, TOKENIZER_FOLDER, Manifest, TokenizerRecord
from megatron_bipe.data.segments import SegmentRule, sequence_ends
from megatron_bipe.data.shard import Shard, TokenSource
from megatron_bipe.data.shard_layout import SUFFIXES, damaged_error, packed_bytes, shard_path
from megatron_bipe.data.tokenizer import COMPANIONS, Tokenizer, load_tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.io import allow_open_files, partial_path
from megatron_bipe.types import BoolArray, IntArray, TokenArray

FILES_PER_SHARD = 2  # files per shard that stay open: tokens and segment ends


class TokenDataset:
    """The documents of a folder, concatenated in the order of its manifest.

    Opening costs a few reads per shard, whatever its size. Reading a sequence reads only its own bytes.

    Raises:
        DataError: there is no dataset, or a shard does not match the manifest.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        self.dtype = np.dtype(self.manifest.dtype)
        allow_open_files(FILES_PER_SHARD * len(self.manifest.shards))
        self.shards = [Shard(self.path, record) for record in self.manifest.shards]
        for shard in self.shards:
            if shard.dtype != self.dtype:
                what = f"field dtype code (byte 17) means {shard.dtype.name}; the manifest says {self.dtype.name}"
                raise damaged_error(shard.path("idx"), what)
        counts = [shard.num_tokens for shard in self.shards]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)  # [shards + 1]

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        """Support pickling for other processes: they reopen the files."""
        return type(self), (self.path,)

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    @property
    def rule(self) -> SegmentRule:
        return self.manifest.rule

    def check_rule(self, expected: SegmentRule, location: str | Path) -> None:
        """Raise DataError unless the dataset has the expected segment rule; other names for the same ids are accepted.

        Args:
            expected: rule of the model or run.
            location: source of `expected`, for the message.
        """
        if (self.rule.token_ids, self.rule.fixed_length) != (expected.token_ids, expected.fixed_length):
            raise DataError(
                f"the dataset {self.path} was made with segment rule {self.rule.described}, but {expected.described} "
                "is expected here: the same tokens would fall into other segments",
                remedy=f"Make it again with --segments '{expected.spec}', or with tools/inspect_data.py resegment",
                location=location,
            )

    def check_tokenizer(self, expected_fingerprint: str, location: str | Path) -> None:
        """Raise DataError unless the dataset was made with the expected tokenizer.

        Args:
            expected_fingerprint: fingerprint of the tokenizer of the model or run.
            location: source of `expected_fingerprint`, for the message.
        """
        own = self.manifest.tokenizer
        if own.fingerprint != expected_fingerprint:
            raise DataError(
                f"the dataset {self.path} was made with tokenizer {own.name} (fingerprint {own.fingerprint}), but "
                f"{expected_fingerprint} is expected here: the same ids would stand for other text",
                remedy="Make the dataset again with the expected tokenizer, or use the model that belongs to it",
                location=location,
            )

    def check_special_in_text(self, expected: bool | None, location: str | Path) -> None:
        """Raise DataError if names of special tokens in the text became other ids than expected; None: not recorded.

        Args:
            expected: `special_in_text` of the model or run.
            location: source of `expected`, for the message.
        """
        own = self.manifest.special_in_text
        if special_in_text_differs(own, expected):
            raise DataError(
                f"the dataset {self.path} was made {describe_special_in_text(own)}, but {location} "
                f"{describe_special_in_text(expected)}: the name of a special token in a text has other ids in each",
                remedy="Make the dataset again with the same choice of --special-in-text, or use another one",
                location=location,
            )

    def tokens(self, start: int, stop: int) -> TokenArray:
        """Read tokens [start, stop) in the storage dtype."""
        parts = [self.shards[shard].tokens(low, high) for shard, low, high in self._pieces(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, self.dtype), *parts])

    def ends(self, start: int, stop: int) -> BoolArray:
        """Read the segment ends of tokens [start, stop) as stored; `sequence_ends` adapts them to a sequence."""
        parts = [self.shards[shard].ends(low, high) for shard, low, high in self._pieces(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.bool_), *parts])

    def document_bounds(self) -> IntArray:
        """Read from all .idx files the first token of each document and the end of the last, int64 [documents + 1]."""
        bounds = [shard.document_bounds[1:] + start for shard, start in zip(self.shards, self._starts, strict=False)]
        return np.concatenate([np.zeros(1, np.int64), *bounds])

    def num_sequences(self, seq_len_tokens: int) -> int:
        """Return the number of sequences in an epoch; raise DataError if the dataset has none."""
        if seq_len_tokens < 1:
            raise ValueError(f"seq_len_tokens is {seq_len_tokens}; it must be at least 1")
        if self.num_tokens <= seq_len_tokens:
            raise DataError(
                f"the dataset has {self.num_tokens} tokens; a sequence of {seq_len_tokens} and its last label need "
                f"{seq_len_tokens + 1}",
                remedy="Use a shorter train.seq_len_tokens, or more text",
                location=self.path,
            )
        return (self.num_tokens - 1) // seq_len_tokens

    def sequences(self, indices_B: IntArray, seq_len_tokens: int) -> tuple[TokenArray, BoolArray]:
        """Read sequences by number: sequence i is tokens [i * seq_len, i * seq_len + seq_len + 1).

        Returns:
            Tokens [B, seq_len + 1] in the storage dtype, and segment ends [B, seq_len] of all but the last token.

        Raises:
            DataError: the dataset is shorter than a sequence, or holds ids outside its vocabulary.
        """
        indices_B = np.asarray(indices_B, dtype=np.int64)
        count = self.num_sequences(seq_len_tokens)
        if indices_B.size and not 0 <= indices_B.min() <= indices_B.max() < count:
            raise IndexError(f"sequences {indices_B.min()} to {indices_B.max()} are not in a dataset of {count}")
        starts_B = indices_B * seq_len_tokens
        shard_B = np.searchsorted(self._starts, starts_B, side="right") - 1
        within_B = starts_B - self._starts[shard_B]
        crosses_B = starts_B + seq_len_tokens + 1 > self._starts[shard_B + 1]
        tokens = np.empty((indices_B.size, seq_len_tokens + 1), dtype=self.dtype)
        # The bits of a sequence may start inside a byte, so they can extend over one byte more than they fill.
        packed = np.zeros((indices_B.size, seq_len_tokens // 8 + 2), dtype=np.uint8)
        locations = zip(shard_B.tolist(), within_B.tolist(), crosses_B.tolist(), strict=True)
        for row, (shard, within, crosses) in enumerate(locations):
            if not crosses:
                self.shards[shard].read_tokens(within, tokens[row])
                last = packed_bytes(within + seq_len_tokens)
                self.shards[shard].read_packed_ends(within // 8, packed[row, : last - within // 8])
        ends = _unpack(packed, within_B % 8, seq_len_tokens)
        for row in np.flatnonzero(crosses_B).tolist():
            start = int(starts_B[row])
            tokens[row] = self.tokens(start, start + seq_len_tokens + 1)
            ends[row] = self.ends(start, start + seq_len_tokens)
        self._check_ids(tokens, starts_B)
        return tokens, sequence_ends(ends, self.rule)

    def answers(self, indices_B: IntArray) -> IntArray | None:
        """Return the range [first, stop) of labels in the loss for each sequence, int64 [B, 2]; None: all labels."""
        del indices_B
        return None

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Split tokens [start, stop) by shard: (shard, start, stop) within each."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) are not in a dataset of {self.num_tokens}")
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        for shard in range(first, len(self.shards)):
            low, high = int(self._starts[shard]), int(self._starts[shard + 1])
            if low >= stop:
                break
            pieces.append((shard, max(start, low) - low, min(stop, high) - low))
        return pieces

    def _check_ids(self, tokens: TokenArray, starts_B: IntArray) -> None:
        """Reject ids that only a damaged file can hold; looking them up would return garbage or crash the device."""
        vocab_size = self.manifest.tokenizer.vocab_size
        # Negative ids are large as unsigned numbers, so one bound is enough.
        unsigned = tokens.view(f"u{tokens.dtype.itemsize}")
        if tokens.size and int(unsigned.max()) >= vocab_size:
            row, column = np.argwhere(unsigned >= vocab_size)[0].tolist()
            [(shard, position, _)] = self._pieces(int(starts_B[row]) + column, int(starts_B[row]) + column + 1)
            raise token_out_of_range_error(self.shards[shard], position, int(tokens[row, column]), vocab_size)


def special_in_text_differs(one: bool | None, other: bool | None) -> bool:
    """Return True if both are recorded and differ; None: not recorded."""
    return None not in (one, other) and one != other


def describe_special_in_text(special_in_text: bool | None) -> str:
    return f"with{'' if special_in_text else 'out'} --special-in-text"


def token_out_of_range_error(shard: TokenSource, position: int, token: int, vocab_size: int) -> DataError:
    """Return the error for a token outside the vocabulary, at `position` of a shard."""
    what = f"token {position} (byte {position * shard.dtype.itemsize}) is {token}; the vocabulary has {vocab_size} ids"
    return damaged_error(shard.path("bin"), what)


def _unpack(packed_BK: npt.NDArray[np.uint8], shift_B: IntArray, count: int) -> BoolArray:
    """Unpack bits [B, count] that start `shift_B` bits into the first byte of each row."""
    shift = shift_B.astype(np.uint8)[:, None]
    # If 8 - shift is 8, the next byte contributes nothing: uint8 << 8 is 0.
    low, high = packed_BK[:, :-1] >> shift, (packed_BK[:, 1:].astype(np.uint16) << (8 - shift)).astype(np.uint8)
    return np.unpackbits(low | high, axis=1, count=count, bitorder="little").view(np.bool_)


def dataset_files(folder: Path, shard_names: Iterable[str]) -> set[Path]:
    """Return the paths of a dataset's files: its manifest, those of its shards, and those of its tokenizer.

    Only these may be deleted or replaced with the dataset. They may be missing.
    """
    manifest, tokenizer = folder / MANIFEST_NAME, folder / TOKENIZER_FOLDER
    return {
        *(manifest, partial_path(manifest)),
        *(shard_path(folder, name, suffix) for name in shard_names for suffix in SUFFIXES),
        *(tokenizer / name for name in COMPANIONS),
    }


def foreign_paths(folder: Path, own: Collection[Path]) -> Iterator[Path]:
    """Yield the files below a folder that are not in `own`, and empty folders that hold none of these, in order.

    Links are never own.
    """
    parents = {parent for path in own for parent in path.parents}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path not in parents and not any(path.iterdir()):
                yield path
            yield from foreign_paths(path, own)
        elif path.is_symlink() or path not in own:
            yield path


MAX_FOLDERS_IN_MESSAGE = 8  # maximum number of folders named in one message


def find_datasets(folder: Path) -> list[Path]:
    """Return the folder itself if it has a manifest, else the datasets one or two levels below it, sorted by name.

    The latter is the layout of split or partitioned output. A folder without any dataset is returned unchanged, since
    opening it gives the clearest error.

    Raises:
        DataError: subfolders hold shards but no manifest, so that some datasets are unfinished.
    """
    folder = Path(folder)
    if (folder / MANIFEST_NAME).exists():
        return [folder]
    below = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)) if path.is_dir()]
    found = [path for path in below if (path / MANIFEST_NAME).exists()]
    unfinished = [path for path in below if path not in found and next(path.glob("*.seg"), None)]
    if unfinished:
        names = ", ".join(str(path.relative_to(folder)) for path in unfinished[:MAX_FOLDERS_IN_MESSAGE])
        more = ", ..." if len(unfinished) > MAX_FOLDERS_IN_MESSAGE else ""
        raise DataError(
            f"{len(unfinished)} subfolders hold shards but no {MANIFEST_NAME}, so they are unfinished: {names}{more}",
            remedy="Finish them with the command that created them, copy the complete folder, or name a finished one",
            location=folder,
        )
    return found or [folder]


def open_tokenizer(dataset: TokenDataset) -> Tokenizer:
    """Load the tokenizer in a dataset's folder.

    Raises:
        DataError: it is missing, or is not the one that the dataset was made with.
    """
    folder = dataset.path / TOKENIZER_FOLDER
    if not folder.is_dir():  # else the name would be looked up on the Hub
        raise DataError("the tokenizer's files are missing", remedy="Copy the complete dataset", location=folder)
    tokenizer = load_tokenizer(folder, bool(dataset.manifest.special_in_text))
    check_recorded_tokenizer(tokenizer, dataset.manifest.tokenizer, dataset.path / MANIFEST_NAME)
    return tokenizer


def check_recorded_tokenizer(tokenizer: Tokenizer, record: TokenizerRecord, location: Path) -> None:
    """Raise DataError unless a tokenizer's files define the ids that were recorded when the data was made.

    Args:
        tokenizer: the tokenizer as loaded.
        record: its record.
        location: file with the record, for the message.
    """
    found = {"fingerprint": tokenizer.fingerprint, "special_ids": tokenizer.special_ids}
    for key, value in found.items():
        if value != (recorded := getattr(record, key)):
            raise DataError(
                f"the tokenizer's {key} is {value}; {location.name} records {recorded}, of {record.name}: these files "
                "are not those with which the data was made",
                remedy="Copy the folder with the tokenizer's files again",
                location=tokenizer.definition.parent,
            )
