"""Accuracy on arithmetic: correct answers, and the selection of problems."""

import csv
import json

import pytest

from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.eval.generation import Generator
from megatron_bipe.tasks.arithmetic import evaluate
from megatron_bipe.tasks.arithmetic.problems import Problem, is_held_out, write_tokenizer

PROBLEMS = [Problem("1+2*3=", "1+6=7", 2), Problem("2*2-4=", "4-4=0", 2), Problem("1+9+0=", "10+0=10", 2)]


@pytest.fixture
def generator(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    return Generator(None, load_tokenizer(tmp_path / "tokenizer"), None)  # its output is given


@pytest.mark.parametrize(
    ("answers", "num_right"),
    [
        (["1+6=7", "4-4=0", "10+0=10"], 3),
        (["7", "0", "10"], 3),  # the final number alone is judged
        (["1+6=6=7", "4-4=", "10+0=1"], 1),
        (["", "1+1", "10=10+0"], 0),
    ],
)
def test_answer_is_right_if_it_ends_with_the_value(monkeypatch, generator, answers, num_right):
    asked = {}

    def generate(_, prompts, limits, advance):
        asked.update(prompts=[prompt.tolist() for prompt in prompts], new_tokens=limits.new_tokens)
        return [ids.tolist() for ids in generator.tokenizer.encode_batch(answers)]

    monkeypatch.setattr(evaluate, "generate_batches", generate)
    found = evaluate.solve_all(generator, PROBLEMS, 1000)
    assert (found.operators, found.num_problems, found.num_right) == (2, 3, num_right)
    assert found.share == num_right / 3
    assert asked["prompts"][0] == [1, *generator.tokenizer.encode_batch(["1+2*3="])[0].tolist()]
    assert asked["new_tokens"] == 7  # a quarter more than 5 and EOS
    assert found.num_tokens == 1 + 6 + 6


@pytest.mark.parametrize(("longest", "new_tokens"), [(13, 6), (14, 7), (15, 7), (12, 6)])
def test_generation_ends_with_the_positions_of_the_model(monkeypatch, generator, longest, new_tokens):
    asked = []

    def generate(_, prompts, limits, advance):
        asked.append(limits.new_tokens)
        return [[] for _ in prompts]

    monkeypatch.setattr(evaluate, "generate_batches", generate)
    evaluate.solve_all(generator._replace(max_seq_len_tokens=longest), PROBLEMS, 1000)
    assert asked == [new_tokens]  # always for the longest correct solution, which is refused if it does not fit


def test_asked_problems_are_held_out_and_differ():
    asked = evaluate.held_out_problems(3, 100, seed=1)
    assert len({problem.prompt for problem in asked}) == 100
    assert all(is_held_out(problem.prompt) and problem.operators == 3 for problem in asked)
    assert asked == evaluate.held_out_problems(3, 100, seed=1)
    few = evaluate.held_out_problems(1, 100, seed=1)  # there are fewer with one operator
    assert 20 < len(few) < 100


def test_results_are_written_and_shown_by_model(tmp_path):
    found = {
        "one": [evaluate.Accuracy(1, 4, 4, 7), evaluate.Accuracy(2, 4, 3, 15)],
        "two": [evaluate.Accuracy(1, 4, 0, 7), evaluate.Accuracy(2, 4, 1, 15)],
    }
    evaluate.write_results(tmp_path, {"seed": 0}, found)
    report = json.loads((tmp_path / "arithmetic.json").read_text())
    assert [model["results"][1]["accuracy"] for model in report["models"]] == [0.75, 0.25]
    with (tmp_path / "arithmetic.csv").open(newline="") as file:
        assert [row["accuracy"] for row in csv.DictReader(file)] == ["1.0", "0.75", "0.0", "0.25"]
    lines = evaluate.as_table(found).splitlines()
    assert [line.split() for line in (lines[0], lines[1], lines[4])] == [
        ["operators", "1", "2"],
        ["problems", "4", "4"],
        ["two", "0.0%", "25.0%"],
    ]
