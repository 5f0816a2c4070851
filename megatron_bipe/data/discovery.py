"""Which datasets a folder holds, and the tokenizer beside one: where every look at a dataset starts."""

from pathlib import Path

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import MANIFEST_NAME, TOKENIZER_FOLDER
from megatron_bipe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bipe.errors import DataError

FOLDERS_NAMED = 8  # in one message


def find_datasets(folder: Path) -> list[Path]:
    """The folder itself if it has a manifest, else the datasets one or two levels below it, by name.

    That is what a split or partitioned output is. A folder without any is returned as it is: opening it says so best.

    Raises:
        DataError: shards without a manifest lie below it: some of the datasets are unfinished.
    """
    folder = Path(folder)
    if (folder / MANIFEST_NAME).exists():
        return [folder]
    below = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)) if path.is_dir()]
    found = [path for path in below if (path / MANIFEST_NAME).exists()]
    unfinished = [path for path in below if path not in found and next(path.glob("*.seg"), None)]
    if unfinished:
        names = ", ".join(str(path.relative_to(folder)) for path in unfinished[:FOLDERS_NAMED])
        more = ", ..." if len(unfinished) > FOLDERS_NAMED else ""
        raise DataError(
            f"{len(unfinished)} folders in it hold shards but no {MANIFEST_NAME}, so are unfinished: {names}{more}",
            remedy="Finish them with the command that began, copy all again in full, or name one that is finished",
            location=folder,
        )
    return found or [folder]


def open_tokenizer(dataset: TokenDataset) -> Tokenizer:
    """The tokenizer beside the shards.

    Raises:
        DataError: it is not there, or not the one that the data was made with.
    """
    folder = dataset.path / TOKENIZER_FOLDER
    if not folder.is_dir():  # else the name would be looked for on the Hub
        raise DataError("the tokenizer's files are missing", remedy="Copy the dataset again in full", location=folder)
    tokenizer = load_tokenizer(folder)
    dataset.check_tokenizer(tokenizer.fingerprint, folder)
    return tokenizer
