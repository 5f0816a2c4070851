"""Raw files -> dataset folders: reads in order, tokenizes in parallel, writes in order, the manifest last."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bipe.data.manifest import Manifest
from megatron_bipe.data.segments import resolve_rule
from megatron_bipe.data.tokenizer import load_tokenizer
from preprocessing.output import Contents, OutputFolders, prepare_folder
from preprocessing.progress import Progress
from preprocessing.readers import Block, find_inputs, read_blocks
from preprocessing.tally import Tally, require_at_least
from preprocessing.tokenize import Recipe, tokenize_blocks

SHARD_TOKENS = 1 << 30  # 2 GiB of uint16: few files for the whole Pile, and no file too large to copy again

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """What `tools/preprocess.py` is asked to do; the fields are its options."""

    inputs: Sequence[str]
    tokenizer: str
    output: Path
    segments: str = "reference"
    workers: int = 1
    partition_by: str | None = None
    shard_tokens: int = SHARD_TOKENS
    text_key: str = "text"
    special_in_text: bool = False
    max_malformed: int | None = None  # None: as `Tally` has it
    overwrite: bool = False


def build(options: BuildOptions) -> dict[Path, Manifest]:
    """Make the dataset, or one for each partition.

    Returns:
        Manifests by folder.

    Raises:
        DataError: bad options, inputs, tokenizer or output folder; too many malformed lines; no text at all.
            Whatever was written by then is removed.
    """
    require_at_least("--workers", options.workers, 1)
    require_at_least("--shard-tokens", options.shard_tokens, 1)
    require_at_least("--max-malformed", options.max_malformed, 0)
    files = find_inputs(options.inputs)
    tokenizer = load_tokenizer(options.tokenizer, options.special_in_text)
    rule = resolve_rule(options.segments, tokenizer)
    recipe = Recipe(tokenizer.definition, rule, options.text_key, options.partition_by, options.special_in_text)
    prepare_folder(options.output, options.overwrite)
    tally = Tally(options.max_malformed)
    contents = Contents(tokenizer, rule, options.shard_tokens)
    sizes = {str(file): file.stat().st_size for file in files}
    with (
        OutputFolders(options.output, contents, options.partition_by is not None) as output,
        Progress(sum(sizes.values()), "Tokenizing") as progress,
    ):
        for block, done in tokenize_blocks(recipe, _all_blocks(files), options.workers):
            counts = {"num_documents": len(done.lengths_D), "num_empty": done.num_empty, "num_lines": done.num_lines}
            tally.add(done.malformed, **counts)
            for document in done.documents():
                output.add(document)
            progress.update(block.read_bytes, int(done.text_bytes_D.sum()))
        tally.finish(options.inputs)
        log.info(progress.line())
        return output.finish(_source(options, sizes, tally))


def _all_blocks(files: list[Path]) -> Iterator[Block]:
    for file in files:
        yield from read_blocks(file)


def _source(options: BuildOptions, sizes: dict[str, int], tally: Tally) -> dict[str, Any]:
    """The manifest's account of the input; free of times and worker counts, so that equal runs give equal bytes."""
    return {
        "made_by": "tools/preprocess.py",
        "inputs": [{"file": _printable(file), "bytes": size} for file, size in sizes.items()],
        "text_key": options.text_key,
        "partition_by": options.partition_by,
        "special_in_text": options.special_in_text,
        "document_starts_with": "bos",
        "lines": tally.num_lines,
        "documents": tally.num_documents,
        "empty_texts": tally.num_empty,
        "malformed_lines": tally.num_malformed,
        "first_malformed": [line._replace(file=_printable(line.file))._asdict() for line in tally.first_malformed],
    }


def _printable(file: str) -> str:
    """A file name without the surrogates that stand for bytes outside UTF-8."""
    return os.fsencode(file).decode(errors="backslashreplace")
