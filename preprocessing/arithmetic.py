"""Build a dataset of examples from arithmetic problems and their solutions."""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_bipe.data.manifest import Manifest, PromptAnswerRecord
from megatron_bipe.data.segments import resolve_rule
from megatron_bipe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.tasks.arithmetic.problems import EQUALS, Problem, problems, write_tokenizer
from preprocessing.commit import Contents
from preprocessing.examples import Example, write_examples

SEGMENTS = f'["{EQUALS}"]'


@dataclass(frozen=True)
class ArithmeticOptions:
    """Options of `tools/prepare_task.py arithmetic`."""

    output: Path
    operators: range
    problems: int
    length: int
    seed: int = 0
    held_out: bool = False
    segments: str = SEGMENTS
    overwrite: bool = False


def prepare_arithmetic(options: ArithmeticOptions) -> Manifest:
    """Build the dataset and its tokenizer.

    Raises:
        DataError: problems without operators or too long for a sequence, an invalid segment rule, or an output that
            may not be replaced.
    """
    if options.operators.start < 1 or not options.operators or options.problems < 1:
        raise DataError(
            f"{options.problems} problems of {options.operators.start} to {options.operators.stop - 1} operators",
            remedy="Ask for 1 problem or more, of 1 operator or more, as in --operators 1..6",
            location="--operators",
        )
    if options.length < 2:
        raise DataError(
            f"sequences of {options.length} tokens hold no problem",
            remedy="Raise --length: N operators with their solution take at most 2 N (N + 1) + 3 tokens",
            location="--length",
        )
    found = problems(options.operators, options.problems, options.seed, held_out=options.held_out)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder) / "arithmetic")
        tokenizer = load_tokenizer(Path(folder) / "arithmetic")
        source = {
            "task": "arithmetic",
            "operators": [options.operators.start, options.operators.stop - 1],
            "problems": options.problems,
            "seed": options.seed,
            "held_out": options.held_out,
        }
        record = PromptAnswerRecord(task="arithmetic", seq_len_tokens=options.length)
        contents = Contents(tokenizer, resolve_rule(options.segments, tokenizer), source, record)
        examples = _examples(tokenizer, found)
        return write_examples(options.output, contents, examples, overwrite=options.overwrite, total=options.problems)


def _examples(tokenizer: Tokenizer, found: Iterable[Problem]) -> Iterator[Example]:
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
