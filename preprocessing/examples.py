"""Prompts and answers in tokens -> a dataset folder of examples.

Made in one go and by one process: what is unfinished lies in OUTPUT/unfinished, and is begun again.
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

    prompt_T: TokenArray  # from BOS on
    answer_T: TokenArray  # to EOS
    text_bytes: int  # UTF-8 length of both
    place: str  # where it comes from, for messages


def write_examples(
    output: Path, contents: Contents, examples: Iterable[Example], *, overwrite: bool, total: int | None = None
) -> Manifest:
    """Write a dataset of examples, in their order, and show how far it is.

    Args:
        output: folder to make.
        contents: whose `examples` says for which window they are.
        examples: taken one by one.
        overwrite: replace a dataset that is there, once the new one is finished.
        total: how many there are; None: not known.

    Raises:
        DataError: an example without prompt or answer, or longer than the window; none at all; the output may not be
            replaced, or cannot be written. A dataset that was there is still there then.
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
            text_bytes = (0, example.text_bytes)  # of both together
            for ids_T, size in zip((example.prompt_T, example.answer_T), text_bytes, strict=True):
                tokens_T = np.asarray(ids_T).astype(dtype)
                writer.add(TokenizedDocument(tokens_T, segment_ends(tokens_T, contents.rule), size, ""))
        if not writer.num_documents:
            raise DataError("There are no examples", remedy="Give files that hold some", location=work.output)
        record = writer.finish()
    clear_output(work.output)
    return publish_dataset(work.output, [(folder, record)], contents, Destination("", ""))


def _check(example: Example, longest: int) -> None:
    for name, ids_T in (("prompt", example.prompt_T), ("answer", example.answer_T)):
        if not len(ids_T):
            raise DataError(f"an example without {name}", remedy="Leave it out", location=example.place)
    size = len(example.prompt_T) + len(example.answer_T)
    if size > longest:
        raise DataError(
            f"an example has {len(example.prompt_T)} tokens of prompt and {len(example.answer_T)} of answer; a window "
            f"has {longest}",
            remedy=f"Use --length {size} or more, or leave it out",
            location=example.place,
        )
