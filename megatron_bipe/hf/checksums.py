"""Checksums of a model folder: SHA256SUMS lists every file that loading reads, as `sha256sum --check` expects.

The model card is not listed, since it may be edited. Folders of other tools have no checksums, and those of earlier
versions only list weights: what is then read without verification is named in a warning.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_bipe.errors import CheckpointError
from megatron_bipe.io import check_inner_name, sha256_of, sha256_of_all

SUMS = "SHA256SUMS"
_LOADED = {".json", ".safetensors", ".bin", ".model", ".py", ".jinja", ".txt"}  # suffixes of files that loaders read
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_log = logging.getLogger(__name__)


def write_checksums(folder: Path, known: Mapping[str, str]) -> None:
    """Write SHA256SUMS for all files that loading reads; `known` has the digests computed while files were written."""
    sums = {name: known.get(name) or sha256_of(folder / name) for name in _loaded_files(folder)}
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), "utf-8")


def check_folder(folder: Path) -> None:
    """Verify all files of a model folder that are listed or that loading may read.

    Raises:
        CheckpointError: a file is missing or differs from its checksum, or the checksums cannot be read.
    """
    check_files(folder, [*_read_checksums(folder), *_loaded_files(folder)])


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Verify these files of a model folder, and warn about those without a checksum.

    Raises:
        CheckpointError: a file is missing or differs from its checksum, or the checksums cannot be read.
    """
    names, sums = dict.fromkeys(names), _read_checksums(folder)
    listed = [name for name in names if name in sums]
    hashes = sha256_of_all(folder / name for name in listed)
    for name in listed:
        try:
            found = next(hashes)
        except OSError as error:
            what = f"the file {name} cannot be read: {error.strerror}"
            raise CheckpointError(what, remedy="Copy or export the model again", location=folder) from error
        if found != sums[name]:
            raise CheckpointError(
                f"the file differs from the exported one: its SHA-256 is {found}, {SUMS} lists {sums[name]}",
                remedy=f"Copy or export the model again; if it was changed on purpose, remove {SUMS}",
                location=folder / name,
            )
    if unlisted := [name for name in names if name not in sums]:
        _log.warning("%s: not verified, since %s has no checksum of them: %s", folder, SUMS, ", ".join(unlisted))


def _loaded_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in _LOADED)


def _read_checksums(folder: Path) -> dict[str, str]:
    """Return the checksums by file name; empty if the folder has none."""
    listing = folder / SUMS
    if not listing.is_file():
        return {}
    try:
        return dict(_parse(line) for line in listing.read_text("utf-8").splitlines())
    except ValueError as error:
        raise CheckpointError(
            f"the file is not a list of checksums: {error}",
            remedy="Export the model again, or remove the file",
            location=listing,
        ) from error


def _parse(line: str) -> tuple[str, str]:
    """Return the name and the digest in a line; raise ValueError for anything else."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"line {line[:80]!r}")
    return check_inner_name(match[2]), match[1].lower()
