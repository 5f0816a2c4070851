"""Receipt of a download: the repository and commit that a folder holds, and the files that were verified."""

from pathlib import Path

from pydantic import BaseModel, ValidationError

from megatron_bipe.errors import DataError
from megatron_bipe.io import PARTIAL_SUFFIX, unreadable_error, write_atomically
from preprocessing.hub.transfer import HubFile, disk_errors

RECEIPT_NAME = "download-receipt.json"
LOCK_NAME = ".download.lock"


def is_own(path: str) -> bool:
    """Return True if a path in the folder is reserved for the download; no file of the repository may have it."""
    return path in (RECEIPT_NAME, LOCK_NAME) or path.endswith(PARTIAL_SUFFIX)


class Entry(BaseModel):
    """State of a file on disk when its content was verified."""

    checksum: str
    size_bytes: int
    modified_ns: int


class Receipt(BaseModel):
    """Contents of a folder: one repository at one commit."""

    repo: str
    commit: str
    files: dict[str, Entry] = {}

    @classmethod
    def load(cls, folder: Path) -> "Receipt | None":
        """Read a folder's receipt; return None if it has none.

        Raises:
            DataError: the receipt is unreadable or damaged.
        """
        path = folder / RECEIPT_NAME
        try:
            return cls.model_validate_json(path.read_bytes(), strict=True)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise unreadable_error(path, error) from error
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise DataError(
                f"The receipt is damaged: {problem['msg']} at {'.'.join(map(str, problem['loc'])) or 'the start'}",
                remedy="Remove it: the files in this folder are then checked again, and kept if they are complete",
                location=path,
            ) from error

    def save(self, folder: Path) -> None:
        """Write the receipt to its folder atomically."""
        with disk_errors(folder / RECEIPT_NAME):
            write_atomically(folder / RECEIPT_NAME, self.model_dump_json(indent=2).encode())

    def add(self, file: HubFile, path: Path) -> None:
        """Record a file whose content was just verified."""
        status = path.stat()
        entry = Entry(checksum=file.checksum, size_bytes=status.st_size, modified_ns=status.st_mtime_ns)
        self.files[file.path] = entry

    def is_verified(self, file: HubFile, path: Path) -> bool:
        """Return True if the file was verified and has not been written to since."""
        entry, status = self.files.get(file.path), path.stat()
        return entry == Entry(checksum=file.checksum, size_bytes=status.st_size, modified_ns=status.st_mtime_ns)

    def mark_unverified(self, file: HubFile) -> None:
        """Mark a damaged file as not verified; it stays listed as a file of this download."""
        if file.path in self.files:
            self.files[file.path].modified_ns = 0
