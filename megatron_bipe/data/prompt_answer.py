"""Datasets of prompts and answers: each sequence is one such example, and only its answer counts in the loss.

On disk an example is two documents, so that all readers of datasets can read it. Torch-free.
"""

from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.segments import sequence_ends
from megatron_bipe.data.shard_layout import damaged_error
from megatron_bipe.errors import DataError
from megatron_bipe.types import BoolArray, IntArray, TokenArray

PADDING = 0  # any id works: padding follows the answer, and labels that count do not attend to it


class PromptAnswerDataset(TokenDataset):
    """The examples of a folder, in the order of its manifest.

    Raises:
        DataError: there is no dataset, or it contains text.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        if self.manifest.examples is None:
            raise DataError(
                "the dataset contains text, not prompts and answers",
                remedy="Make one with tools/prepare_task.py",
                location=self.path,
            )

    @property
    def num_examples(self) -> int:
        return self.manifest.num_documents // 2

    def num_sequences(self, seq_len_tokens: int) -> int:
        """Return the number of examples, whatever the length; raise DataError if there are none."""
        del seq_len_tokens
        if not self.num_examples:
            remedy = "Make it again from more data"
            raise DataError("the dataset has no examples", remedy=remedy, location=self.path)
        return self.num_examples

    def sequences(self, indices_B: IntArray, seq_len_tokens: int) -> tuple[TokenArray, BoolArray]:
        """Read examples by number, each as prompt, answer and padding up to the sequence length.

        Returns:
            Tokens [B, seq_len + 1] in the storage dtype, and segment ends [B, seq_len] of all but the last token.

        Raises:
            DataError: an example is longer than a sequence, or holds ids outside the vocabulary.
        """
        bounds_B3 = self._example_bounds[self._checked(indices_B)]
        tokens = np.full((len(bounds_B3), seq_len_tokens + 1), PADDING, dtype=self.dtype)
        ends = np.zeros((len(bounds_B3), seq_len_tokens), dtype=np.bool_)
        for row, (start, _, stop) in enumerate(bounds_B3.tolist()):
            if stop - start > seq_len_tokens:
                raise DataError(
                    f"an example has {stop - start} tokens; the sequence length is {seq_len_tokens}",
                    remedy="Make the dataset again for this length",
                    location=self.path,
                )
            tokens[row, : stop - start] = self.tokens(start, stop)
            ends[row, : stop - start] = self.ends(start, stop)
        self._check_ids(tokens, bounds_B3[:, 0])
        return tokens, sequence_ends(ends, self.rule)

    def answers(self, indices_B: IntArray) -> IntArray:
        """Return the labels [first, stop) of each sequence that are tokens of its answer, int64 [B, 2]."""
        bounds_B3 = self._example_bounds[self._checked(indices_B)]
        return bounds_B3[:, 1:] - bounds_B3[:, :1] - 1  # label t is token t + 1

    @cached_property
    def _example_bounds(self) -> IntArray:
        """Start of each prompt, start of its answer, and end of the answer, int64 [examples, 3]."""
        bounds = self.document_bounds()
        if (bounds.size - 1) % 2:
            what = f"{bounds.size - 1} documents do not form pairs of prompt and answer"
            raise damaged_error(self.shards[-1].path("idx"), what)
        lengths_D = np.diff(bounds)
        if not lengths_D.all():
            example, part = divmod(int(np.argmin(lengths_D)), 2)
            what = f"the {('prompt', 'answer')[part]} of example {example} of {self.path} has no tokens"
            raise damaged_error(self.shards[-1].path("idx"), what)
        return np.stack([bounds[:-1:2], bounds[1::2], bounds[2::2]], axis=1)

    def _checked(self, indices_B: IntArray) -> IntArray:
        indices_B = np.asarray(indices_B, dtype=np.int64)
        if indices_B.size and not 0 <= indices_B.min() <= indices_B.max() < self.num_examples:
            what = f"sequences {indices_B.min()} to {indices_B.max()}"
            raise IndexError(f"{what} are not in a dataset of {self.num_examples}")
        return indices_B


def open_text(path: str | Path) -> TokenDataset:
    """Open a dataset that must contain text.

    Raises:
        DataError: the dataset contains examples, or `open_dataset` raises it.
    """
    dataset = TokenDataset(path)
    if dataset.manifest.examples is not None:
        raise DataError(
            f"the dataset contains prompts and answers of {dataset.manifest.examples.task}; text is needed here",
            remedy="Name a dataset made by tools/preprocess.py, or evaluate answers with tools/evaluate.py scrolls or "
            "arithmetic",
            location=dataset.path,
        )
    return dataset


def open_dataset(path: str | Path) -> TokenDataset:
    """Open a dataset of text or of examples, whichever the folder contains.

    Raises:
        DataError: there is no dataset, or a shard does not match the manifest.
    """
    dataset = TokenDataset(path)
    return dataset if dataset.manifest.examples is None else PromptAnswerDataset(path)
