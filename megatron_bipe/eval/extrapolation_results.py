"""Results of an extrapolation run: every model on every subset at every length."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_bipe.eval.document_losses import DocumentLosses
from megatron_bipe.eval.paper import PAPER, PaperCurve, paper_subset


class Line(NamedTuple):
    """Results of one model on one subset."""

    model: str
    source: str
    encoding: str
    train_len_tokens: int
    losses: tuple[DocumentLosses, ...]
    """Losses at each length, ascending."""


class Subset(NamedTuple):
    """Results of all models on one dataset."""

    name: str
    """Name from `subset_names`."""
    fingerprint: str
    lines: tuple[Line, ...]

    @property
    def paper(self) -> tuple[PaperCurve, ...]:
        """The paper's curves for this subset; empty if its name does not identify one."""
        return PAPER.get(paper_subset(self.name) or "", ())


def subset_names(folders: Sequence[Path]) -> list[str]:
    """Return dataset names: folder names with as many parent folders as make all of them distinct."""
    paths = [folder.resolve() for folder in folders]
    different = len(set(paths))
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == different:
            break
    return names
