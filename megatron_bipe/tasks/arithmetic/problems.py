"""Arithmetic modulo 11, solved step by step: problems, their solutions, and a tokenizer for them. Torch-free.

    7*5/(6+8-3*2)=2/(6+8-3*2)=2/(3-3*2)=2/(3-6)=2/8=3

The prompt ends with the first `=`; the answer is all that follows. A rewrite does the first operation from the left
that can be done, so that a problem has one solution.

Source: the task is that of Feng et al. 2023, "Towards Revealing the Mystery behind Chain of Thought". Theirs as here:
the field, the symbols, and that an expression grows by replacing random numbers in it by operations of the same value.
Ours: which operation is done first, and that a test problem is told by a hash.
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
RANK = {"+": 0, "-": 0, "*": 1, "/": 1}  # of operators: the higher is done first
SPECIAL = ("<pad>", "<s>", "</s>")
SYMBOLS = (*SPECIAL, *map(str, range(MODULUS)), *RANK, "(", ")", EQUALS)
HELD_OUT_ONE_IN = 10  # problems


class Problem(NamedTuple):
    """An expression and its solution."""

    prompt: str  # the expression and `=`
    answer: str  # all rewrites, joined by `=`; the last is the value
    operators: int

    @property
    def value(self) -> str:
        """The number that it comes to."""
        return final_answer(self.answer)


def problems(operators: range, count: int, seed: int, *, held_out: bool) -> Iterator[Problem]:
    """Random problems; the same for the same arguments. None is ever both held out and not.

    Args:
        operators: how many a problem may have; those with k come up in proportion to k.
        count: of problems; the same may come twice.
        seed: of the choice.
        held_out: problems for tests, else those for training.
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
    """Whether a problem is one for tests."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


def final_answer(text: str) -> str:
    """What stands behind the last `=`."""
    return text.rpartition(EQUALS)[2]


def solve(tokens: list[str]) -> Iterator[list[str]]:
    """The expressions that follow from one, each with an operator less, down to a number."""
    while len(tokens) > 1:
        place = next(place for place in range(1, len(tokens) - 1) if _can_be_done(tokens, place))
        left, operator, right = tokens[place - 1 : place + 2]
        bracketed = tokens[place - 2 : place - 1] == ["("] and tokens[place + 2 : place + 3] == [")"]
        first, stop = (place - 2, place + 3) if bracketed else (place - 1, place + 2)
        tokens = [*tokens[:first], str(apply(operator, int(left), int(right))), *tokens[stop:]]
        yield tokens


def apply(operator: str, left: int, right: int) -> int:
    """One operation modulo 11; a division is a multiplication by the inverse, which 0 has not."""
    if operator == "/":
        return left * pow(right, -1, MODULUS) % MODULUS
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % MODULUS


def write_tokenizer(folder: Path) -> None:
    """A tokenizer folder with one token a symbol; numbers have no spaces between them, and 10 is one of them."""
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
    """A number, or an operation with that value."""

    value: int
    operator: str = ""
    left: "_Node | None" = None
    right: "_Node | None" = None

    def grow(self, chooser: random.Random) -> tuple["_Node", "_Node"]:
        """Become an operation of the same value on two numbers."""
        self.operator = chooser.choice(list(RANK))
        right = chooser.randrange(RANK[self.operator], MODULUS)  # of what has an inverse, or the next line needs one
        undo = {"+": "-", "-": "+", "*": "/", "/": "*"}[self.operator]
        self.left, self.right = _Node(apply(undo, self.value, right)), _Node(right)
        return self.left, self.right

    def tokens(self) -> list[str]:
        """Written with the brackets that the value needs."""
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


def _can_be_done(tokens: list[str], place: int) -> bool:
    """Whether a token is an operator between two numbers, the second of which no higher operator claims.

    Of the operators for which that holds the first is always free to go: one before it that could claim its first
    number would be free itself, or follow a bracket in which another is.
    """
    rank = RANK.get(tokens[place])
    if rank is None or not (tokens[place - 1].isdigit() and tokens[place + 1].isdigit()):
        return False
    return place + 2 == len(tokens) or RANK.get(tokens[place + 2], -1) <= rank
