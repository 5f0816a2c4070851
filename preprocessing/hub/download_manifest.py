"""The receipt of a download: which repository and commit a folder holds, and which of its files were found whole."""

from pathlib import Path

from pydantic import BaseModel, ValidationError

from megatron_bipe.errors import DataError
from megatron_bipe.io import PARTIAL_SUFFIX, unreadable, write_atomically
from preprocessing.hub.transfer import HubFile, disk_errors

RECEIPT_NAME = "download-receipt.json"
LOCK_NAME = ".download.lock"


def is_own(path: str) -> bool:
    """Whether a path in the folder is one of the download's own; a file of the repository cannot have it."""
    return path in (RECEIPT_NAME, LOCK_NAME) or path.endswith(PARTIAL_SUFFIX)


class Entry(BaseModel):
    """A file as it lay on the disk when its content had been checked."""

    checksum: str
    size_bytes: int
    modified_ns: int


class Receipt(BaseModel):
    """What a folder holds; one repository at one commit."""

    repo: str
    commit: str
    files: dict[str, Entry] = {}

    @classmethod
    def load(cls, folder: Path) -> "Receipt | None":
        """Read a folder's receipt; None if it has none.

        Raises:
            DataError: unreadable, or not as it was written.
        """
        path = folder / RECEIPT_NAME
        try:
            return cls.model_validate_json(path.read_bytes(), strict=True)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise unreadable(path, error) from error
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise DataError(
                f"The receipt is damaged: {problem['msg']} at {'.'.join(map(str, problem['loc'])) or 'the start'}",
                remedy="Remove it: the files beside it are then checked again, and kept where they are whole",
                location=path,
            ) from error

    def save(self, folder: Path) -> None:
        """Put the receipt into its folder, all of it or nothing."""
        with disk_errors(folder / RECEIPT_NAME):
            write_atomically(folder / RECEIPT_NAME, self.model_dump_json(indent=2).encode())

    def add(self, file: HubFile, path: Path) -> None:
        """Record a file whose content has just been found whole."""
        status = path.stat()
        entry = Entry(checksum=file.checksum, size_bytes=status.st_size, modified_ns=status.st_mtime_ns)
        self.files[file.path] = entry

    def vouches_for(self, file: HubFile, path: Path) -> bool:
        """Whether the file was found whole and has not been written to since."""
        entry, status = self.files.get(file.path), path.stat()
        return entry == Entry(checksum=file.checksum, size_bytes=status.st_size, modified_ns=status.st_mtime_ns)

    def doubt(self, file: HubFile) -> None:
        """Vouch no longer for a file that is not whole; that it came from here stays known."""
        if file.path in self.files:
            self.files[file.path].modified_ns = 0
