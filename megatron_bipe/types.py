"""The data types that are passed between stages: documents and batches.

Torch-free: `Batch` holds NumPy arrays when data is read, and tensors after `data.collate`.
"""

from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[Any]  # uint16 or int32 as stored, int64 once batched
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

ArrayT = TypeVar("ArrayT")


class Document(NamedTuple):
    """One raw text, as the readers pass it to the tokenizer."""

    text: str
    file: str  # the file it was read from, for messages
    line: int  # 1-based line in that file
    partition: str  # value of the partition key; "" when the data is not partitioned


class TokenizedDocument(NamedTuple):
    """One tokenized document, as it is written to a shard."""

    tokens_T: TokenArray  # in the storage dtype
    ends_T: BoolArray  # True where the token closes a segment
    text_bytes: int  # UTF-8 length of the raw text, for bits per byte
    partition: str


class Batch(NamedTuple, Generic[ArrayT]):
    """A micro-batch. All arrays but the weights are int64, or int32 on the way to a GPU, which widens them."""

    tokens_BT: ArrayT
    intra_BT: ArrayT  # position of the token inside its segment, clipped to the size of the intra embedding
    inter_BT: ArrayT  # number of segments closed before the token in this sequence
    labels_BT: ArrayT  # `tokens_BT` shifted left by one token
    # Loss weight of each label, fp32, 1 on average over the labels of the global batch; None: all weights are 1.
    weights_BT: ArrayT | None = None
