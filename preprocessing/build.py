"""Build dataset folders from raw text: plan ranges, process the pending ones on workers and ranks, publish them."""

import itertools
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_bipe.data.manifest import Manifest
from megatron_bipe.data.segments import resolve_rule
from megatron_bipe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.io import locked
from megatron_bipe.types import Document
from preprocessing import destinations
from preprocessing.commit import (
    Contents,
    finish_publishing,
    publish,
    recorded_files,
    remove_if_empty,
    require_own,
)
from preprocessing.destinations import Split
from preprocessing.document_tokenizer import BackendChoice, BackendName, Recipe, choose_backend
from preprocessing.line_counts import LineCounts, printable, require_at_least, sum_ranges
from preprocessing.progress import Progress
from preprocessing.range_worker import Job
from preprocessing.readers.documents import read_input, require_formats
from preprocessing.readers.inputs import HUB, Input, Piece, find_inputs, plan_ranges
from preprocessing.readers.lines import LONGEST_LINE_BYTES
from preprocessing.readers.parse import Keys
from preprocessing.work_dir import PUBLISHED_NAME, STOCK_NAME, WorkFolder
from preprocessing.workers import Ranks, Task, process_ranges, range_weight, split_evenly

SHARD_TOKENS = 1 << 30  # 2 GiB of uint16: few files for the full Pile, each small enough to copy again
CHECK_SHARE = 0.001  # costs about 1% of the time: the stock tokenizer is ten times slower
FIRST_CHARS = 200_000  # of the input, tokenized by both libraries and compared before the run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildOptions:
    """Options of `tools/preprocess.py`."""

    inputs: Sequence[str]
    tokenizer: str
    output: Path
    segments: str = "reference"
    workers: int = 1
    partition_by: str | None = None
    split: str | None = None  # see `Split.parse`
    shard_tokens: int = SHARD_TOKENS
    text_key: str = "text"
    special_in_text: bool = False
    append_eos: bool = False
    deduplicate: bool = False
    empty_texts: str = "drop"  # or "keep"
    backend: BackendChoice = "auto"
    check_share: float = CHECK_SHARE
    on_difference: str = "stop"  # or "fall-back"
    max_malformed: int | None = None  # None: the default of `LineCounts`
    max_line_bytes: int = LONGEST_LINE_BYTES
    overwrite: bool = False


def build(options: BuildOptions, ranks: Ranks | None = None) -> dict[Path, Manifest]:
    """Build the dataset, or one for each partition and split; resume if an earlier call was interrupted.

    Args:
        options: options of the command.
        ranks: the MPI ranks among which the work is divided; each calls this function.

    Returns:
        Manifests by folder on rank 0; an empty dictionary on the others.

    Raises:
        DataError: bad options, inputs, tokenizer or output folder; too many malformed lines; no text; or a full disk.
            Finished shards are kept for the next call, except when there is no text.
    """
    ranks = ranks or Ranks()
    plan = _plan(options)
    work = WorkFolder(options.output)
    existed = options.output.exists()
    try:
        with work.writing(), ExitStack() as held:
            if ranks.rank == 0:
                require_own(work)
                held.enter_context(locked(work.path, partial(_begin, work, plan, options)))
            ranks.wait_for_all()
            if ranks.rank > 0:
                held.enter_context(locked(work.path))
            try:
                backend = ranks.run_on_first(partial(_choose_backend, plan, options))
                return _run(plan, options, backend, ranks)
            except DataError:
                if ranks.size == 1 and not _has_begun(work, len(plan.ranges)):
                    work.remove()
                raise
    finally:
        if ranks.rank == 0 and not existed:
            remove_if_empty(options.output)


@dataclass(frozen=True)
class _Plan:
    """Inputs, ranges, tokenizer and recipe that follow from the options."""

    inputs: list[Input]
    ranges: list[list[Piece]]
    tokenizer: Tokenizer
    recipe: Recipe
    keys: Keys

    def job(self, options: BuildOptions) -> dict[str, Any]:
        """Return everything that determines the output's bytes."""
        return _if_kept(options) | {
            "inputs": [[item.name, item.size, item.version] for item in self.inputs],
            "tokenizer": self.tokenizer.fingerprint,
            "special_ids": self.tokenizer.special_ids,
            "rule": self.recipe.rule.model_dump(mode="json"),
            "text_key": options.text_key,
            "partition_by": options.partition_by,
            "split": options.split,
            "shard_tokens": options.shard_tokens,
            "special_in_text": options.special_in_text,
            "append_eos": options.append_eos,
            "deduplicate": options.deduplicate,
            "ranges": len(self.ranges),
        }


