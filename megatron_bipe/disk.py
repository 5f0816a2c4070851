"""The little about disks that all who write and read must agree on."""

import hashlib
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes or a folder's entries; a rename alone may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
