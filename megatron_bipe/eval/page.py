"""Self-contained HTML pages: one skeleton, one style sheet and the elements of every report of this project.

A page loads nothing: its content security policy forbids it. It suits wide screens, phones, light and dark schemes, and
paper. Arguments whose names end in `html` are HTML; all others are text and are escaped here. Torch-free.
"""

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from itertools import groupby
from typing import NamedTuple

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.inspection.show import VISIBLE, read_document, visible_text
from megatron_bipe.data.segments import bilevel_ids
from megatron_bipe.data.tokenizer import Tokenizer

STYLE_NAME = "page.css"  # in this package
NUM_TINTS = 5  # segment colours in the style sheet
MAX_DOCUMENTS = 300  # searched for a readable passage
MIN_SEGMENTS, MAX_SEGMENTS, MIN_SEGMENT_TOKENS = 3, 7, 4


class Section(NamedTuple):
    """A part of a page with its own heading."""

    heading: str
    html: str


class Passage(NamedTuple):
    """The first tokens of a document with both ids."""

    document: int
    texts: list[str]
    """Printable form of each token, with visible white space."""
    intra: list[int]
    inter: list[int]


def page(
    title: str, lead_html: str, sections: Iterable[Section], eyebrow: str = "megatron_bipe", more_style: str = ""
) -> str:
    """Return a complete HTML document.

    Args:
        title: title of the browser window and of the page.
        lead_html: content between the title and the first section.
        sections: sections in order.
        eyebrow: small line above the title.
        more_style: style sheet in addition to that of all pages.
    """
    style = resources.files(__package__).joinpath(STYLE_NAME).read_text(encoding="utf-8") + more_style
    body = "".join(f"<section>\n<h2>{escape(part.heading)}</h2>\n{part.html}\n</section>\n" for part in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f'<header>\n<p class="eyebrow">{escape(eyebrow)}</p>\n<h1>{escape(title)}</h1>\n{lead_html}\n</header>\n'
        f"{body}</main>\n</body>\n</html>\n"
    )


def paragraph(html: str, kind: str = "") -> str:
    return f'<p class="{escape(kind)}">{html}</p>\n' if kind else f"<p>{html}</p>\n"


def figure(html: str, caption_html: str) -> str:
    return f"<figure>\n{html}<figcaption>{caption_html}</figcaption>\n</figure>\n"


def details(summary: str, html: str) -> str:
    """Return a block that expands when its summary is clicked."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{html}</details>\n"


def table(
    header_html: Sequence[str], rows_html: Iterable[Sequence[str]], row_kinds: Sequence[str] = (), kind: str = ""
) -> str:
    """Return a table whose first column names the rows; a table that is too wide scrolls.

    Args:
        header_html: cells of the header.
        rows_html: cells of the other rows.
        row_kinds: CSS class of each row, if any.
        kind: CSS class of the table, if any.
    """
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header_html)
    lines = []
    for number, (first, *others) in enumerate(rows_html):
        row_kind = f' class="{escape(row_kinds[number])}"' if row_kinds and row_kinds[number] else ""
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        lines.append(f'<tr{row_kind}><th scope="row">{first}</th>{cells}</tr>\n')
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>"
    start = f'<table class="{escape(kind)}">' if kind else "<table>"
    return f'<div class="scroll">{start}\n{body}\n</table></div>\n'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return (value, label) pairs as a row of large figures."""
    tiles = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(label)}</dt></div>" for value, label in pairs)
    return f'<dl class="facts">{tiles}</dl>\n'


def definitions(pairs_html: Iterable[tuple[str, str]]) -> str:
    """Return (term, HTML) pairs as a two-column list."""
    lines = "".join(f"<dt>{escape(term)}</dt><dd>{html}</dd>\n" for term, html in pairs_html)
    return f'<dl class="terms">\n{lines}</dl>\n'