def _plan(options: BuildOptions) -> _Plan:
    require_at_least("--workers", options.workers, 1)
    require_at_least("--shard-tokens", options.shard_tokens, 1)
    require_at_least("--max-malformed", options.max_malformed, 0)
    require_at_least("--max-line-bytes", options.max_line_bytes, 1)
    if not 0 <= options.check_share <= 1:
        raise DataError(f"--check-share is {options.check_share}", remedy="Give 0 to 1", location="--check-share")
    inputs = find_inputs(options.inputs)
    tokenizer = load_tokenizer(options.tokenizer, options.special_in_text)
    if options.append_eos and tokenizer.eos_id is None:
        raise DataError(
            "The tokenizer has no end-of-sequence token to append",
            remedy='Name one as "eos_token" in its tokenizer_config.json, or remove --append-eos',
            location=tokenizer.definition,
        )
    if tokenizer.definition.resolve().is_relative_to(options.output.resolve()):
        raise DataError(
            "The tokenizer is in the output folder, which will be replaced",
            remedy="Copy it to another folder, and name the copy",
            location=tokenizer.definition,
        )
    recipe = Recipe(
        tokenizer_file=tokenizer.definition,
        rule=resolve_rule(options.segments, tokenizer),
        special_in_text=options.special_in_text,
        append_eos=options.append_eos,
        split=Split.parse(options.split) if options.split is not None else None,
        check_share=options.check_share,
    )
    keys = Keys(options.text_key, options.partition_by, options.empty_texts == "keep")
    return _Plan(inputs, plan_ranges(inputs, options.shard_tokens), tokenizer, recipe, keys)


def _begin(work: WorkFolder, plan: _Plan, options: BuildOptions) -> None:
    require_own(work)  # again: another run may have ended while this one waited
    work.begin(plan.job(options), recorded_files(work), overwrite=options.overwrite)


def _has_begun(work: WorkFolder, num_ranges: int) -> bool:
    """Return True if there is anything to resume."""
    return work.has(STOCK_NAME) or any(work.has_documents(n) for n in range(num_ranges))


def _choose_backend(plan: _Plan, options: BuildOptions) -> BackendName:
    require_formats(plan.inputs)
    documents: list[Document] = []
    inputs = (read_input(item, plan.keys, options.max_line_bytes) for item in plan.inputs)
    parts = (parsed.documents for parsed in itertools.chain.from_iterable(inputs))
    room = FIRST_CHARS
    for document in itertools.chain.from_iterable(parts):
        documents.append(document._replace(text=document.text[:room]))
        room -= len(documents[-1].text)
        if room == 0:
            break
    return choose_backend(plan.tokenizer, options.backend, options.special_in_text, documents)


def _run(plan: _Plan, options: BuildOptions, backend: BackendName, ranks: Ranks) -> dict[Path, Manifest]:
    work = WorkFolder(options.output)
    # Only rank 0 reads the state on disk, because other ranks may see a change earlier or later.
    if ranks.run_on_first(partial(work.has, PUBLISHED_NAME)):
        return finish_publishing(work) if ranks.rank == 0 else {}
    fall_back = options.on_difference == "fall-back"
    if ranks.run_on_first(partial(work.has, STOCK_NAME)):
        if backend != "stock" and not fall_back:
            raise DataError(
                "In an earlier run of this job, gigatoken and the stock tokenizer disagreed",
                remedy="Add --backend stock, or --on-difference fall-back",
                location=work.output,
            )
        backend = "stock"
    job = Job(
        output=options.output,
        ranges=plan.ranges,
        keys=plan.keys,
        max_line_bytes=options.max_line_bytes,
        recipe=replace(plan.recipe, backend=backend),
        shard_tokens=options.shard_tokens,
        drop_duplicates=options.deduplicate,
        fall_back=fall_back,
    )
    if options.deduplicate:
        _mark_duplicates(job, work, options, ranks)
    _process_due(job, "tokenize", lambda n: not work.is_done(n), options, ranks)
    if ranks.run_on_first(partial(work.has, STOCK_NAME)):  # gigatoken's earlier ids are not trusted
        stock = replace(job, recipe=replace(plan.recipe, backend="stock"))
        _process_due(stock, "tokenize", lambda n: work.load_range(n).backend != "stock", options, ranks)
    if ranks.rank != 0:
        return {}
    records = [work.load_range(n) for n in range(len(plan.ranges))]
    counts = sum_ranges(records, plan.ranges, options.max_malformed)
    counts.finish(options.inputs)
    source = _source(options, plan.inputs, counts, sum(record.duplicates for record in records))
    return publish(work, records, Contents(plan.tokenizer, plan.recipe.rule, source))


