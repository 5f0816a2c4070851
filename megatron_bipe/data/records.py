"""What is known about a shard besides its bytes: the part of the manifest that `format.py` makes."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Suffix = Literal["bin", "idx", "seg"]
SUFFIXES: tuple[Suffix, ...] = ("bin", "idx", "seg")


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
