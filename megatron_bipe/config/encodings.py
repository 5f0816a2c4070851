"""Registry of the positional encodings by name; all other modules look them up here.

An encoding has up to two parts: an absolute one, which is added to the token embeddings, and a relative one, which acts
in every attention layer. A bilevel encoding gives the position in the segment to the absolute part and the index of the
segment to the relative part: any absolute part (`model.intra_encoding`) works with any relative part (`bipe_...`).
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

NONE = "none"


class Relative(NamedTuple):
    """A relative part: its class, and properties that are needed before it is created."""

    class_path: str
    """MODULE:NAME under `megatron_bipe/model/positions/`."""
    rotates: bool = False
    """True if it rotates pairs of channels: head widths must be even, and `rope_scaling` stretches its positions."""
    max_seq_len_tokens: int | None = None
    """Longest sequence for which its values are exact and within the range of their type; None: no limit."""


class Encoding(NamedTuple):
    """The parts of an encoding and the positions that they receive."""

    absolute: str
    """Key of `ABSOLUTE`; for a bilevel encoding, the default of `model.intra_encoding`."""
    relative: str
    """Key of `RELATIVE`."""
    positions: Literal["tokens", "drawn", "segments"] = "tokens"
    """tokens: positions in the sequence. drawn: random increasing positions in training, evenly spaced ones otherwise.
    segments: the absolute part receives the position in the segment, the relative part the index of the segment."""


# MODULE:NAME of each absolute part, as in `Relative.class_path`.
ABSOLUTE: Mapping[str, str | None] = {
    NONE: None,
    "learned": "absolute:learned",
    "sinusoidal": "absolute:Sinusoidal",
}
RELATIVE: Mapping[str, Relative] = {
    "rope": Relative("rotary:Rotary", rotates=True),
    "alibi": Relative("bias:Alibi", max_seq_len_tokens=2**16),
    "xpos": Relative("rotary:Xpos", rotates=True, max_seq_len_tokens=2**14),
    "t5": Relative("bias:T5Bias"),
    "nope": Relative("base:RelativeEncoding"),
}
ENCODINGS: Mapping[str, Encoding] = {
    **{f"bipe_{name}": Encoding("learned", name, "segments") for name in RELATIVE},
    **{name: Encoding(NONE, name) for name in RELATIVE},
    **{name: Encoding(name, "nope") for name in ABSOLUTE if name != NONE},
    "randomized_rope": Encoding(NONE, "rope", "drawn"),
}


def known_encoding(name: str) -> str:
    """Return `name` if it is an encoding.

    Raises:
        ValueError: it is not; the message lists all encodings.
    """
    return _known(name, ENCODINGS)


def known_absolute(name: str) -> str:
    """Return `name` if it is an absolute part.

    Raises:
        ValueError: it is not; the message lists all absolute parts.
    """
    return _known(name, ABSOLUTE)


def _known(name: str, registry: Mapping[str, object]) -> str:
    if name not in registry:
        raise ValueError(f"Input should be one of {', '.join(registry)}")
    return name
