"""Build datasets of examples, each a prompt and its answer: from a split of a SCROLLS task, or of arithmetic problems.

One process writes a dataset in one pass: unfinished work is in OUTPUT/unfinished, and a restart discards it.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from megatron_bipe.data.manifest import Manifest, PromptAnswerRecord, ShardRecord
from megatron_bipe.data.segments import resolve_rule, segment_ends
from megatron_bipe.data.shard import ShardWriter, choose_dtype
from megatron_bipe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.io import locked
from megatron_bipe.tasks.arithmetic.problems import EQUALS, Problem, problems, write_tokenizer
from megatron_bipe.tasks.scrolls.tasks import SEQ_LEN_TOKENS, Encode, Prompter, Row, find_task, read_rows
from megatron_bipe.types import Document, TokenArray, TokenizedDocument
from preprocessing.commit import (
    Contents,
    clear_output,
    publish_dataset,
    record_files,
    recorded_files,
    remove_if_empty,
    require_own,
)
from preprocessing.destinations import Destination
from preprocessing.document_tokenizer import choose_backend, open_backend
from preprocessing.work_dir import WorkFolder

ARITHMETIC_SEGMENTS = f'["{EQUALS}"]'
ROWS_AT_ONCE = 32  # of SCROLLS, held in memory; a text has up to a few MB
CHECK_SHARE = 0.01  # of the text, checked against the stock library's ids


class Example(NamedTuple):
    """A prompt and its answer."""

    prompt_T: TokenArray  # starts with BOS
    answer_T: TokenArray  # ends with EOS
    text_bytes: int  # UTF-8 length of both
    location: str  # in the source, for error messages


@dataclass(frozen=True)
class ScrollsOptions:
    """Options of `tools/prepare_task.py scrolls`."""

    task: str
    data: Path
    split: str
    tokenizer: str
    output: Path
    length: int = SEQ_LEN_TOKENS
    segments: str = "reference"
    overwrite: bool = False


def prepare_scrolls(options: ScrollsOptions) -> Manifest:
    """Build a dataset from a split of a SCROLLS task, with one example for each output of each input.

    Raises:
        DataError: an unknown task, tokenizer, rule or file; a bad line, an example without an answer, or an output
            that may not be replaced.
    """
    task, tokenizer = find_task(options.task), load_tokenizer(options.tokenizer)
    prompter = Prompter(task, options.length, tokenizer, checked_encode(tokenizer))
    contents = Contents(
        tokenizer,
        resolve_rule(options.segments, tokenizer),
        {"task": task.name, "split": options.split},
        PromptAnswerRecord(task=task.name, seq_len_tokens=options.length),
    )
    examples = _scrolls_examples(prompter, read_rows(options.data, task.name, options.split))
    return write_examples(options.output, contents, examples, overwrite=options.overwrite)


def checked_encode(tokenizer: Tokenizer) -> Encode:
    """Return an encoder that uses the fast tokenizer if it is available, and checks it against the stock one."""
    backend = open_backend(tokenizer, choose_backend(tokenizer, "auto", False, []), False, CHECK_SHARE)

    def encode(texts: Iterable[str]) -> list[TokenArray]:
        encoded = backend.encode_documents([Document(text, "SCROLLS", n, "") for n, text in enumerate(texts, start=1)])
        return [encoded.tokens_T[start:stop] for start, stop in pairwise(encoded.offsets_D1.tolist())]

    return encode


def _scrolls_examples(prompter: Prompter, rows: Iterator[Row]) -> Iterator[Example]:
    while group := list(islice(rows, ROWS_AT_ONCE)):
        outputs = [_output_of(row) for row in group]
        prompts, answers = prompter.prompts([row.input for row in group]), prompter.answers(outputs)
        for row, output, prompt_T, answer_T in zip(group, outputs, prompts, answers, strict=True):
            yield Example(prompt_T, answer_T, len(row.input.encode()) + len(output.encode()), row.location)


def _output_of(row: Row) -> str:
    if row.output is None:
        raise DataError(
            f"the example {row.pid!r} has no answer to learn from",
            remedy="Name a split that has outputs, train or validation; in one of these, fix or remove the line",
            location=row.location,
        )
    return row.output


@dataclass(frozen=True)
class ArithmeticOptions:
    """Options of `tools/prepare_task.py arithmetic`."""

    output: Path
    operators: range
    problems: int
    length: int
    seed: int = 0
    held_out: bool = False
    segments: str = ARITHMETIC_SEGMENTS
    overwrite: bool = False


def prepare_arithmetic(options: ArithmeticOptions) -> Manifest:
    """Build a dataset from arithmetic problems and their solutions, with its tokenizer.

    Raises:
        DataError: problems without operators or too long for a sequence, an invalid segment rule, or an output that
            may not be replaced.
    """
    operators = (options.operators.start, options.operators.stop - 1)
    if options.operators.start < 1 or not options.operators or options.problems < 1:
        raise DataError(
            f"{options.problems} problems of {operators[0]} to {operators[1]} operators",
            remedy="Ask for 1 problem or more, of 1 operator or more, as in --operators 1..6",
            location="--operators",
        )
    if options.length < 2:
        raise DataError(
            f"sequences of {options.length} tokens hold no problem",
            remedy="Raise --length: N operators with their solution take at most 2 N (N + 1) + 3 tokens",
            location="--length",
        )
    source = {
        "task": "arithmetic",
        "operators": list(operators),
        "problems": options.problems,
        "seed": options.seed,
        "held_out": options.held_out,
    }
    found = problems(options.operators, options.problems, options.seed, held_out=options.held_out)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder) / "arithmetic")
        tokenizer = load_tokenizer(Path(folder) / "arithmetic")
        record = PromptAnswerRecord(task="arithmetic", seq_len_tokens=options.length)
        contents = Contents(tokenizer, resolve_rule(options.segments, tokenizer), source, record)
        examples = _arithmetic_examples(tokenizer, found)
        return write_examples(options.output, contents, examples, overwrite=options.overwrite, total=options.problems)


def _arithmetic_examples(tokenizer: Tokenizer, found: Iterable[Problem]) -> Iterator[Example]:
    eos_id = tokenizer.eos_id
    assert eos_id is not None  # `write_tokenizer` defines it
    for number, problem in enumerate(found):
        prompt_T, answer_T = tokenizer.encode_batch([problem.prompt, problem.answer])
        yield Example(
            np.concatenate([[tokenizer.bos_id], prompt_T]),
            np.concatenate([answer_T, [eos_id]]),
            len(problem.prompt) + len(problem.answer),
            f"problem {number}, of {problem.operators} operators",
        )


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
            require_own(work)
            with locked(work.path, partial(_begin, work, contents, overwrite)):
                try:
                    shard = _write(work, contents, tqdm(examples, total=total, unit=" examples", disable=None))
                except BaseException:
                    work.remove()
                    raise
                return _publish(work, shard, contents)
    finally:
        if not existed:
            remove_if_empty(output)


def _begin(work: WorkFolder, contents: Contents, overwrite: bool) -> None:
    assert contents.examples is not None
    require_own(work)  # again: another run may have ended while this one waited
    job = {
        "examples": contents.examples.model_dump(mode="json"),
        "source": contents.source,
        "tokenizer": contents.tokenizer.fingerprint,
        "rule": contents.rule.model_dump(mode="json"),
    }
    work.begin(job, recorded_files(work), overwrite=overwrite)


def _write(work: WorkFolder, contents: Contents, examples: Iterable[Example]) -> ShardRecord:
    assert contents.examples is not None
    seq_len_tokens, dtype = contents.examples.seq_len_tokens, choose_dtype(contents.tokenizer.vocab_size)
    with ShardWriter(work.range_folder(0), "000", dtype) as writer:
        for example in examples:
            _require_fitting(example, seq_len_tokens)
            text_bytes = (0, example.text_bytes)  # prompt and answer together
            for ids_T, size in zip((example.prompt_T, example.answer_T), text_bytes, strict=True):
                tokens_T = np.asarray(ids_T).astype(dtype)
                writer.add(TokenizedDocument(tokens_T, segment_ends(tokens_T, contents.rule), size, ""))
        if not writer.num_documents:
            raise DataError("There are no examples", remedy="Give files that contain some", location=work.output)
        return writer.finish()


def _publish(work: WorkFolder, shard: ShardRecord, contents: Contents) -> Manifest:
    require_own(work)  # something may have been added since the start
    clear_output(work)
    record_files(work, {work.output: 1})
    made = publish_dataset(work.output, [(work.range_folder(0), shard)], contents, Destination("", ""))
    work.remove()
    return made


def _require_fitting(example: Example, seq_len_tokens: int) -> None:
    for name, ids_T in (("prompt", example.prompt_T), ("answer", example.answer_T)):
        if not len(ids_T):
            raise DataError(f"an example has no {name}", remedy="Remove it", location=example.location)
    size = len(example.prompt_T) + len(example.answer_T)
    if size > seq_len_tokens:
        raise DataError(
            f"an example has {len(example.prompt_T)} prompt and {len(example.answer_T)} answer tokens; a sequence has "
            f"{seq_len_tokens}",
            remedy=f"Use --length {size} or more, or remove it",
            location=example.location,
        )
