"""Pictures as files: PNG, PDF and SVG with the same bytes in every process, in the widths of a paper.

matplotlib takes a second to import, so only the functions that draw import it.
"""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from megatron_bipe.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Format = Literal["png", "pdf", "svg"]
Width = Literal["column", "page"]
Measure = Literal["perplexity", "nats", "bits-per-byte"]
FORMATS: tuple[Format, ...] = get_args(Format)
MEASURES: tuple[Measure, ...] = get_args(Measure)
WIDTHS_IN: Mapping[Width, float] = {"column": 3.3, "page": 6.8}  # of papers with two columns
PNG_DPI = 200
# Okabe and Ito's palette, distinguishable with any colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
GREY, GRID = "#666666", "#e6e6e6"
FONT = "DejaVu Sans"  # matplotlib contains it
_METADATA: Mapping[Format, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Creator": None, "Date": None},
}


class PictureSettings(NamedTuple):
    """What a user chooses about the pictures of a command."""

    formats: Sequence[Format] = FORMATS
    title: str = ""
    """Empty: the title that the command gives it."""
    width: Width = "page"
    measure: Measure = "perplexity"
    """Quantity of the vertical axis, in commands that offer a choice."""


DEFAULT_PICTURE = PictureSettings()


@contextmanager
def drawing() -> Iterator[None]:
    """Set matplotlib up: names are shown as they are, and fonts are embedded (PDF) or text remains text (SVG)."""
    import matplotlib as mpl

    settings: dict[Any, Any] = {
        "font.family": FONT,
        "text.parse_math": False,  # a $ in a name is a character
        "text.usetex": False,
        "pdf.fonttype": 42,  # TrueType: publishers refuse the default, type 3
        "svg.fonttype": "none",
        "svg.hashsalt": "megatron_bipe",  # ids that do not change from one file to the next
        "axes.linewidth": 0.6,
    }
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it logs each table of a font that it embeds
    with mpl.rc_context(settings):
        yield


def save_figure(figure: "Figure", kind: Format) -> bytes:
    """Return the file's contents."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with drawing():
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=PNG_DPI, metadata=_METADATA[kind])
    return buffer.getvalue()


def picture_files(stem: str, figure: "Figure", formats: Sequence[Format] = FORMATS) -> dict[str, bytes]:
    """Return the contents of STEM.png and so on, by name."""
    return {f"{stem}.{kind}": save_figure(figure, kind) for kind in formats}


def picture_names(stem: str) -> list[str]:
    """Return the names of all files that `picture_files` can make."""
    return [f"{stem}.{kind}" for kind in FORMATS]


def picture_format(file: Path) -> Format:
    """Return the format that a file's suffix names.

    Raises:
        ConfigError: it names none of `FORMATS`.
    """
    suffix = file.suffix.lower().removeprefix(".")
    for kind in FORMATS:
        if kind == suffix:
            return kind
    raise ConfigError(
        f"the suffix {file.suffix!r} is not that of a picture",
        remedy=f"Use one of {', '.join(f'.{kind}' for kind in FORMATS)}",
        location=file,
    )


def parse_formats(text: str) -> tuple[Format, ...]:
    """Return the formats of a comma-separated list, each once.

    Raises:
        ConfigError: the list is empty, or has an unknown name.
    """
    names = dict.fromkeys(name.strip().lower() for name in text.split(","))
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        raise ConfigError(
            f"{unknown[0]!r} is not a format of pictures", remedy=f"Use {','.join(FORMATS)}", location="--formats"
        )
    return tuple(kind for kind in FORMATS if kind in names)


def check_title(title: str) -> None:
    """Refuse a title that pictures cannot show.

    Raises:
        ConfigError: it has control characters or parts of broken encodings, or characters without a glyph.
    """
    if not title.isprintable():
        broken = next(character for character in title if not character.isprintable())
        raise ConfigError(
            f"the title has the character {broken!r}, which cannot be printed", remedy="Remove it", location="--title"
        )
    missing = "" if title.isascii() else _without_glyph(title)
    if missing:
        raise ConfigError(
            f"the font, {FONT}, has no glyph for {missing!r}",
            remedy="Use other characters, or write the title in the document that shows the picture",
            location="--title",
        )


def printable(name: str) -> str:
    """Return a name of a folder or model for a picture: what cannot be printed becomes the replacement character."""
    return "".join(character if character.isprintable() else "\ufffd" for character in name)


def _without_glyph(text: str) -> str:
    """Return the characters that the font lacks, each once."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=[FONT])))
    return "".join(dict.fromkeys(character for character in text if not font.get_char_index(ord(character))))
