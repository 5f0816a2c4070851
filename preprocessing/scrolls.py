"""Build a dataset from a split of a SCROLLS task, with one example for each output of each input."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

from megatron_bipe.data.manifest import Manifest, PromptAnswerRecord
from megatron_bipe.data.segments import resolve_rule
from megatron_bipe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.tasks.scrolls.files import Row, read_rows
from megatron_bipe.tasks.scrolls.tasks import SEQ_LEN_TOKENS, Encode, Prompter, find_task
from megatron_bipe.types import Document, TokenArray
from preprocessing.commit import Contents
from preprocessing.examples import Example, write_examples
from preprocessing.tokenizer_backend import choose_backend, open_backend

ROWS_AT_ONCE = 32  # held in memory; a text has up to a few MB
CHECK_SHARE = 0.01  # of the text, checked against the stock library's ids


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
    """Build the dataset.

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
    rows = read_rows(options.data, task.name, options.split)
    return write_examples(options.output, contents, _examples(prompter, rows), overwrite=options.overwrite)


def checked_encode(tokenizer: Tokenizer) -> Encode:
    """Return an encoder that uses the fast tokenizer if it is available, and checks it against the stock one."""
    backend = open_backend(tokenizer, choose_backend(tokenizer, "auto", False, []), False, CHECK_SHARE)

    def encode(texts: Iterable[str]) -> list[TokenArray]:
        encoded = backend.encode_documents([Document(text, "SCROLLS", n, "") for n, text in enumerate(texts, start=1)])
        return [encoded.tokens_T[start:stop] for start, stop in pairwise(encoded.offsets_D1.tolist())]

    return encode


def _examples(prompter: Prompter, rows: Iterable[Row]) -> Iterator[Example]:
    rows = iter(rows)
    while some := list(islice(rows, ROWS_AT_ONCE)):
        outputs = [_output(row) for row in some]
        prompts, answers = prompter.prompts([row.input for row in some]), prompter.answers(outputs)
        for row, output, prompt_T, answer_T in zip(some, outputs, prompts, answers, strict=True):
            yield Example(prompt_T, answer_T, len(row.input.encode()) + len(output.encode()), row.location)


def _output(row: Row) -> str:
    if row.output is None:
        raise DataError(
            f"the example {row.pid!r} has no answer to learn from",
            remedy="Name a split that has outputs, train or validation; in one of these, fix or remove the line",
            location=row.location,
        )
    return row.output
