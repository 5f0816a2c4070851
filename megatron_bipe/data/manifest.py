"""The manifest of a dataset folder: what the shards are, what made them, and how to tell."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.data.shard_layout import FORMAT_VERSION, SUFFIXES, Suffix
from megatron_bipe.errors import DataError
from megatron_bipe.io import unreadable, write_atomically

MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"  # beside the manifest, and in a run folder: the tokenizer's own files
Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Base of everything that stands in a manifest: immutable, and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class FileRecord(Record):
    """One file of a shard, as it was when it was written."""

    bytes: Count
    """Length of the file."""
    sha256: Sha256
    """Checksum of all its bytes, lower-case hex."""


class ShardRecord(Record):
    """One shard: three files of the same name."""

    name: Annotated[str, Field(pattern=r"^[^/\\.][^/\\]*$")]
    """File name without the suffix; no folder in it, no leading dot."""
    documents: Count
    """Documents, which is also sequences: one each."""
    tokens: Count
    """Tokens of all documents."""
    segments: Count
    """Tokens that close a segment. What follows the last of them is not counted."""
    text_bytes: Count
    """UTF-8 bytes of the raw text, for bits per byte."""
    files: dict[Suffix, FileRecord]
    """`bin`, `idx` and `seg`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        missing = [suffix for suffix in SUFFIXES if suffix not in self.files]
        if missing:
            raise ValueError(f"shard {self.name} has no record of its {', '.join(missing)} file")
        if self.segments > self.tokens:
            raise ValueError(f"shard {self.name} has {self.segments} segments in {self.tokens} tokens")
        return self


class TokenizerRecord(Record):
    """The tokenizer the data was made with."""

    name: str
    """For people: folder or Hub name. Not compared."""
    fingerprint: Sha256
    """SHA-256 of its definition file (tokenizer.json, else tokenizer.model)."""
    vocab_size: Annotated[int, Field(gt=0)]
    """Number of ids; all tokens are below it."""
    special_ids: dict[str, int]
    """Ids of the special tokens by name."""


class BlendMember(Record):
    """One dataset of a blend, as a model remembers it."""

    path: str
    """For people: its folder. Not compared."""
    fingerprint: Sha256
    """Of the dataset's manifest."""
    slots: Annotated[int, Field(gt=0)]
    """Its share: slots of the blend's pattern."""


class PromptAnswerRecord(Record):
    """Of a dataset of examples: its documents are, in turn, a prompt and the answer to it."""

    task: str
    """For people: what the examples are of."""
    seq_len_tokens: Annotated[int, Field(gt=1)]
    """Most tokens of prompt and answer together: the window they were made for."""


class DataRecord(Record):
    """What a model remembers of the data it was trained on: enough to refuse other data."""

    tokenizer: TokenizerRecord
    """What its token ids mean."""
    rule: SegmentRule
    """Where its segments end."""
    fingerprint: Sha256
    """Of the dataset's manifest; of a blend, over the fingerprints and slots of its members."""
    blend: tuple[BlendMember, ...] = ()
    """The datasets in their order, where they are several."""


class Manifest(Record):
    """All that is known of a dataset folder; `manifest.json` is this and its fingerprint."""

    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)] = FORMAT_VERSION
    """Of the folder's layout; a newer one is refused."""
    tokenizer: TokenizerRecord
    """What the token ids mean."""
    rule: SegmentRule
    """What the segment-end bits mean."""
    dtype: Literal["uint16", "int32"]
    """Type of a stored token."""
    shards: tuple[ShardRecord, ...]
    """In the order in which they are concatenated."""
    source: dict[str, Any]
    """What the dataset was made from and how; for people and `resume`, not compared."""
    examples: PromptAnswerRecord | None = None
    """None: the documents are text."""

    @model_validator(mode="after")
    def _check_names(self) -> "Manifest":
        names = [shard.name for shard in self.shards]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise ValueError(f"shards are listed more than once: {', '.join(repeated)}")
        return self

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_segments(self) -> int:
        """Segment ends of all shards."""
        return sum(shard.segments for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the raw text of all shards."""
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what the data is: equal for equal contents, whatever machine and command made them."""
        content = self._content()
        del content["format_version"], content["source"]
        del content["tokenizer"]["name"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def record(self) -> DataRecord:
        """What a model trained on this dataset remembers of it."""
        return DataRecord(tokenizer=self.tokenizer, rule=self.rule, fingerprint=self.fingerprint)

    def save(self, folder: Path) -> None:
        """Write `manifest.json` in one step; to be called last, since it makes the folder a dataset."""
        content = self._content() | {"fingerprint": self.fingerprint}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        # Names of files need not be Unicode; JSON must be.
        write_atomically(Path(folder) / MANIFEST_NAME, text.encode(errors="replace") + b"\n")

    def _content(self) -> dict[str, Any]:
        """All fields; of a dataset of text those that it had before there were examples."""
        return self.model_dump(mode="json", exclude=None if self.examples else {"examples"})

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read and check `manifest.json`; the shards are not looked at.

        Raises:
            DataError: missing, damaged, incomplete, changed since it was written, or of a newer format.
        """
        path = Path(folder) / MANIFEST_NAME
        content = _read_json(path)
        version = content.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise DataError(
                f"field format_version is {version}; this version of megatron_bipe reads up to {FORMAT_VERSION}",
                remedy="Update megatron_bipe, or make the dataset again with this version",
                location=path,
            )
        recorded = content.pop("fingerprint", None)
        try:
            manifest = cls.model_validate_json(json.dumps(content), strict=True)
        except ValidationError as error:
            raise _invalid(path, error) from error
        if recorded != manifest.fingerprint:
            raise DataError(
                f"field fingerprint is {recorded}, but the other fields give {manifest.fingerprint}: the manifest "
                "was changed after it was written",
                remedy="Copy manifest.json again from where it was made, or make the dataset again",
                location=path,
            )
        return manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise _no_dataset(path.parent) from error
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        content = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _damaged(path, f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        offset = len(error.doc[: error.pos].encode())
        raise _damaged(path, f"no JSON at byte {offset} (line {error.lineno}): {error.msg}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise _damaged(path, f"this JSON cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise _damaged(path, f"a JSON {type(content).__name__} at byte 0 where an object should be")
    return content


def _no_dataset(folder: Path) -> DataError:
    """Missing manifest: say whether the folder is, and which datasets lie right inside it."""
    if not folder.is_dir():
        what = "there is no such folder"
    else:
        inside = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST_NAME}"))
        listed = f"; datasets inside it: {', '.join(inside[:8])}" if inside else ""
        what = f"the folder has no {MANIFEST_NAME}, so it is no dataset, or an unfinished one{listed}"
    command = f"python tools/preprocess.py --input FILES... --tokenizer DIR --output {folder}"
    return DataError(what, remedy=f"Name a finished dataset, or make one: {command}", location=folder)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(what, remedy="Copy the manifest again, or make the dataset again", location=path)


def _invalid(path: Path, error: ValidationError) -> DataError:
    """All wrong fields in one message."""
    problems = []
    for item in error.errors(include_url=False, include_context=False):
        field = ".".join(str(part) for part in item["loc"])
        problems.append(f"field {field}: {item['msg']}" if field else item["msg"])
    return _damaged(path, "; ".join(problems))
