"""Blocks of raw text -> token ids and segment ends, in this process or in worker processes.

Blocks go out and come back in order, a bounded number at a time, so neither memory nor the result depends on the
number of workers. What crosses between processes is bytes one way and arrays the other.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_bipe.data.format import choose_dtype
from megatron_bipe.data.segments import SegmentRule, segment_ends
from megatron_bipe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.types import BoolArray, Document, IntArray, TokenArray, TokenizedDocument
from preprocessing.readers import Block, Malformed, parse_block

BLOCKS_AHEAD = 3  # per worker: one in work, one waiting so that no worker is idle, one done and waiting its turn


@dataclass(frozen=True)
class Recipe:
    """All that decides which tokens a block gives; hashable, so that each process prepares it once."""

    tokenizer_file: Path
    rule: SegmentRule
    text_key: str = "text"
    partition_key: str | None = None
    special_in_text: bool = False


class TokenizedBlock(NamedTuple):
    """A block's documents, laid end to end (T tokens, D documents), and what had to be left out."""

    tokens_T: TokenArray  # storage dtype
    ends_T: BoolArray
    lengths_D: IntArray  # tokens
    text_bytes_D: IntArray
    partitions: list[str]  # the values that occur
    partition_D: IntArray  # index into `partitions`
    malformed: list[Malformed]
    num_lines: int
    num_empty: int

    def documents(self) -> Iterator[TokenizedDocument]:
        """The documents, as views of the block's arrays."""
        stops = np.cumsum(self.lengths_D)
        for stop, length, size, value in zip(
            stops.tolist(), self.lengths_D.tolist(), self.text_bytes_D.tolist(), self.partition_D.tolist(), strict=True
        ):
            here = slice(stop - length, stop)
            yield TokenizedDocument(self.tokens_T[here], self.ends_T[here], size, self.partitions[value])


def tokenize_blocks(recipe: Recipe, blocks: Iterable[Block], workers: int) -> Iterator[tuple[Block, TokenizedBlock]]:
    """Tokenize blocks in order; each comes back with its source (whose content is dropped).

    Args:
        recipe: what to do with a block.
        blocks: read lazily, at most `BLOCKS_AHEAD` per worker beyond the one being handed out.
        workers: processes; 1 works in this process.

    Raises:
        DataError: a worker process died.
    """
    if workers == 1:
        for block in blocks:
            yield block._replace(content=b""), tokenize_block(recipe, block)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    waiting: deque[tuple[Block, Future[TokenizedBlock]]] = deque()
    try:
        for block in blocks:
            waiting.append((block._replace(content=b""), pool.submit(tokenize_block, recipe, block)))
            if len(waiting) > BLOCKS_AHEAD * workers:
                source, done = waiting.popleft()
                yield source, done.result()
        while waiting:
            source, done = waiting.popleft()
            yield source, done.result()
    except BrokenProcessPool as error:
        raise DataError(
            "A worker process died (most often killed by the system for want of memory)",
            remedy="Use fewer --workers, or look into the system log",
            place=waiting[0][0].file if waiting else "",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def tokenize_block(recipe: Recipe, block: Block) -> TokenizedBlock:
    """Parse a block and tokenize its documents: BOS, then the text, no EOS."""
    parsed = parse_block(block, recipe.text_key, recipe.partition_key)
    tokenizer = _tokenizer_of(recipe)
    dtype = choose_dtype(tokenizer.vocab_size)
    ids = _with_bos(tokenizer, parsed.documents, dtype)
    partitions = list(dict.fromkeys(document.partition for document in parsed.documents))
    index = {value: number for number, value in enumerate(partitions)}
    tokens_T = np.concatenate([np.empty(0, dtype), *ids])
    return TokenizedBlock(
        tokens_T=tokens_T,
        ends_T=_ends(tokens_T, ids, recipe.rule),
        lengths_D=np.array([len(document_T) for document_T in ids], dtype=np.int64),
        text_bytes_D=np.array([len(document.text.encode()) for document in parsed.documents], dtype=np.int64),
        partitions=partitions,
        partition_D=np.array([index[document.partition] for document in parsed.documents], dtype=np.int64),
        malformed=parsed.malformed,
        num_lines=parsed.num_lines,
        num_empty=parsed.num_empty,
    )


def _with_bos(tokenizer: Tokenizer, documents: list[Document], dtype: np.dtype) -> list[TokenArray]:
    bos = np.array([tokenizer.bos_id], dtype=dtype)
    encoded = tokenizer.encode_batch([document.text for document in documents])
    return [np.concatenate((bos, tokens_T), dtype=dtype, casting="unsafe") for tokens_T in encoded]


def _ends(tokens_T: TokenArray, documents: list[TokenArray], rule: SegmentRule) -> BoolArray:
    """Segment ends of all documents; one pass, unless the rule counts from each document's start."""
    if rule.fixed_length is None:
        return segment_ends(tokens_T, rule)
    return np.concatenate([np.empty(0, np.bool_), *(segment_ends(document_T, rule) for document_T in documents)])


@cache
def _tokenizer_of(recipe: Recipe) -> Tokenizer:
    """The recipe's tokenizer, loaded once a process."""
    return load_tokenizer(recipe.tokenizer_file, recipe.special_in_text)


def _start_worker() -> None:
    """Let the parent alone answer Ctrl-C, and leave when the parent is gone (a pool's worker would wait for ever)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
