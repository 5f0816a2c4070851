"""The one thing about disks that all who write must agree on."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes or a folder's entries; a rename alone may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
