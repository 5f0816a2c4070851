"""Additions that make a trained SentencePiece model a tokenizer in LLaMA's layout."""

import json
from typing import Any

from megatron_bipe.data.token_strings import SPACE_MARK
from megatron_bipe.errors import DataError

STOP_PIECE = SPACE_MARK + "."  # a full stop after a space: half of the segment rule `reference`
SPECIAL_TOKENS = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}
NORMAL = 1  # ModelProto.SentencePiece.Type in SentencePiece's sentencepiece_model.proto

Model = Any  # sentencepiece_model_pb2.ModelProto, a generated class without types


def ensure_stop_piece(model: Model) -> bool:
    """Ensure that `STOP_PIECE` is a token, and return True if it had to be added.

    It replaces the last merge, on which no other merge builds, so the tokens change only in texts that used that merge
    and at full stops after a space. (A user-defined symbol would be split off everywhere before all merges.)

    Raises:
        DataError: there is no merge to replace.
    """
    if any(piece.piece == STOP_PIECE for piece in model.pieces):
        return False
    merges = [piece for piece in model.pieces if piece.type == NORMAL and len(piece.piece) > 1]
    if not merges:
        raise DataError(
            "The vocabulary has no room for a single merge",
            remedy="Give a larger --vocab-size",
            location="--vocab-size",
        )
    min(merges, key=lambda piece: piece.score).piece = STOP_PIECE
    return True


def settings_files() -> dict[str, bytes]:
    """Return the contents of tokenizer_config.json and special_tokens_map.json.

    The class is not LlamaTokenizer: for that one, transformers 5 ignores the normaliser in tokenizer.json and builds
    its own, which gives other ids.
    """
    tokens = {f"{role}_token": token for role, token in SPECIAL_TOKENS.items()}
    config = {
        **tokens,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),  # transformers' value for no limit
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    contents = {"tokenizer_config.json": config, "special_tokens_map.json": tokens}
    return {name: json.dumps(content, indent=2).encode() + b"\n" for name, content in contents.items()}
