"""Arithmetic modulo 11, solved step by step: problems, their solutions, and a tokenizer for them. Torch-free.

    7*5/(6+8-3*2)=2/(6+8-3*2)=2/(3-3*2)=2/(3-6)=2/8=3

The prompt ends with the first `=`; the answer is the text after it. Each step applies the leftmost operation that is
reducible, so that a problem has one solution.

Source: the task of Feng et al. 2023, "Towards Revealing the Mystery behind Chain of Thought". As in the paper: the
field, the symbols, and the growth of an expression, which replaces random numbers by operations of the same value.
Ours: the order of operations, and that a hash selects the test problems.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tokenizers

MODULUS = 11
EQUALS = "="
RANK = {"+": 0, "-": 0, "*": 1, "/": 1}  # operator precedence: the higher is applied first
SPECIAL = ("<pad>", "<s>", "</s>")
SYMBOLS = (*SPECIAL, *map(str, range(MODULUS)), *RANK, "(", ")", EQUALS)
HELD_OUT_ONE_IN = 10  # one in this many problems is held out


class Problem(NamedTuple):
    """An expression and its solution."""

    prompt: str  # expression and `=`
    answer: str  # all steps, joined by `=`; the last is the value
    operators: int

    @property
    def value(self) -> str:
        """Number at the end of the answer."""
        return final_answer(self.answer)


def problems(operators: range, count: int, seed: int, *, held_out: bool) -> Iterator[Problem]:
    """Generate random problems, the same for the same arguments. None is both held out and not.

    Args:
        operators: numbers of operators; problems with k operators occur in proportion to k.
        count: number of problems; duplicates are possible.
        seed: seed of the generator.
        held_out: True: problems for tests; False: for training.
    """
    chooser = random.Random(f"{seed} {operators} {held_out}")
    weights = list(operators)
    while count:
        (size,) = chooser.choices(operators, weights)
        tokens = _expression(chooser, size)
        prompt = "".join([*tokens, EQUALS])
        if is_held_out(prompt) == held_out:
            count -= 1
            yield Problem(prompt, EQUALS.join(map("".join, solve(tokens))), size)


def is_held_out(prompt: str) -> bool:
    """Return True if a problem is reserved for tests."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


def final_answer(text: str) -> str:
    """Return the text after the last `=`."""
    return text.rpartition(EQUALS)[2]


def solve(tokens: list[str]) -> Iterator[list[str]]:
    """Yield the expression after each step, with one operator fewer, down to a number."""
    while len(tokens) > 1:
        index = next(index for index in range(1, len(tokens) - 1) if _is_reducible(tokens, index))
        left, operator, right = tokens[index - 1 : index + 2]
        bracketed = tokens[index - 2 : index - 1] == ["("] and tokens[index + 2 : index + 3] == [")"]
        first, stop = (index - 2, index + 3) if bracketed else (index - 1, index + 2)
        tokens = [*tokens[:first], str(apply(operator, int(left), int(right))), *tokens[stop:]]
        yield tokens


def apply(operator: str, left: int, right: int) -> int:
    """Apply one operation modulo 11; division multiplies by the inverse, which 0 does not have."""
    if operator == "/":
        return left * pow(right, -1, MODULUS) % MODULUS
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % MODULUS


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer folder with one token per symbol; numbers are not separated by spaces, and 10 is one symbol."""
    ids = {symbol: number for number, symbol in enumerate(SYMBOLS)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=[("1", "0")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    roles = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(roles) + "\n", encoding="utf-8")


@dataclass
class _Node:
    """Node of an expression tree: a number, or an operation with that value."""

    value: int
    operator: str = ""
    left: "_Node | None" = None
    right: "_Node | None" = None

    def grow(self, chooser: random.Random) -> tuple["_Node", "_Node"]:
        """Turn a number into an operation of the same value on two numbers; return both."""
        self.operator = chooser.choice(list(RANK))
        right = chooser.randrange(RANK[self.operator], MODULUS)  # excludes 0 for `*` and `/`: division needs an inverse
        undo = {"+": "-", "-": "+", "*": "/", "/": "*"}[self.operator]
        self.left, self.right = _Node(apply(undo, self.value, right)), _Node(right)
        return self.left, self.right

    def tokens(self) -> list[str]:
        """Return the expression with the brackets that its value requires."""
        if self.left is None or self.right is None:
            return [str(self.value)]
        rank, parts = RANK[self.operator], []
        for node, is_right in ((self.left, False), (self.right, True)):
            own = RANK.get(node.operator, 2)
            bracketed = own < rank or (is_right and own == rank and self.operator in "-/")
            parts.append(["(", *node.tokens(), ")"] if bracketed else node.tokens())
        return [*parts[0], self.operator, *parts[1]]


def _expression(chooser: random.Random, operators: int) -> list[str]:
    root = _Node(chooser.randrange(MODULUS))
    numbers = [root]
    for _ in range(operators):
        numbers += numbers.pop(chooser.randrange(len(numbers))).grow(chooser)
    return root.tokens()


def _is_reducible(tokens: list[str], index: int) -> bool:
    """Return True for an operator between two numbers whose right number no higher operator claims.

    The first such operator can always be applied: an operator before it that could claim its left number would be
    reducible itself, or follow a bracket that contains a reducible one.
    """
    rank = RANK.get(tokens[index])
    if rank is None or not (tokens[index - 1].isdigit() and tokens[index + 1].isdigit()):
        return False
    return index + 2 == len(tokens) or RANK.get(tokens[index + 2], -1) <= rank
