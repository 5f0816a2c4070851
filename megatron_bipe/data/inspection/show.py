"""Drawing of a document with its segments and both ids of every token. Torch-free."""

import unicodedata
from collections.abc import Iterator

import numpy as np

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.segments import bilevel_ids
from megatron_bipe.data.tokenizer import Tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.types import BoolArray, TokenArray

BACKGROUNDS = ("\x1b[48;5;24m\x1b[38;5;231m", "\x1b[48;5;94m\x1b[38;5;231m")  # blue, ochre; white text on both
FAINT, RESET = "\x1b[2m", "\x1b[0m"
VISIBLE = {" ": "·", "\n": "↵", "\t": "⇥"}  # marks for invisible characters
MARGIN = 8  # width of the column of inter ids


def show_document(
    dataset: TokenDataset, tokenizer: Tokenizer, document: int, max_tokens: int, *, color: bool, width: int
) -> str:
    """Draw a document as text, with the inter id to the left of each segment and the intra id under each token.

    Args:
        dataset: dataset that holds the document.
        tokenizer: tokenizer that the dataset was made with.
        document: number of the document in the dataset, from 0.
        max_tokens: number of tokens to draw, from the first one.
        color: mark segments by alternating ANSI backgrounds.
        width: line width in columns.

    Raises:
        DataError: the document does not exist, or the index is damaged.
    """
    name, tokens_T, ends_T = read_document(dataset, document)
    shown_T, shown_ends_T = tokens_T[:max_tokens], ends_T[:max_tokens]
    intra_T, inter_T = bilevel_ids(shown_ends_T, clip=shown_T.size)
    lines = [
        f"document {document} of {dataset.manifest.num_documents:,} ({name}): {tokens_T.size:,} tokens, "
        f"{np.count_nonzero(ends_T):,} segment ends by rule {dataset.rule.spec}",
        f"{'inter':>{MARGIN - 2}}  token, and its intra id below it",
    ]
    cells = [visible_text(tokenizer, int(token)) for token in shown_T]
    first = 0
    for inter, length in enumerate(np.bincount(inter_T).tolist()):
        stop = first + length
        segment = list(zip(cells[first:stop], intra_T[first:stop].tolist(), strict=True))
        background = BACKGROUNDS[inter % 2] if color else ""
        lines.extend(_draw_segment(inter, segment, background, width))
        first = stop
    if shown_T.size < tokens_T.size:
        lines.append(f"... {tokens_T.size - shown_T.size:,} more tokens")
    return "\n".join(lines)


def read_document(dataset: TokenDataset, document: int) -> tuple[str, TokenArray, BoolArray]:
    """Return shard name, tokens and segment ends of a document; raise DataError if it does not exist."""
    left = document
    for shard in dataset.shards:
        if 0 <= left < shard.num_documents:
            start, stop = shard.document_bounds[left : left + 2].tolist()
            return shard.name, shard.tokens(start, stop), shard.ends(start, stop)
        left -= shard.num_documents
    count = dataset.manifest.num_documents
    what = f"document {document} does not exist; the dataset has {count} documents"
    raise DataError(what, remedy="Number documents from 0", location=f"{dataset.path}, --document")


def _draw_segment(inter: int, segment: list[tuple[str, int]], background: str, width: int) -> Iterator[str]:
    """Yield two lines, tokens and their intra ids, for each row of tokens that fits the width."""
    margin = f"{inter:>{MARGIN - 2}}  "
    for row in _rows(segment, max(width - MARGIN, 1)):
        sizes = [max(_columns(text), len(str(intra))) for text, intra in row]
        tokens = " ".join(text + " " * (size - _columns(text)) for (text, _), size in zip(row, sizes, strict=True))
        ids = " ".join(f"{intra:<{size}}" for (_, intra), size in zip(row, sizes, strict=True)).rstrip()
        yield margin + (f"{background}{tokens}{RESET}" if background else tokens.rstrip())
        yield " " * MARGIN + (f"{FAINT}{ids}{RESET}" if background else ids)
        margin = " " * MARGIN


def _rows(segment: list[tuple[str, int]], width: int) -> Iterator[list[tuple[str, int]]]:
    row: list[tuple[str, int]] = []
    used = 0
    for text, intra in segment:
        size = max(_columns(text), len(str(intra))) + 1
        if row and used + size > width:
            yield row
            row, used = [], 0
        row.append((text, intra))
        used += size
    if row:
        yield row


def visible_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text with whitespace marked, else its role as a special token, else its number."""
    text = tokenizer.text_of(token)
    if text:
        return "".join(VISIBLE.get(char) or printable(char) for char in text)
    roles = [role for role, special in tokenizer.special_ids.items() if special == token]
    return f"<{roles[0]}>" if roles else f"#{token}"


def printable(char: str) -> str:
    """Return the character, or its escape sequence if it is a control character."""
    return char if char.isprintable() else char.encode("unicode_escape").decode()


def _columns(text: str) -> int:
    """Return the number of terminal columns that a text occupies."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
