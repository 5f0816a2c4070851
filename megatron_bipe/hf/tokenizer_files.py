"""Tokenizer files of an exported model, for which `AutoTokenizer` returns the token ids of training.

transformers 5 rebuilds LLaMA's tokenizer from its vocabulary with a different normaliser, unless the settings name the
generic class, which runs `tokenizer.json` unchanged. The ids are compared in any case.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import processors

from megatron_bipe.errors import CheckpointError
from megatron_bipe.hf.hf_config import with_padding
from megatron_bipe.hf.transformers_models import load_auto_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_SPACE = "\u2581"  # SentencePiece's symbol for a space

# Each text gets different ids in some tokenizer class, normaliser or version.
HARD_TEXTS = (
    "",
    " ",
    "Hello world",
    " leading",
    "  two spaces  inside,   three ",
    "a\nb\n\n c\r\n\td\n",
    "He stopped . Then...\nNo.\" (Yes.) 'So.' .5 1.000,00",
    "<s>text</s> <unk> <0x0A> <|endoftext|> [INST]",
    f"{_SPACE}sign {_SPACE}{_SPACE} of a space",
    "de\u0301compose\u0301 \u00e9 \ufb01ne \u2460 \uff21\uff22 \u212b \u1e9b\u0323",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \u6f22\u5b57\u3002\u5b57",
    "\u0627\u0644\u0639 \u0939\u093f\u0928\u094d\u0926\u0940 \ud55c",
    "a\u200bb\u00a0c\u2028d\ufeffe\u00adf \x01\x7f \u0085",
    "def f(x):\n    return {'a': x ** 2}  # 100%\n\n\n\nclass B:\n\tpass",
    "0123456789 3.14159 0x1F -17 1e-5",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\u00ff\u0100\U0010fffd",
    "long " * 1500,
)


class TokenizerSource(NamedTuple):
    """The tokenizer with which the training data was made."""

    definition: Path
    json: bytes
    """Content as a tokenizer.json, converted if `definition` is a tokenizer.model."""
    special_ids: Mapping[str, int]
    """Token ids by role: bos, and if they exist eos, unk and pad."""
    encode: Callable[[Sequence[str]], Sequence[Iterable[int]]]
    """Encodes texts as training does, without BOS and EOS."""
    special_in_text: bool = False
    """True if `encode` turns the name of a special token in a text into that token."""


def write_tokenizer(source: TokenizerSource, folder: Path, num_rows: int) -> None:
    """Write the tokenizer files into `folder` and verify them.

    Args:
        source: tokenizer to write.
        folder: model folder that already holds config.json.
        num_rows: rows of the model's token embedding.

    Raises:
        CheckpointError: `AutoTokenizer` returns other ids than training used, or ids outside the token embedding.
    """
    if source.definition.suffix == ".model":
        shutil.copyfile(source.definition, folder / source.definition.name)
    (folder / "tokenizer.json").write_bytes(source.json)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if "bos" in source.special_ids and not _prepends_bos(backend, source.special_ids["bos"]):
        _prepend_bos(backend, source.special_ids["bos"])
        backend.save(str(folder / "tokenizer.json"))
    largest = max(backend.get_vocab(with_added_tokens=True).values())
    if largest >= num_rows:
        raise CheckpointError(
            f"the tokenizer has ids up to {largest}, but the model's token embedding has {num_rows} rows",
            remedy="Use the tokenizer that the model was trained with",
            location=source.definition,
        )
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": not source.special_in_text,  # True: "<s>" within a text is three plain characters
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],  # the default adds token_type_ids
    }
    for role, token in with_padding(source.special_ids).items():
        settings[f"{role}_token"] = backend.id_to_token(token)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
    check_tokenizer(folder, source, (*HARD_TEXTS, *_texts_with_added_tokens(backend)))


def _texts_with_added_tokens(backend: tokenizers.Tokenizer) -> Iterator[str]:
    """Yield texts that contain each added token: at the start, within a word, between spaces and at the end."""
    for token in backend.get_added_tokens_decoder().values():
        name = token.content
        yield f"{name}user{name} said {name} \n{name}"


def _prepends_bos(backend: tokenizers.Tokenizer, bos_id: int) -> bool:
    return list(backend.encode("a").ids) == [bos_id, *backend.encode("a", add_special_tokens=False).ids]


def _prepend_bos(backend: tokenizers.Tokenizer, bos_id: int) -> None:
    """Add a post-processor that prepends BOS: transformers ignores `add_bos_token` if there is a tokenizer.json."""
    bos = backend.id_to_token(bos_id)
    template = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, bos_id)]
    )
    own = backend.post_processor
    offsets_only = isinstance(own, processors.ByteLevel)
    backend.post_processor = processors.Sequence([own, template]) if offsets_only else template


def check_tokenizer(folder: Path, source: TokenizerSource, texts: Sequence[str] = HARD_TEXTS) -> None:
    """Raise CheckpointError if `AutoTokenizer` encodes a text differently from training, with or without BOS."""
    loaded = load_auto_tokenizer(folder)
    opening = [source.special_ids["bos"]] if "bos" in source.special_ids else []
    for text, trained in zip(texts, source.encode(texts), strict=True):
        expected = [int(token) for token in trained]
        plain = list(loaded(text, add_special_tokens=False)["input_ids"])
        opened = list(loaded(text)["input_ids"])
        if plain != expected or opened != opening + expected:
            shown = text if len(text) < 60 else text[:60] + "..."
            raise CheckpointError(
                f"AutoTokenizer returns ids that differ from training's for {shown!r}: {opened[:12]} instead of "
                f"{(opening + expected)[:12]}",
                remedy="Use the tokenizer files with which the data was made",
                location=source.definition,
            )
