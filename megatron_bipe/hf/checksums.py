"""SHA256SUMS of an exported folder: the checksums of its weights, as `sha256sum --check` reads them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from megatron_bipe.errors import CheckpointError

SUMS = "SHA256SUMS"


def write_checksums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the file; `sums` has lower-case hex by the name of each weights file."""
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), "utf-8")


def check_folder(folder: Path) -> None:
    """Compare all files of a model folder that have a checksum.

    Raises:
        CheckpointError: one is gone or is not as it was written, or the checksums cannot be read.
    """
    for name, digest in _sums(folder).items():
        _compare(folder / name, digest)


def check_file(path: Path) -> None:
    """Compare a file of a model folder with its checksum, where there is one: other tools write none.

    Raises:
        CheckpointError: it is not as it was written, or the checksums cannot be read.
    """
    digest = _sums(path.parent).get(path.name)
    if digest is not None:
        _compare(path, digest)


def _compare(path: Path, digest: str) -> None:
    try:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        what = f"the weights {path.name} cannot be read: {error.strerror}"
        raise CheckpointError(what, remedy="Copy or export the model again", location=path.parent) from error
    if found != digest:
        raise CheckpointError(
            f"the weights are not as they were exported: their SHA-256 is {found}, and {SUMS} says {digest}",
            remedy=f"Copy or export the model again; if they were changed on purpose, remove {SUMS}",
            location=path,
        )


def _sums(folder: Path) -> dict[str, str]:
    """Checksums by the names of files; none where there is no list."""
    listing = folder / SUMS
    if not listing.is_file():
        return {}
    try:
        return {name: digest for digest, name in (line.split("  ", 1) for line in listing.read_text().splitlines())}
    except ValueError as error:
        raise CheckpointError(
            "this is no list of checksums", remedy="Export the model again, or remove the file", location=listing
        ) from error
