"""SCROLLS: its seven tasks, its public files, and the tokenization of prompts. Torch-free.

Training and evaluation both use this module, so that a model is evaluated on prompts like those of training.

Source: Shaham et al. 2022, "SCROLLS: Standardized CompaRison Over Long Language Sequences"; prompts and limits are
those of BiPE's authors. The public files have one JSON object per line, and are one file per task and split, or one
zip file per task.
"""

import difflib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

import numpy as np
import orjson

from megatron_bipe.data.tokenizer import Tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.types import TokenArray

LONGEST_LINE_BYTES = 1 << 27  # the longest input, a book, has a few MB
SEQ_LEN_TOKENS = 8192  # prompt, answer and EOS together; the authors' value

Metric = Literal["f1", "exact_match", "rouge"]
Encode = Callable[[Sequence[str]], Sequence[TokenArray]]  # ids of each text, without special tokens


FIELDS = ("id", "pid", "input", "output")


class Form(NamedTuple):
    """Prompt template of a task, and limits on input and answer."""

    head: str
    tail: str  # never truncated
    max_words: int | None  # of the input; None: all
    answer_tokens: int  # without EOS


QUESTION = Form("", "", 20_000, 200)
SUMMARY = Form("Context:\n", "\n Please summarize this report:", None, 1000)


class Task(NamedTuple):
    """A task of the benchmark."""

    name: str
    form: Form
    metric: Metric


TASKS = {
    task.name: task
    for task in (
        Task("gov_report", SUMMARY, "rouge"),
        Task("summ_screen_fd", SUMMARY, "rouge"),
        Task("qmsum", SUMMARY, "rouge"),
        Task("narrative_qa", QUESTION, "f1"),
        Task("qasper", QUESTION, "f1"),
        Task("quality", QUESTION, "exact_match"),
        Task("contract_nli", QUESTION, "exact_match"),
    )
}


def find_task(name: str) -> Task:
    """Return the task with this name in the benchmark.

    Raises:
        DataError: there is no such task.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        remedy = f"Did you mean {near[0]}? " if near else ""
        raise DataError(
            f"there is no SCROLLS task {name!r}", remedy=f"{remedy}Tasks are: {', '.join(TASKS)}", location="--task"
        )
    return TASKS[name]


class Prompter:
    """Tokenizer of prompts and answers, truncated so that both and EOS fit a sequence.

    Args:
        task: the task.
        length_tokens: sequence length.
        tokenizer: tokenizer of the model.
        encode: a faster function that returns the same ids; None: the tokenizer's own.

    Attributes:
        prompt_tokens: maximum tokens of a prompt, including BOS.

    Raises:
        DataError: the tokenizer has no EOS, or the sequence is too short for any prompt.
    """

    def __init__(self, task: Task, length_tokens: int, tokenizer: Tokenizer, encode: Encode | None = None) -> None:
        self._form, self._encode = task.form, encode or tokenizer.encode_batch
        self._bos_id = tokenizer.bos_id
        if tokenizer.eos_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token, which every answer must end with",
                remedy='Add "eos_token" to the tokenizer_config.json in the same folder',
                location=tokenizer.definition,
            )
        self._eos_id = tokenizer.eos_id
        with_tail, without = self._encode([f"{self._form.head}x{self._form.tail}", f"{self._form.head}x"])
        self._tail_tokens = with_tail.size - without.size
        self.prompt_tokens = length_tokens - self._form.answer_tokens - 1
        if self.prompt_tokens < 2 + self._tail_tokens:  # BOS and at least one input token
            raise DataError(
                f"sequences of {length_tokens} tokens cannot hold a prompt of {task.name}, an answer of "
                f"{self._form.answer_tokens} and EOS",
                remedy=f"Use {self._form.answer_tokens + 3 + self._tail_tokens} or more; the authors: {SEQ_LEN_TOKENS}",
                location="--length",
            )

    def prompts(self, inputs: Sequence[str]) -> list[TokenArray]:
        """Return each prompt's tokens, BOS first; one that is too long keeps its beginning and the template's tail."""
        form = self._form
        texts = [f"{form.head}{first_words(text, form.max_words)}{form.tail}" for text in inputs]
        return [self._truncate(np.concatenate([[self._bos_id], ids])) for ids in self._encode(texts)]

    def answers(self, outputs: Sequence[str]) -> list[TokenArray]:
        """Return each answer's tokens, truncated to the limit, and EOS."""
        most = self._form.answer_tokens
        return [np.concatenate([ids[:most], [self._eos_id]]) for ids in self._encode(outputs)]

    def _truncate(self, ids_T: TokenArray) -> TokenArray:
        if ids_T.size <= self.prompt_tokens:
            return ids_T
        kept = self.prompt_tokens - self._tail_tokens
        return np.concatenate([ids_T[:kept], ids_T[ids_T.size - self._tail_tokens :]])


