"""Conversion of a SentencePiece BPE model to a `tokenizer.json` in LLaMA's layout."""

import sentencepiece
import tokenizers
from tokenizers import decoders, normalizers, processors
from tokenizers.models import BPE

SPACE_MARK = "\u2581"  # SentencePiece's mark for a space


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
