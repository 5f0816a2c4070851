"""LLaMA's tokenizer.json, made from a SentencePiece BPE model, and the settings files that go with it."""

import json
from typing import Any

from megatron_bipe.errors import DataError

SPACE_MARK = "\u2581"
STOP_PIECE = SPACE_MARK + "."  # a full stop after a space: half of the segment rule `reference`
SPECIAL_TOKENS = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}
NORMAL = 1  # ModelProto.SentencePiece.Type in SentencePiece's sentencepiece_model.proto

Model = Any  # sentencepiece_model_pb2.ModelProto, a generated class without types


def ensure_stop_piece(model: Model) -> bool:
    """Make sure that `STOP_PIECE` is a token; returns whether it had to be added.

    It takes the place of the last merge, which no other merge builds on, so only texts that used that merge, and
    full stops after a space, are cut differently. (A user-defined symbol would cut every "▁." out before all merges.)

    Raises:
        DataError: there is no merge to take the place of.
    """
    if any(piece.piece == STOP_PIECE for piece in model.pieces):
        return False
    merges = [piece for piece in model.pieces if piece.type == NORMAL and len(piece.piece) > 1]
    if not merges:
        raise DataError(
            "The vocabulary has no room for a single merge",
            remedy="Give a larger --vocab-size",
            place="--vocab-size",
        )
    min(merges, key=lambda piece: piece.score).piece = STOP_PIECE
    return True


def tokenizer_json(model: Model) -> bytes:
    """The same tokenizer for the `tokenizers` library: normaliser, merges, byte fallback and decoder as LLaMA's."""
    vocabulary = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(vocabulary[token], token) for token in SPECIAL_TOKENS.values()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE_MARK},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _bos_template(vocabulary[SPECIAL_TOKENS["bos"]]),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": SPECIAL_TOKENS["unk"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": _merges(model, vocabulary),
        },
    }
    return json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n"


def settings_files() -> dict[str, bytes]:
    """tokenizer_config.json and special_tokens_map.json.

    The class is not LlamaTokenizer: for that one, transformers 5 builds a normaliser of its own instead of the one in
    tokenizer.json, and other ids come out.
    """
    tokens = {f"{role}_token": token for role, token in SPECIAL_TOKENS.items()}
    config = {
        **tokens,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),  # transformers' way of saying that there is none
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    contents = {"tokenizer_config.json": config, "special_tokens_map.json": tokens}
    return {name: json.dumps(content, indent=2).encode() + b"\n" for name, content in contents.items()}


def _merges(model: Model, vocabulary: dict[str, int]) -> list[str]:
    """Pairs in the order in which SentencePiece prefers their results, every way to split a piece into two."""
    normal = [piece for piece in model.pieces if piece.type == NORMAL]
    known = {piece.piece for piece in normal}
    found: list[tuple[float, int, int, str]] = []
    for piece in normal:
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in known and right in known:
                found.append((-piece.score, vocabulary[left], vocabulary[right], f"{left} {right}"))
    return [pair for *_, pair in sorted(found)]


def _added_token(token_id: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content, **flags}


def _bos_template(bos_id: int) -> dict[str, Any]:
    bos = SPECIAL_TOKENS["bos"]

    def part(sequence: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": bos, "type_id": type_id}},
            {"Sequence": {"id": sequence, "type_id": type_id}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": part("A", 0) + part("B", 1),
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }
