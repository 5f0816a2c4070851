"""The manifest of a dataset folder: its shards, the tokenizer and rule that made them, and their checksums."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_bipe.data.segments import SegmentRule
from megatron_bipe.data.shard_layout import FORMAT_VERSION, SUFFIXES, DtypeName, Suffix
from megatron_bipe.errors import DataError
from megatron_bipe.io import check_inner_name, unreadable_error, write_atomically

MANIFEST_NAME = "manifest.json"
DATASETS_NAME = "datasets.json"  # record of the datasets below an output that is split or partitioned
TOKENIZER_FOLDER = "tokenizer"  # the tokenizer's files, next to the manifest and in a run folder
WORK_FOLDER, JOB_NAME = "unfinished", "job.json"  # of a dataset that is being made: its folder, and a file that it has
Count = Annotated[int, Field(ge=0)]
InnerName = Annotated[str, AfterValidator(check_inner_name)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Base of all records in a manifest: immutable, and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class FileRecord(Record):
    """One file of a shard, at the time of writing."""

    bytes: Count
    sha256: Sha256
    """Checksum of the complete file, lower-case hex."""


class ShardRecord(Record):
    """One shard: three files of the same name."""

    name: Annotated[InnerName, Field(pattern=r"^[^/\\.][^/\\]*$")]
    """File name without the suffix; no folder, no leading dot."""
    documents: Count
    """Number of documents, each of which is one sequence of the index."""
    tokens: Count
    segments: Count
    """Number of tokens that close a segment. Tokens after the last of them are not counted as one."""
    text_bytes: Count | None
    """UTF-8 bytes of the raw text, for bits per byte; None if unknown."""
    files: dict[Suffix, FileRecord]

    @model_validator(mode="after")
    def _check(self) -> Self:
        missing = [suffix for suffix in SUFFIXES if suffix not in self.files]
        if missing:
            raise ValueError(f"shard {self.name} has no record of its {', '.join(missing)} file")
        if self.segments > self.tokens:
            raise ValueError(f"shard {self.name} has {self.segments} segments in {self.tokens} tokens")
        return self


class TokenizerRecord(Record):
    """The tokenizer that a dataset was made with."""

    name: str
    """Folder or Hub name. Informational, not compared."""
    fingerprint: Sha256
    """SHA-256 of the definition file (tokenizer.json, else tokenizer.model)."""
    vocab_size: Annotated[int, Field(gt=0)]
    """Number of ids; all tokens are smaller."""
    special_ids: dict[str, int]
    """Ids of the special tokens by role."""


class BlendMember(Record):
    """One dataset of a blend, as recorded with a model."""

    path: str
    """Folder of the dataset. Informational, not compared."""
    fingerprint: Sha256
    """Fingerprint of the dataset's manifest."""
    slots: Annotated[int, Field(gt=0)]
    """Number of slots of the blend's pattern."""


class PromptAnswerRecord(Record):
    """Properties of a dataset of examples, whose documents are alternately a prompt and its answer."""

    task: str
    """Name of the task. Informational, not compared."""
    seq_len_tokens: Annotated[int, Field(gt=1)]
    """Sequence length that the examples were made for: prompt and answer together have at most that many tokens."""


class DataRecord(Record):
    """Record of a model's training data, used to reject other data."""

    tokenizer: TokenizerRecord
    rule: SegmentRule
    fingerprint: Sha256
    """Fingerprint of the dataset's manifest; for a blend, a hash of its members' fingerprints and slots."""
    blend: tuple[BlendMember, ...] = ()
    """The datasets of a blend, in order; empty for a single dataset."""
    special_in_text: bool | None = None
    """See `Manifest.special_in_text`."""


def sum_if_known(values: Sequence[int | None]) -> int | None:
    """Return the sum of the values; None if any of them is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


class Manifest(Record):
    """Description of a dataset folder; `manifest.json` holds these fields and their fingerprint."""

    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)] = FORMAT_VERSION
    """Version of the folder's layout; newer ones are rejected."""
    tokenizer: TokenizerRecord
    rule: SegmentRule
    dtype: DtypeName
    """Type of the stored tokens."""
    shards: tuple[ShardRecord, ...]
    """Shards in the order of concatenation."""
    source: dict[str, Any]
    """Inputs and options that the dataset was made from. Informational, except for `special_in_text`."""
    examples: PromptAnswerRecord | None = None
    """Set if the documents are prompts and answers, None if they are text."""

    @model_validator(mode="after")
    def _check_names(self) -> "Manifest":
        names = [shard.name for shard in self.shards]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise ValueError(f"shards are listed more than once: {', '.join(repeated)}")
        return self

    @property
    def num_documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_segments(self) -> int:
        return sum(shard.segments for shard in self.shards)

    @property
    def text_bytes(self) -> int | None:
        """UTF-8 bytes of the raw text; None if unknown for any shard."""
        return sum_if_known([shard.text_bytes for shard in self.shards])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content: equal for equal data, independent of the machine and command that made it."""
        content = self._content()
        del content["format_version"], content["source"]
        del content["tokenizer"]["name"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def special_in_text(self) -> bool | None:
        """True if names of special tokens in the text became these tokens, False if plain text; None: not recorded."""
        recorded = self.source.get("special_in_text")
        return recorded if isinstance(recorded, bool) else None

    @property
    def record(self) -> DataRecord:
        """The record that a model trained on this dataset keeps."""
        return DataRecord(
            tokenizer=self.tokenizer,
            rule=self.rule,
            fingerprint=self.fingerprint,
            special_in_text=self.special_in_text,
        )

    def save(self, folder: Path) -> None:
        """Write `manifest.json` atomically. Call this last: it completes the dataset."""
        content = self._content() | {"fingerprint": self.fingerprint}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        # File names need not be valid Unicode, but JSON must be.
        write_atomically(Path(folder) / MANIFEST_NAME, text.encode(errors="replace") + b"\n")

    def _content(self) -> dict[str, Any]:
        """Return all fields, without `examples` for text, so that older fingerprints stay valid."""
        return self.model_dump(mode="json", exclude=None if self.examples else {"examples"})

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read and validate `manifest.json`, without reading the shards.

        Raises:
            DataError: it is missing, damaged, incomplete, changed after it was written, or of a newer format.
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
                remedy="Copy manifest.json again from its source, or make the dataset again",
                location=path,
            )
        return manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _no_dataset(path.parent) from error
    except OSError as error:
        raise unreadable_error(path, error) from error
    try:
        content = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _damaged(path, f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        offset = len(error.doc[: error.pos].encode())
        raise _damaged(path, f"invalid JSON at byte {offset} (line {error.lineno}): {error.msg}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number with thousands of digits
        raise _damaged(path, f"this JSON cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise _damaged(path, f"a JSON {type(content).__name__} at byte 0; the file must contain an object")
    return content


def _no_dataset(folder: Path) -> DataError:
    """Return the error for a missing manifest; it names the datasets directly inside the folder."""
    remedy = (
        "Name a finished dataset, or make one: "
        f"python tools/preprocess.py --input FILES... --tokenizer DIR --output {folder}"
    )
    prefix = str(folder).removesuffix(".bin").removesuffix(".idx")  # Megatron's tools take a pair without suffix
    indices = [Path(f"{prefix}.idx"), *sorted(folder.glob("*.idx"))]
    pairs = [path.stem for path in indices if path.is_file() and not path.with_suffix(".seg").exists()]
    if pairs:
        what = f"there is no {MANIFEST_NAME}, but a dataset of Megatron, {pairs[0]}.bin and .idx"
        command = f"python tools/inspect_data.py resegment {folder} --tokenizer DIR --segments RULE --output DIR2"
        remedy = f"Convert it with the tokenizer that made it: {command}"
    elif not folder.is_dir():
        what = "there is no such folder"
    else:
        inside = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST_NAME}"))
        listed = f"; datasets inside it: {', '.join(inside[:8])}" if inside else ""
        what = f"the folder has no {MANIFEST_NAME}, so it is not a dataset, or is unfinished{listed}"
    return DataError(what, remedy=remedy, location=folder)


def _damaged(path: Path, what: str) -> DataError:
    return DataError(what, remedy="Copy the manifest again, or make the dataset again", location=path)


def _invalid(path: Path, error: ValidationError) -> DataError:
    """Return one error that lists all invalid fields."""
    problems = []
    for item in error.errors(include_url=False, include_context=False):
        field = ".".join(str(part) for part in item["loc"])
        problems.append(f"field {field}: {item['msg']}" if field else item["msg"])
    return _damaged(path, "; ".join(problems))
