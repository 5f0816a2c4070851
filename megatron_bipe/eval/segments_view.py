"""HTML view of a document's tokens as coloured boxes, one row per segment, with inter ids above and intra ids below."""

from html import escape
from itertools import groupby
from typing import NamedTuple

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.inspection.show import VISIBLE, read_document, visible_text
from megatron_bipe.data.segments import bilevel_ids
from megatron_bipe.data.tokenizer import Tokenizer
from megatron_bipe.eval.page import NUM_TINTS, details, table

MAX_DOCUMENTS = 300  # searched for a readable passage
MIN_SEGMENTS, MAX_SEGMENTS, MIN_SEGMENT_TOKENS = 3, 7, 4


class Passage(NamedTuple):
    """The first tokens of a document with both ids."""

    document: int
    texts: list[str]
    """Printable form of each token, with visible white space."""
    intra: list[int]
    inter: list[int]


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
