"""Results of the paper: perplexity against sequence length for models of 151M parameters, trained at 1,024 tokens.

Source: He et al. 2024 (arXiv 2401.16421), Figure 4, digitised: about +-0.2 on PG-19, +-0.06 on the others.
"""

from typing import NamedTuple


class PaperCurve(NamedTuple):
    """One line of the figure."""

    name: str
    encoding: str
    """This project's name of the encoding."""
    points: tuple[tuple[int, float], ...]
    """(sequence length in tokens, perplexity)."""


def _curve(name: str, encoding: str, **perplexities: float) -> PaperCurve:
    return PaperCurve(name, encoding, tuple((1024 * int(key[1:]), value) for key, value in perplexities.items()))


# Values beyond the figure's upper limit, 80, are omitted.
PAPER: dict[str, tuple[PaperCurve, ...]] = {
    "PG-19": (
        _curve("BiPE-RoPE", "bipe_rope", k1=19, k2=18.5, k3=18.7, k4=19.8, k5=22.7, k6=28.6, k7=36.6, k8=45.8),
        _curve("BiPE-ALiBi", "bipe_alibi", k1=19.6, k2=20.3, k3=22.3, k4=23.5, k5=24.2, k6=24.7, k7=25.1, k8=25.3),
        _curve("ALiBi", "alibi", k1=19, k2=19, k3=22, k4=24.4, k5=26, k6=27.2, k7=27.9, k8=28.6),
        _curve("XPOS", "xpos", k1=19.5, k2=21.3, k3=28.2, k4=35.6, k5=43.4, k6=51.7, k7=60.4, k8=69),
        _curve("Randomized RoPE", "randomized_rope", k1=23.4, k2=24.6, k3=25.5, k4=26.4, k5=39, k6=67),
        _curve("RoPE", "rope", k1=19, k2=41),
        _curve("Sinusoidal", "sinusoidal", k1=20),
    ),
    "ArXiv": (
        _curve("BiPE-RoPE", "bipe_rope", k1=6.1, k2=5.7, k4=6.0, k8=10.94),
        _curve("BiPE-ALiBi", "bipe_alibi", k1=6.15, k2=5.7, k4=6.0, k8=6.48),
        _curve("ALiBi", "alibi", k1=5.9, k2=5.5, k4=6.5, k8=6.95),
        _curve("XPOS", "xpos", k2=6.26, k4=10.6, k8=19),
    ),
    "GitHub": (
        _curve("BiPE-RoPE", "bipe_rope", k1=3.1, k2=2.9, k4=3.4, k8=11.75),
        _curve("BiPE-ALiBi", "bipe_alibi", k1=3.15, k2=3.09, k4=3.38, k8=3.6),
        _curve("ALiBi", "alibi", k8=4.12),
        _curve("XPOS", "xpos", k4=5.3, k8=13.8),
    ),
}
_WORDS = {"PG-19": ("pg-19", "pg19", "gutenberg"), "ArXiv": ("arxiv",), "GitHub": ("github",)}


def paper_subset(data_name: str) -> str | None:
    """Return the paper's subset that a dataset name identifies, e.g. PG-19 for gutenberg-pg-19; else None."""
    found = [subset for subset, words in _WORDS.items() if any(word in data_name.lower() for word in words)]
    return found[0] if len(found) == 1 else None
