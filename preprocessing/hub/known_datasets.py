"""Datasets with a short name, and the commands that process their files."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path


@dataclass(frozen=True)
class Known:
    """Dataset repository on the Hub, or part of one."""

    repo: str  # OWNER/NAME
    include: tuple[str, ...] = ()  # patterns of the files to fetch; empty: all
    next_commands: tuple[tuple[str, str], ...] = ()  # file pattern, and the command for such files in `{folder}`


_PREPROCESS = "python tools/preprocess.py --tokenizer TOKENIZER --workers 8 --input {folder}/"
_PILE_REPO = "monology/pile-uncopyrighted"
_PILE_NEXT = (
    ("train/*", _PREPROCESS + "train --output data/pile"),
    ("val.jsonl.zst", _PREPROCESS + "val.jsonl.zst --output data/pile-val"),
    # The evaluation subsets of the paper become the folders gutenberg-pg-19, arxiv and github.
    ("val.jsonl.zst", _PREPROCESS + "val.jsonl.zst --output data/pile-subsets --partition-by meta.pile_set_name"),
)

KNOWN = {
    "pile": Known(_PILE_REPO, (), _PILE_NEXT),
    "pile-val": Known(_PILE_REPO, ("val.jsonl.zst",), _PILE_NEXT),
}
DEFAULT = KNOWN["pile"].repo


def find_known(name: str) -> Known:
    """Return the dataset with this short name or repository; any other name is taken as a repository."""
    return next((known for short, known in KNOWN.items() if name in (short, known.repo)), Known(name))


def next_commands(known: Known, folder: Path, files: Iterable[str]) -> list[str]:
    """Return the commands that process these files of a folder."""
    there = list(files)
    wanted = [command for pattern, command in known.next_commands if any(fnmatchcase(file, pattern) for file in there)]
    return [command.format(folder=shlex.quote(str(folder))) for command in wanted]
