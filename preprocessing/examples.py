"""Write tokenized prompts and answers to a dataset folder of examples.

One process does this in one pass: unfinished work is in OUTPUT/unfinished, and a restart discards it.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from megatron_bipe.data.manifest import Manifest
from megatron_bipe.data.segments import segment_ends
from megatron_bipe.data.shard import ShardWriter, choose_dtype
from megatron_bipe.errors import DataError
from megatron_bipe.io import locked
from megatron_bipe.types import TokenArray, TokenizedDocument
from preprocessing.commit import (
    SHARD_PREFIX,
    Contents,
    clear_output,
    has_output,
    publish_dataset,
    remove_if_empty,
    require_own,
)
from preprocessing.encode import Destination
from preprocessing.work_dir import WorkFolder


class Example(NamedTuple):
    """A prompt and its answer."""

    prompt_T: TokenArray  # starts with BOS
    answer_T: TokenArray  # ends with EOS
    text_bytes: int  # UTF-8 length of both
    place: str  # location in the source, for error messages


def write_examples(
    output: Path, contents: Contents, examples: Iterable[Example], *, overwrite: bool, total: int | None = None
) -> Manifest:
    """Write a dataset of examples in their order, with a progress bar; `contents.examples` gives the sequence length.

    Raises:
        DataError: an example without prompt or answer, or longer than a sequence; no examples; or an output that may
            not be replaced or cannot be written. An existing dataset is then unchanged.
    """
    work, existed = WorkFolder(output), output.exists()
    try:
        with work.writing():
            require_own(output)
            with locked(work.path, partial(_begin, work, overwrite)):
                try:
                    return _write(work, contents, tqdm(examples, total=total, unit=" examples", disable=None))
                finally:
                    work.remove()
    finally:
        if not existed:
            remove_if_empty(output)


def _begin(work: WorkFolder, overwrite: bool) -> None:
    if has_output(work.output) and not overwrite:
        raise DataError(
            "The output folder holds a dataset",
            remedy="Name another folder, or add --overwrite to replace it",
            location=work.output,
        )
    work.remove()


def _write(work: WorkFolder, contents: Contents, examples: Iterable[Example]) -> Manifest:
    assert contents.examples is not None
    longest, dtype = contents.examples.seq_len_tokens, choose_dtype(contents.tokenizer.vocab_size)
    folder = work.range_folder(0)
    with ShardWriter(folder, SHARD_PREFIX, dtype) as writer:
        for example in examples:
            _check(example, longest)
            text_bytes = (0, example.text_bytes)  # prompt and answer together
            for ids_T, size in zip((example.prompt_T, example.answer_T), text_bytes, strict=True):
                tokens_T = np.asarray(ids_T).astype(dtype)
                writer.add(TokenizedDocument(tokens_T, segment_ends(tokens_T, contents.rule), size, ""))
        if not writer.num_documents:
            raise DataError("There are no examples", remedy="Give files that contain some", location=work.output)
        record = writer.finish()
    clear_output(work.output)
    return publish_dataset(work.output, [(folder, record)], contents, Destination("", ""))


def _check(example: Example, longest: int) -> None:
    for name, ids_T in (("prompt", example.prompt_T), ("answer", example.answer_T)):
        if not len(ids_T):
            raise DataError(f"an example has no {name}", remedy="Remove it", location=example.place)
    size = len(example.prompt_T) + len(example.answer_T)
    if size > longest:
        raise DataError(
            f"an example has {len(example.prompt_T)} prompt and {len(example.answer_T)} answer tokens; a sequence has "
            f"{longest}",
            remedy=f"Use --length {size} or more, or remove it",
            location=example.place,
        )
