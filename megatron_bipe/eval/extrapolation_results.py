"""What an extrapolation run finds: every model on every subset at every length."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_bipe.eval.document_losses import DocumentLosses
from megatron_bipe.eval.paper import PAPER, PaperCurve, paper_subset


class Line(NamedTuple):
    """One model on one subset."""

    model: str
    """Its name, for people."""
    source: str
    """What it was loaded from."""
    encoding: str
    """As the configuration names it."""
    train_len_tokens: int
    """Window length of its training."""
    losses: tuple[DocumentLosses, ...]
    """At each length, ascending."""


class Subset(NamedTuple):
    """One dataset with all models on it."""

    name: str
    """As `subset_names` has it."""
    fingerprint: str
    """Of its manifest."""
    lines: tuple[Line, ...]
    """One a model."""

    @property
    def paper(self) -> tuple[PaperCurve, ...]:
        """What the paper has of this subset; nothing where its name says nothing of it."""
        return PAPER.get(paper_subset(self.name) or "", ())


def subset_names(folders: Sequence[Path]) -> list[str]:
    """Names of datasets: those of their folders, with as much of the path as tells all of them apart."""
    paths = [folder.resolve() for folder in folders]
    different = len(set(paths))
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == different:
            break
    return names
