"""Problems modulo 11: correct by an independent evaluation, solved step by step, never in two sets."""

import ast
import operator

import numpy as np
import pytest

from megatron_bipe.data.discovery import open_tokenizer
from megatron_bipe.data.prompt_answer import open_dataset
from megatron_bipe.data.segments import resolve_rule
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.tasks.arithmetic.problems import (
    MODULUS,
    SYMBOLS,
    apply,
    final_answer,
    is_held_out,
    problems,
    solve,
    write_tokenizer,
)
from preprocessing.arithmetic import ArithmeticOptions, prepare_arithmetic
from tests.helpers.errors import raises

WAYS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda left, right: left * pow(right, MODULUS - 2, MODULUS),
}


def value_of(expression: str) -> int:
    """As Python reads it; a division by 0 fails."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            assert right or not isinstance(node.op, ast.Div), expression
            return WAYS[type(node.op)](left, right) % MODULUS
        assert isinstance(node, ast.Constant)
        return node.value

    return value(ast.parse(expression, mode="eval").body)


def count_operators(expression: str) -> int:
    return sum(character in "+-*/" for character in expression)


def test_every_rewrite_has_the_value_and_an_operator_less():
    for problem in problems(range(1, 9), 500, seed=3, held_out=False):
        steps = (problem.prompt + problem.answer).split("=")
        assert [count_operators(step) for step in steps] == list(range(problem.operators, -1, -1))
        assert {value_of(step) for step in steps} == {int(problem.value)}
        assert not is_held_out(problem.prompt)


@pytest.mark.parametrize(
    ("expression", "steps"),
    [
        ("7*5/(6+8-3*2)", ["2/(6+8-3*2)", "2/(3-3*2)", "2/(3-6)", "2/8", "3"]),
        ("8-3-2", ["5-2", "3"]),
        ("8-3*2-10", ["8-6-10", "2-10", "3"]),
        ("2-(1+1)*3+4", ["2-2*3+4", "2-6+4", "7+4", "0"]),
        ("8/2/3", ["4/3", "5"]),
        ("4/(2*(1+10+2))", ["4/(2*(0+2))", "4/(2*2)", "4/4", "1"]),
    ],
)
def test_solution_does_the_first_operation_that_can_be_done(expression, steps):
    tokens = expression.replace("10", "t")
    found = ["".join(step) for step in solve(["10" if token == "t" else token for token in tokens])]
    assert found == steps


def test_division_is_by_the_inverse_and_never_by_0():
    assert all(apply("*", apply("/", a, b), b) == a for a in range(MODULUS) for b in range(1, MODULUS))
    with pytest.raises(ValueError, match="invertible"):
        apply("/", 3, 0)


def test_problems_are_the_same_for_a_seed_and_never_both_trained_on_and_tested():
    training = list(problems(range(1, 4), 3000, 0, held_out=False))
    assert training == list(problems(range(1, 4), 3000, 0, held_out=False))
    assert training != list(problems(range(1, 4), 3000, 1, held_out=False))
    test = list(problems(range(1, 4), 3000, 0, held_out=True))
    assert not {problem.prompt for problem in training} & {problem.prompt for problem in test}
    sizes = [problem.operators for problem in training]
    assert [sizes.count(size) / 3000 for size in (1, 2, 3)] == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=0.04)
    shares = [is_held_out(problem.prompt) for problem in problems(range(3, 4), 1, 0, held_out=True)]
    assert shares == [True]


def test_values_and_operators_are_spread_evenly():
    found = list(problems(range(4, 5), 4000, 5, held_out=False))
    values = [int(problem.value) for problem in found]
    assert min(values.count(value) for value in range(MODULUS)) > 250  # of 364 on average
    text = "".join(problem.prompt for problem in found)
    assert all(0.2 < text.count(symbol) / 16_000 < 0.3 for symbol in "+-*/")


def test_tokenizer_has_21_symbols_one_a_token(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == len(SYMBOLS) == 21
    assert tokenizer.special_ids == {"pad": 0, "bos": 1, "eos": 2}
    (ids,) = tokenizer.encode_batch(["10*(1+0)-10/9="])
    assert [SYMBOLS[token] for token in ids] == ["10", "*", "(", "1", "+", "0", ")", "-", "10", "/", "9", "="]
    assert tokenizer.decode([1, *ids, 2]) == "10*(1+0)-10/9="
    assert resolve_rule('["="]', tokenizer).token_ids == (20,)
    assert final_answer("2/8=3") == "3" and final_answer("10") == "10"


def options(tmp_path, **changes):
    given = {"output": tmp_path / "out", "operators": range(1, 4), "problems": 50, "length": 32}
    return ArithmeticOptions(**given | changes)


def test_dataset_has_a_problem_a_window_with_segments_that_end_at_equals(tmp_path):
    made = prepare_arithmetic(options(tmp_path))
    assert made.examples is not None and (made.examples.task, made.examples.seq_len_tokens) == ("arithmetic", 32)
    dataset, tokenizer = open_dataset(tmp_path / "out"), open_tokenizer(open_dataset(tmp_path / "out"))
    expected = list(problems(range(1, 4), 50, 0, held_out=False))
    assert dataset.num_sequences(32) == 50
    tokens, ends = dataset.sequences(np.arange(50), 32)
    for row, (problem, (first, stop)) in enumerate(zip(expected, dataset.answers(np.arange(50)), strict=True)):
        assert tokenizer.decode(tokens[row][: first + 1]) == problem.prompt
        assert tokenizer.decode(tokens[row][first + 1 : stop]) == problem.answer
        assert tokens[row, stop] == tokenizer.eos_id and SYMBOLS[tokens[row, first]] == "="
        assert ends[row].sum() == problem.operators


def test_bad_options_and_problems_longer_than_a_window_are_refused(tmp_path):
    for wrong, observed in (
        ({"operators": range(3)}, (50, 0, 2)),
        ({"operators": range(3, 3)}, (50, 3, 2)),
        ({"problems": 0}, (0, 1, 3)),
    ):
        with raises(DataError, *observed, location="--operators", remedy="--operators"):
            prepare_arithmetic(options(tmp_path, **wrong))
    for length in (1, 0, -5):
        with raises(DataError, length, location="--length"):
            prepare_arithmetic(options(tmp_path, length=length))
    with raises(DataError, 12, location="problem 1, of 3 operators", remedy="--length 21"):
        prepare_arithmetic(options(tmp_path, length=12))
    with raises(DataError, "'.'", location="--segments"):
        prepare_arithmetic(options(tmp_path, segments='["."]'))
    assert not (tmp_path / "out").exists()
