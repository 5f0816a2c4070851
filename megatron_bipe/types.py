"""The named hand-offs between stages: what a document, a window and a batch are, in one place.

Torch-free: `Batch` holds NumPy arrays where the data is read and tensors from `data.collate` on.
"""

from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[Any]  # uint16 or int32 as stored, int64 once batched
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

ArrayT = TypeVar("ArrayT")


class Document(NamedTuple):
    """One raw text, as the readers hand it to the tokenizer."""

    text: str
    file: str  # where it was read from, for messages
    line: int  # 1-based line in that file
    partition: str  # value of the partition key; "" when the data is not partitioned


class TokenizedDocument(NamedTuple):
    """One document as it is written: `tokens_T` in the storage dtype, and where segments end."""

    tokens_T: TokenArray
    ends_T: BoolArray  # True where the token closes a segment
    text_bytes: int  # UTF-8 length of the raw text, for bits per byte
    partition: str


class Batch(NamedTuple, Generic[ArrayT]):
    """A micro-batch: `labels_BT` is `tokens_BT` moved one token to the left. All int64, but for the weights."""

    tokens_BT: ArrayT
    intra_BT: ArrayT  # place of the token inside its segment, clipped to the intra table
    inter_BT: ArrayT  # segments closed before the token, in this window
    labels_BT: ArrayT
    # Of each label in the loss, fp32; 1 on average over the labels of the global batch. None: 1 each.
    weights_BT: ArrayT | None = None
