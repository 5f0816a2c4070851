"""What the names of positional encodings stand for: the one table that all other parts ask.

An encoding has up to two parts: an absolute one, which is added to the token embeddings, and a relative one, at work in
every attention layer. The bilevel encodings give the first the place in the segment and the second the number of the
segment: any absolute part (`model.intra_encoding`) goes with any relative part (`model.encoding: bipe_...`).
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

NONE = "none"


class Relative(NamedTuple):
    """A relative part: where its class is, and what has to be known before it is made."""

    made_by: str
    """MODULE:NAME under `megatron_bipe/model/positions/`."""
    rotates: bool = False
    """It rotates pairs of channels: head widths are even, and `rope_scaling` stretches its positions."""
    max_seq_len_tokens: int | None = None
    """Beyond this its numbers would not be exact, or leave the range of their type; None: it has no such limit."""


class Encoding(NamedTuple):
    """The parts of an encoding."""

    absolute: str
    """Key of `ABSOLUTE`; of a bilevel encoding the default of `model.intra_encoding`."""
    relative: str
    """Key of `RELATIVE`."""
    positions: Literal["tokens", "drawn", "segments"] = "tokens"
    """What the parts see. tokens: the place in the window. drawn: in training random places that keep the order, else
    evenly spread ones. segments: the absolute part the place in the segment, the relative part the segment's number."""


# An absolute part: what makes it, as in `Relative`.
ABSOLUTE: Mapping[str, str | None] = {
    NONE: None,
    "learned": "absolute:learned",
    "sinusoidal": "absolute:Sinusoidal",
}
RELATIVE: Mapping[str, Relative] = {
    "rope": Relative("rotary:Rotary", rotates=True),
    "alibi": Relative("alibi:Alibi", max_seq_len_tokens=2**16),
    "xpos": Relative("xpos:Xpos", rotates=True, max_seq_len_tokens=2**14),
    "t5": Relative("t5:T5Bias"),
    "nope": Relative("base:RelativeEncoding"),
}
ENCODINGS: Mapping[str, Encoding] = {
    **{f"bipe_{name}": Encoding("learned", name, "segments") for name in RELATIVE},
    **{name: Encoding(NONE, name) for name in RELATIVE},
    **{name: Encoding(name, "nope") for name in ABSOLUTE if name != NONE},
    "randomized_rope": Encoding(NONE, "rope", "drawn"),
}


def known_encoding(name: str) -> str:
    """The name of an encoding, if it is one.

    Raises:
        ValueError: it is none; lists those there are.
    """
    return _known(name, ENCODINGS)


def known_absolute(name: str) -> str:
    """The name of an absolute part, if it is one.

    Raises:
        ValueError: it is none; lists those there are.
    """
    return _known(name, ABSOLUTE)


def _known(name: str, table: Mapping[str, object]) -> str:
    if name not in table:
        raise ValueError(f"Input should be one of {', '.join(table)}")
    return name
