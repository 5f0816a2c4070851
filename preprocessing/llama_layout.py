"""What a SentencePiece model needs besides its training to be a tokenizer in LLaMA's layout."""

import json
from typing import Any

from megatron_bipe.data.sentencepiece_json import SPACE_MARK
from megatron_bipe.errors import DataError

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
            location="--vocab-size",
        )
    min(merges, key=lambda piece: piece.score).piece = STOP_PIECE
    return True


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
