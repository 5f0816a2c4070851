"""Accuracy of a model's final numbers on arithmetic problems, by the number of operators."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from megatron_bipe.eval.generation import Generator, Limits, generate_batches
from megatron_bipe.eval.report import write_files
from megatron_bipe.tasks.arithmetic.problems import Problem, final_answer, problems
from megatron_bipe.text_table import csv_text, text_table

JSON_NAME, CSV_NAME = "arithmetic.json", "arithmetic.csv"
SPARE = 1.25  # length limit relative to the longest correct solution: another order of steps may be longer
TRIES = 20  # draws per requested problem: few operators allow few distinct problems


class Accuracy(NamedTuple):
    """Result for problems with the same number of operators."""

    operators: int
    num_problems: int
    num_right: int
    num_tokens: int
    """Tokens of the longest problem with its solution."""

    @property
    def share(self) -> float:
        """Fraction of correct answers, 0 to 1."""
        return self.num_right / self.num_problems


def held_out_problems(operators: int, count: int, seed: int) -> list[Problem]:
    """Return distinct held-out problems, at most `count`."""
    drawn = problems(range(operators, operators + 1), TRIES * count, seed, held_out=True)
    return list({problem.prompt: problem for problem in drawn}.values())[:count]


def solve_all(
    generator: Generator,
    asked: Sequence[Problem],
    batch_tokens: int,
    advance: Callable[[int], object] | None = None,
) -> Accuracy:
    """Generate solutions to problems with one number of operators and compare the final numbers.

    Raises:
        ConfigError: the longest problem and its solution exceed the sequence length that the model supports.
    """
    encode, bos_id = generator.tokenizer.encode_batch, generator.tokenizer.bos_id
    prompts = [np.concatenate([[bos_id], ids]) for ids in encode([problem.prompt for problem in asked])]
    longest = max(ids.size for ids in encode([problem.answer for problem in asked])) + 1
    prompt_tokens, new_tokens = max(prompt.size for prompt in prompts), int(SPARE * longest)
    if (room := generator.max_seq_len_tokens) is not None:  # the correct solution must fit
        new_tokens = max(longest, min(new_tokens, room - prompt_tokens))
    found = generate_batches(generator, prompts, Limits(new_tokens, batch_tokens), advance)
    texts = [generator.tokenizer.decode(ids) for ids in found]
    right = sum(final_answer(text) == problem.value for text, problem in zip(texts, asked, strict=True))
    return Accuracy(asked[0].operators, len(asked), right, prompt_tokens + longest)


def measure_accuracies(
    generator: Generator, name: str, asked: Sequence[Sequence[Problem]], batch_tokens: int
) -> list[Accuracy]:
    """Solve the problems of each number of operators with the model `name`; progress is shown on a terminal."""
    with tqdm(total=sum(map(len, asked)), desc=name, unit=" problems", disable=None) as bar:
        return [solve_all(generator, each, batch_tokens, bar.update) for each in asked]


def write_results(folder: Path, about: Mapping[str, Any], found: Mapping[str, Sequence[Accuracy]]) -> list[Path]:
    models = [
        {"name": name, "results": [each._asdict() | {"accuracy": each.share} for each in results]}
        for name, results in found.items()
    ]
    rows = [(name, *each, each.share) for name, results in found.items() for each in results]
    contents = {
        JSON_NAME: json.dumps({**about, "models": models}, indent=2) + "\n",
        CSV_NAME: csv_text([("model", *Accuracy._fields, "accuracy"), *rows]),
    }
    return write_files(folder, contents)


def as_table(found: Mapping[str, Sequence[Accuracy]]) -> str:
    """Return accuracies in percent as text: one row per model, one column per number of operators."""
    first = next(iter(found.values()))
    rows = [["operators", *(str(each.operators) for each in first)]]
    rows.append(["problems", *(str(each.num_problems) for each in first)])
    rows += [[name, *(f"{each.share:.1%}" for each in results)] for name, results in found.items()]
    return text_table(rows, head=2)
