"""Discovery of the datasets in a folder, and of the tokenizer of a dataset."""

from pathlib import Path

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import MANIFEST_NAME, TOKENIZER_FOLDER
from megatron_bipe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bipe.errors import DataError

MAX_FOLDERS_IN_MESSAGE = 8  # maximum number of folders named in one message


def find_datasets(folder: Path) -> list[Path]:
    """Return the folder itself if it has a manifest, else the datasets one or two levels below it, sorted by name.

    The latter is the layout of split or partitioned output. A folder without any dataset is returned unchanged, since
    opening it gives the clearest error.

    Raises:
        DataError: subfolders hold shards but no manifest, so that some datasets are unfinished.
    """
    folder = Path(folder)
    if (folder / MANIFEST_NAME).exists():
        return [folder]
    below = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)) if path.is_dir()]
    found = [path for path in below if (path / MANIFEST_NAME).exists()]
    unfinished = [path for path in below if path not in found and next(path.glob("*.seg"), None)]
    if unfinished:
        names = ", ".join(str(path.relative_to(folder)) for path in unfinished[:MAX_FOLDERS_IN_MESSAGE])
        more = ", ..." if len(unfinished) > MAX_FOLDERS_IN_MESSAGE else ""
        raise DataError(
            f"{len(unfinished)} subfolders hold shards but no {MANIFEST_NAME}, so they are unfinished: {names}{more}",
            remedy="Finish them with the command that created them, copy the complete folder, or name a finished one",
            location=folder,
        )
    return found or [folder]


def open_tokenizer(dataset: TokenDataset) -> Tokenizer:
    """Load the tokenizer in a dataset's folder.

    Raises:
        DataError: it is missing, or is not the one that the dataset was made with.
    """
    folder = dataset.path / TOKENIZER_FOLDER
    if not folder.is_dir():  # else the name would be looked up on the Hub
        raise DataError("the tokenizer's files are missing", remedy="Copy the complete dataset", location=folder)
    tokenizer = load_tokenizer(folder)
    dataset.check_tokenizer(tokenizer.fingerprint, folder)
    return tokenizer
