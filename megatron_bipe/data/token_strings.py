"""The text of single tokens of a `tokenizer.json`, and the conversion of a SentencePiece model to such a file.

The two common kinds of vocabulary are supported. SentencePiece vocabularies write a space as U+2581 and rare characters
as byte tokens such as `<0x0A>`. Byte-level BPE (GPT-2) writes every byte as one printable character.
"""

from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, normalizers, processors
from tokenizers.models import BPE

from megatron_bipe.errors import DataError

SPACE_MARK = "\u2581"  # SentencePiece's mark for a space


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


def sentencepiece_to_json(model: bytes) -> bytes:
    """Convert the content of a `tokenizer.model` to that of a `tokenizer.json`.

    Vocabulary, merges, byte fallback and leading BOS are kept; normalizer and decoder are LLaMA's. The ids can differ
    for models with their own normalizer or user-defined symbols, so the caller must compare them.
    """
    source = sentencepiece.SentencePieceProcessor()
    source.load_from_serialized_proto(model)
    ids = range(source.get_piece_size())
    special = [i for i in ids if source.is_control(i) or source.is_unknown(i)]
    unknown = source.id_to_piece(source.unk_id())
    result = tokenizers.Tokenizer(
        BPE(
            vocab={source.id_to_piece(i): i for i in ids},
            merges=_merges(source, special),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(source.is_byte(i) for i in ids),
        )
    )
    result.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), normalizers.Replace(" ", SPACE_MARK)])
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    result.decoder = decoders.Sequence(steps)
    result.add_special_tokens(
        [tokenizers.AddedToken(source.id_to_piece(i), normalized=False, special=True) for i in special]
    )
    if source.bos_id() >= 0:
        bos = source.id_to_piece(source.bos_id())
        result.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, source.bos_id())]
        )
    return result.to_str(pretty=True).encode() + b"\n"


def _merges(source: sentencepiece.SentencePieceProcessor, special: list[int]) -> list[tuple[str, str]]:
    """Return every split of a piece into two pieces, in the order in which SentencePiece prefers the results."""
    merged = [i for i in range(source.get_piece_size()) if not (source.is_byte(i) or source.is_unused(i))]
    pieces = {source.id_to_piece(i): i for i in merged if i not in set(special)}
    found = [
        (-source.get_score(i), pieces[piece[:cut]], pieces[piece[cut:]])
        for piece, i in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return [(source.id_to_piece(left), source.id_to_piece(right)) for _, left, right in sorted(found)]
