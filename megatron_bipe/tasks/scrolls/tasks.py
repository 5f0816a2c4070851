"""SCROLLS: its seven tasks and the tokenization of their prompts. Torch-free.

Training and evaluation both use this module, so that a model is evaluated on prompts like those of training.

Source: Shaham et al. 2022, "SCROLLS: Standardized CompaRison Over Long Language Sequences"; prompts and limits are
those of BiPE's authors.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np

from megatron_bipe.data.tokenizer import Tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.types import TokenArray

SEQ_LEN_TOKENS = 8192  # prompt, answer and EOS together; the authors' value

Metric = Literal["f1", "exact_match", "rouge"]
Encode = Callable[[Sequence[str]], Sequence[TokenArray]]  # ids of each text, without special tokens


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