def bars(values: Sequence[tuple[str, float]], show: str = "{:,.1f}") -> str:
    """Return (name, number) pairs as horizontal bars in the given order; `show` formats a number."""
    most = max((value for _, value in values), default=0) or 1
    lines = "".join(
        f'<li><span>{escape(name)}</span><i style="--share:{max(value, 0) / most:.4f}"></i>'
        f"<b>{show.format(value)}</b></li>\n"
        for name, value in values
    )
    return f'<ol class="bars">\n{lines}</ol>\n'


def commands(lines: str) -> str:
    """Return shell commands; long lines wrap between words, with an indent."""
    shown = "\n".join(
        f"<span>{' '.join(f'<i>{escape(word)}</i>' if word else '' for word in line.split(' '))}</span>"
        for line in lines.splitlines()
    )
    return f'<pre class="commands"><code>{shown}</code></pre>\n'


def png(data_base64: str, description: str) -> str:
    """Return a PNG embedded in the page."""
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data_base64}">\n'


def read_passage(dataset: TokenDataset, tokenizer: Tokenizer, document: int, max_tokens: int) -> Passage:
    """Read a document's first tokens, up to the end of the last complete segment.

    Raises:
        DataError: the dataset has no such document, or is damaged.
    """
    _, tokens_T, ends_T = read_document(dataset, document)
    tokens_T, ends_T = tokens_T[:max_tokens], ends_T[:max_tokens]
    complete = ends_T.nonzero()[0]
    stop = int(complete[-1]) + 1 if complete.size else tokens_T.size
    intra_T, inter_T = bilevel_ids(ends_T[:stop], clip=max_tokens)
    texts = [visible_text(tokenizer, int(token)) for token in tokens_T[:stop]]
    return Passage(document, texts, intra_T.tolist(), inter_T.tolist())


def readable_passage(dataset: TokenDataset, tokenizer: Tokenizer, max_tokens: int) -> Passage:
    """Return the beginning of the document that shows segments best: several segments, many letters per token.

    Raises:
        DataError: the dataset has no documents, or is damaged.
    """
    count = max(1, min(dataset.manifest.num_documents, MAX_DOCUMENTS))
    passages = [read_passage(dataset, tokenizer, document, max_tokens) for document in range(count)]
    return max(passages, key=_clarity)


def segments_view(passage: Passage) -> str:
    """Return the boxes, and a table of the same numbers for screen readers."""
    rows = list(zip(passage.texts, passage.intra, passage.inter, strict=True))
    segments = []
    for inter, tokens in groupby(rows, key=lambda row: row[2]):
        boxes = "".join(token_box(text, str(intra), str(inter)) for text, intra, _ in tokens)
        segments.append(f'<div class="segment t{inter % NUM_TINTS}">{boxes}</div>\n')
    cells = [[f"<code>{escape(text)}</code>", str(inter), str(intra)] for text, intra, inter in rows]
    return f'<div class="tokens" aria-hidden="true">\n{"".join(segments)}</div>\n' + details(
        "The same as a table", table(["token", "inter id", "intra id"], cells)
    )


def token_box(text: str, intra: str, inter: str) -> str:
    shown = escape(text)
    for mark in VISIBLE.values():
        shown = shown.replace(mark, f"<i>{mark}</i>")
    above, below = f'<small class="inter">{inter}</small>', f'<small class="intra">{intra}</small>'
    return f'<span class="token">{above}<b>{shown}</b>{below}</span>'


def _clarity(passage: Passage) -> tuple[bool, float]:
    lengths = [len(list(tokens)) for _, tokens in groupby(passage.inter)]
    is_clear = MIN_SEGMENTS <= len(lengths) <= MAX_SEGMENTS and min(lengths) >= MIN_SEGMENT_TOKENS
    letters = sum(char.isalpha() for text in passage.texts for char in text)
    return is_clear, letters / max(len(passage.texts), 1)