def _mark_duplicates(job: Job, work: WorkFolder, options: BuildOptions, ranks: Ranks) -> None:
    folders = [work.range_folder(n) for n in range(len(job.ranges))]
    _process_due(job, "hash_texts", lambda n: not destinations.has_hashes(folders[n]), options, ranks)
    if ranks.rank == 0 and not all(map(destinations.are_duplicates_marked, folders)):
        log.info("Skipping %d texts that equal an earlier one", destinations.mark_duplicates(folders))


def _process_due(job: Job, task: Task, is_due: Callable[[int], bool], options: BuildOptions, ranks: Ranks) -> None:
    """Run a task on the ranges for which it is due; this rank and its workers process one slice of them."""
    numbers = ranks.run_on_first(lambda: [n for n in range(len(job.ranges)) if is_due(n)])
    weights = [range_weight(job.ranges[n]) for n in numbers]
    mine = split_evenly(numbers, weights, ranks.size)[ranks.rank]
    if len(numbers) < len(job.ranges):
        log.info("Resuming: %d of %d ranges are done", len(job.ranges) - len(numbers), len(job.ranges))
    total = sum(piece.stop - piece.start for n in mine for piece in job.ranges[n])
    # Stop early if one range, or with --max-malformed all ranges so far, have too many malformed lines.
    counts = LineCounts(options.max_malformed, quiet=True)
    with Progress(total, "Tokenizing" if task == "tokenize" else "Hashing", quiet=ranks.rank > 0) as progress:
        for number in process_ranges(job, task, mine, options.workers, progress.update):
            if task == "tokenize":
                record = WorkFolder(job.output).load_range(number)
                limit = LineCounts(quiet=True) if options.max_malformed is None else counts
                limit.add_range(record, record.first_malformed)
        if ranks.rank == 0 and mine:
            log.info(progress.summarize())
    ranks.wait_for_all()


def _source(options: BuildOptions, inputs: list[Input], counts: LineCounts, num_duplicates: int) -> dict[str, Any]:
    """Describe the input for the manifest, without times and worker counts, so that equal runs give equal bytes."""
    return _if_kept(options) | {
        "made_by": "tools/preprocess.py",
        "inputs": [_describe(item) for item in inputs],
        "text_key": options.text_key,
        "partition_by": options.partition_by,
        "split_by": options.split,
        "document_starts_with": "bos",
        "document_ends_with": "eos" if options.append_eos else None,
        "lines": counts.num_lines,
        "documents": counts.num_documents,
        "empty_texts": counts.num_empty,
        "duplicate_texts": num_duplicates if options.deduplicate else None,
        "malformed_lines": counts.num_malformed,
        "first_malformed": [line._asdict() for line in counts.first_malformed],
    }


def _describe(item: Input) -> dict[str, Any]:
    if item.kind == HUB:
        return {"file": item.name, "parts": item.size, "commit": item.version}
    return {"file": printable(item.name), "bytes": item.size}


def _if_kept(options: BuildOptions) -> dict[str, Any]:
    """Return the record of kept empty texts, which is absent without them, as in data of earlier versions."""
    return {"empty_documents": "keep"} if options.empty_texts == "keep" else {}