def first_words(text: str, count: int | None) -> str:
    """Return the text up to the end of its `count`-th word, white space unchanged; None: the full text.

    A word contains no white space. White space is kept because newlines end segments.
    """
    if count is None:
        return text
    last = next(islice(re.finditer(r"\S+", text), count - 1, count), None)
    return text if last is None else text[: last.end()]


class Row(NamedTuple):
    """An input with one of its outputs."""

    id: str  # of the input; its rows differ in their outputs
    pid: str  # of the pair
    input: str
    output: str | None  # None in test splits and if it has no text
    location: str  # in the files, for error messages


class Question(NamedTuple):
    """An input with all its outputs."""

    id: str
    input: str
    outputs: tuple[str, ...]  # empty in test splits


def read_rows(folder: Path, task: str, split: str) -> Iterator[Row]:
    """Read the rows of a split in the order of the file.

    Args:
        folder: contains TASK/SPLIT.jsonl, or TASK.zip with that file, as on the Hub.
        task: name of the task.
        split: train, validation or test.

    Raises:
        DataError: there is no such file, or a line is not a row; the error names its location and field.
    """
    with _opened(folder, task, split) as (stream, name):
        lines = iter(partial(stream.readline, LONGEST_LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > LONGEST_LINE_BYTES:
                raise DataError(
                    f"the line has more than {LONGEST_LINE_BYTES} bytes",
                    remedy="Download the file again, or remove the line",
                    location=f"{name}, line {number}",
                )
            if line.strip():
                yield _row(line, f"{name}, line {number}")


def questions(rows: Iterable[Row]) -> list[Question]:
    """Return the inputs in the order of their first rows, each with the outputs of all its rows."""
    inputs: dict[str, str] = {}
    outputs: dict[str, list[str]] = {}
    for row in rows:
        inputs.setdefault(row.id, row.input)
        outputs.setdefault(row.id, []).extend([] if row.output is None else [row.output])
    return [Question(id_, text, tuple(outputs[id_])) for id_, text in inputs.items()]


def _row(line: bytes, location: str) -> Row:
    remedy = "Download the file again, or fix the line"
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"the line is not JSON: {error}", remedy=remedy, location=location) from error
    if not isinstance(content, dict):
        raise DataError(f"the line is a JSON {type(content).__name__}, not an object", remedy=remedy, location=location)
    missing = [field for field in FIELDS if field not in content]
    if missing:
        what = f"the object has no {', '.join(map(repr, missing))}; its fields must be {', '.join(FIELDS)}"
        raise DataError(what, remedy=remedy, location=location)
    for field in FIELDS:
        value = content[field]
        if not isinstance(value, str) and not (field == "output" and value is None):
            raise DataError(f"{field!r} is {value!r:.60}, but must be a string", remedy=remedy, location=location)
    if not content["input"].strip():
        raise DataError("'input' has no text", remedy=remedy, location=location)
    output = content["output"]
    return Row(content["id"], content["pid"], content["input"], output if output and output.strip() else None, location)


@contextmanager
def _opened(folder: Path, task: str, split: str) -> Iterator[tuple[BinaryIO, str]]:
    """Yield the stream of a split and its name for messages."""
    member = f"{task}/{split}.jsonl"
    plain, packed = folder / member, folder / f"{task}.zip"
    try:
        if plain.is_file():
            with plain.open("rb") as stream:
                yield stream, str(plain)
        elif packed.is_file():
            with zipfile.ZipFile(packed) as archive, archive.open(member) as unpacked:
                yield cast(BinaryIO, unpacked), f"{packed}, {member}"
        else:
            raise DataError(
                f"there is neither {member} nor {packed.name}",
                remedy=f"Download it: python tools/download_data.py --dataset tau/scrolls --include {packed.name} "
                f"--output {folder}",
                location=folder,
            )
    except KeyError as error:
        raise DataError(
            f"the zip file has no {member}", remedy="Use another split, or download it again", location=packed
        ) from error
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        what = f"the file cannot be read: {error}"
        raise DataError(what, remedy="Download it again", location=plain if plain.exists() else packed) from error
