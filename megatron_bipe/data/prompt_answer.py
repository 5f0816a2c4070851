"""Datasets of examples, a prompt and its answer each: a window is one of them, and the answer alone is learned.

On disk an example is two documents, so that all that reads datasets reads these. Torch-free.
"""

from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.segments import sequence_ends
from megatron_bipe.data.shard_layout import damaged
from megatron_bipe.errors import DataError
from megatron_bipe.types import BoolArray, IntArray, TokenArray

PADDING = 0  # after an answer, where no attention of what counts comes: any id of the vocabulary does


class PromptAnswerDataset(TokenDataset):
    """The examples of a folder, in the order of its manifest.

    Raises:
        DataError: no dataset there, or one of text.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        if self.manifest.examples is None:
            raise DataError(
                "the dataset is of text, not of prompts and answers",
                remedy="Make one with tools/prepare_task.py",
                location=self.path,
            )

    @property
    def num_examples(self) -> int:
        """Prompts, each with its answer."""
        return self.manifest.num_documents // 2

    def num_sequences(self, seq_len_tokens: int) -> int:
        """Windows of an epoch: the examples, whatever the length.

        Raises:
            DataError: there is not one.
        """
        del seq_len_tokens
        if not self.num_examples:
            raise DataError("the dataset has no examples", remedy="Make it again from more", location=self.path)
        return self.num_examples

    def sequences(self, indices_B: IntArray, seq_len_tokens: int) -> tuple[TokenArray, BoolArray]:
        """Examples by number: prompt, answer, and padding up to a window.

        Returns:
            tokens [B, seq_len + 1] in the storage type, and segment ends [B, seq_len] of all but the last token.

        Raises:
            DataError: an example is longer than a window, or holds ids outside the vocabulary.
        """
        bounds_B3 = self._example_bounds[self._checked(indices_B)]
        tokens = np.full((len(bounds_B3), seq_len_tokens + 1), PADDING, dtype=self.dtype)
        ends = np.zeros((len(bounds_B3), seq_len_tokens), dtype=np.bool_)
        for row, (start, _, stop) in enumerate(bounds_B3.tolist()):
            if stop - start > seq_len_tokens:
                raise DataError(
                    f"an example has {stop - start} tokens, and a window {seq_len_tokens}",
                    remedy="Make the dataset again for this length",
                    location=self.path,
                )
            tokens[row, : stop - start] = self.tokens(start, stop)
            ends[row, : stop - start] = self.ends(start, stop)
        self._check_ids(tokens, bounds_B3[:, 0])
        return tokens, sequence_ends(ends, self.rule)

    def answers(self, indices_B: IntArray) -> IntArray:
        """Labels [first, stop) of each window that are tokens of its answer, int64 [B, 2]."""
        bounds_B3 = self._example_bounds[self._checked(indices_B)]
        return bounds_B3[:, 1:] - bounds_B3[:, :1] - 1  # label t is token t + 1

    @cached_property
    def _example_bounds(self) -> IntArray:
        """First token of each prompt and of its answer, and the end of that, int64 [examples, 3].

        Raises:
            DataError: an index is damaged, or the documents are not pairs.
        """
        bounds = self.document_bounds()
        if (bounds.size - 1) % 2:
            raise damaged(self.shards[-1].path("idx"), f"{bounds.size - 1} documents are no pairs of prompt and answer")
        lengths_D = np.diff(bounds)
        if not lengths_D.all():
            example, part = divmod(int(np.argmin(lengths_D)), 2)
            what = f"the {('prompt', 'answer')[part]} of example {example} of {self.path} has no tokens"
            raise damaged(self.shards[-1].path("idx"), what)
        return np.stack([bounds[:-1:2], bounds[1::2], bounds[2::2]], axis=1)

    def _checked(self, indices_B: IntArray) -> IntArray:
        indices_B = np.asarray(indices_B, dtype=np.int64)
        if indices_B.size and not 0 <= indices_B.min() <= indices_B.max() < self.num_examples:
            raise IndexError(f"windows {indices_B.min()} to {indices_B.max()} of {self.num_examples}")
        return indices_B


def open_text(path: str | Path) -> TokenDataset:
    """The dataset of a folder, which must be of text.

    Raises:
        DataError: it is of examples, or as `open_dataset`.
    """
    dataset = TokenDataset(path)
    if dataset.manifest.examples is not None:
        raise DataError(
            f"it has examples of {dataset.manifest.examples.task}, prompts with answers, and this is for text",
            remedy="Name a dataset made by tools/preprocess.py; for answers there are tools/evaluate.py scrolls and "
            "arithmetic",
            location=dataset.path,
        )
    return dataset


def open_dataset(path: str | Path) -> TokenDataset:
    """The dataset of a folder as what it is: text, or examples.

    Raises:
        DataError: there is none, or a shard is not what the manifest says.
    """
    dataset = TokenDataset(path)
    return dataset if dataset.manifest.examples is None else PromptAnswerDataset(path)
