"""The text of single tokens of a `tokenizer.json` inside a sequence, for the two common kinds of vocabulary.

SentencePiece vocabularies write a space as U+2581 and rare characters as byte tokens such as `<0x0A>`. Byte-level BPE
(GPT-2) writes every byte as one printable character.
"""

from pathlib import Path
from typing import Any

from megatron_bipe.data.sentencepiece_json import SPACE_MARK
from megatron_bipe.errors import DataError


def json_token_texts(
    spec: dict[str, Any], vocabulary: dict[str, int], special: set[int], location: Path
) -> dict[int, str | None]:
    """Return the text of every id in `vocabulary`; None for special tokens and incomplete UTF-8 characters.

    Args:
        spec: parsed tokenizer.json; raises DataError if its vocabulary is of neither kind.
        vocabulary: ids by token, including added tokens.
        special: ids without text.
        location: path of the file, for messages.
    """
    steps = _decoder_steps(spec)
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        characters = byte_characters()
        return {i: None if i in special else _byte_level_text(t, characters) for t, i in vocabulary.items()}
    if "Metaspace" in kinds or any(step.get("pattern") == {"String": SPACE_MARK} for step in steps):
        fallback = "ByteFallback" in kinds
        return {i: None if i in special else _piece_text(t, fallback) for t, i in vocabulary.items()}
    raise DataError(
        f"The text of single tokens is unknown for a decoder of type {sorted(map(str, kinds)) or 'none'}; "
        "SentencePiece and byte-level vocabularies are supported",
        remedy="Give the segment rule as fixed:N or as a list of token ids",
        location=location,
    )


def parse_byte_token(token: str) -> int | None:
    """Return the byte that a token such as `<0x0A>` stands for, or None."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            return None
    return None


def byte_characters() -> dict[str, int]:
    """Return the alphabet of byte-level BPE: printable Latin-1 is unchanged, other bytes are U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


def _decoder_steps(spec: dict[str, Any]) -> list[dict[str, Any]]:
    decoder = spec.get("decoder") or {}
    return list(decoder.get("decoders", [decoder] if decoder else []))


def _piece_text(token: str, byte_fallback: bool) -> str | None:
    byte = parse_byte_token(token) if byte_fallback else None
    if byte is not None:
        return chr(byte) if byte < 0x80 else None
    return token.replace(SPACE_MARK, " ")


def _byte_level_text(token: str, characters: dict[str, int]) -> str | None:
    try:
        content = bytes(characters[character] for character in token)
    except KeyError:  # an added token, whose text is literal
        return token
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None
