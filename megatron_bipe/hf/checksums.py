"""SHA256SUMS of an exported folder: checksums of its weight files in the format of `sha256sum --check`."""

from collections.abc import Mapping
from pathlib import Path

from megatron_bipe.errors import CheckpointError
from megatron_bipe.io import sha256_of

SUMS = "SHA256SUMS"


def write_checksums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write SHA256SUMS; `sums` maps each weight file's name to its lower-case hex digest."""
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), "utf-8")


def check_folder(folder: Path) -> None:
    """Verify all files of a model folder that have a checksum.

    Raises:
        CheckpointError: a file is missing or differs from its checksum, or the checksums cannot be read.
    """
    for name, digest in _read_checksums(folder).items():
        _verify(folder / name, digest)


def check_file(path: Path) -> None:
    """Verify a file of a model folder if it has a checksum; other tools do not write any.

    Raises:
        CheckpointError: the file differs from its checksum, or the checksums cannot be read.
    """
    digest = _read_checksums(path.parent).get(path.name)
    if digest is not None:
        _verify(path, digest)


def _verify(path: Path, digest: str) -> None:
    try:
        found = sha256_of(path)
    except OSError as error:
        what = f"the weights {path.name} cannot be read: {error.strerror}"
        raise CheckpointError(what, remedy="Copy or export the model again", location=path.parent) from error
    if found != digest:
        raise CheckpointError(
            f"the weights differ from the exported ones: their SHA-256 is {found}, {SUMS} lists {digest}",
            remedy=f"Copy or export the model again; if they were changed on purpose, remove {SUMS}",
            location=path,
        )


def _read_checksums(folder: Path) -> dict[str, str]:
    """Return the checksums by file name; empty if the folder has none."""
    listing = folder / SUMS
    if not listing.is_file():
        return {}
    try:
        return {name: digest for digest, name in (line.split("  ", 1) for line in listing.read_text().splitlines())}
    except ValueError as error:
        raise CheckpointError(
            "the file is not a list of checksums", remedy="Export the model again, or remove the file", location=listing
        ) from error
