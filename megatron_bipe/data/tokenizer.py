"""Tokenizers, read from their own definition files: `tokenizer.json`, else `tokenizer.model`.

`transformers` is left out on purpose: its `AutoTokenizer` replaces LLaMA's normaliser, and a few documents in a
hundred then get other ids. `data.token_strings` tells what text each id stands for.
"""

import hashlib
import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import numpy.typing as npt
import sentencepiece
import tokenizers

from megatron_bipe.data.sentencepiece_json import sentencepiece_to_json
from megatron_bipe.data.token_strings import byte_of, json_token_texts
from megatron_bipe.errors import DataError

DEFINITIONS = ("tokenizer.json", "tokenizer.model")  # in order of preference
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
COMPANIONS = (*DEFINITIONS, *SETTINGS, "added_tokens.json", "vocab.json", "merges.txt")
ROLES = ("bos", "eos", "unk", "pad")
USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>", "[BOS]")  # where no settings file names it

log = logging.getLogger(__name__)


class Tokenizer(ABC):
    """What the project needs of a tokenizer, whichever library runs it.

    Attributes:
        definition: the file that the ids follow from; `fingerprint` is the SHA-256 of its bytes, in hex.
        files: the definition and the settings beside it: what `copy_to` lays beside a dataset or a model.
        special_ids: ids by role: `bos`, and where they exist `eos`, `unk`, `pad`.
        vocab_size: largest id plus one.
    """

    definition: Path
    files: list[Path]
    name: str
    fingerprint: str
    vocab_size: int
    special_ids: dict[str, int]

    @property
    def bos_id(self) -> int:
        """The token that opens a document."""
        return self.special_ids["bos"]

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, or None."""
        return self.special_ids.get("eos")

    @property
    def unk_id(self) -> int | None:
        """The token for what the vocabulary cannot express, or None."""
        return self.special_ids.get("unk")

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Token ids of each text, on one core; no BOS, no EOS."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of a token sequence; special tokens give nothing."""

    @abstractmethod
    def text_of(self, token_id: int) -> str | None:
        """Exact text that this token adds inside a sequence; None for special, unused and partial-character tokens."""

    @abstractmethod
    def to_json(self) -> bytes:
        """Content of a `tokenizer.json` for this tokenizer; for a SentencePiece model a conversion, to be compared."""

    def copy_to(self, folder: Path) -> None:
        """Copy the tokenizer's files into `folder`, named so that `load_tokenizer(folder)` finds the same one."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            is_definition = file == self.definition
            shutil.copyfile(file, folder / (_canonical_name(file) if is_definition else file.name))


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the `tokenizers` library."""

    def __init__(self, definition: Path, files: list[Path], name: str, special_in_text: bool) -> None:
        content = definition.read_bytes()
        try:
            spec = json.loads(content)
            self._backend = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception for whatever it cannot read
            raise _damaged(definition, error) from error
        # Without this, the library cuts "<s>" out of raw text as the BOS token.
        self._backend.encode_special_tokens = not special_in_text
        self._backend.no_truncation()
        self._backend.no_padding()
        self.definition, self.files, self.name = definition, files, name
        self.fingerprint = hashlib.sha256(content).hexdigest()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        unknown = spec.get("model", {}).get("unk_token")
        self.special_ids = _special_ids(files, vocabulary, {"unk": unknown} if unknown else {}, definition)
        self._spec = spec
        self._texts: dict[int, str | None] | None = None

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Token ids of each text; one text a call, since the library would spread a batch over all cores."""
        encode = self._backend.encode_batch_fast
        return [np.array(encode([text], add_special_tokens=False)[0].ids, dtype=np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a token sequence; special tokens give nothing."""
        return str(self._backend.decode([int(token) for token in ids], skip_special_tokens=True))

    def text_of(self, token_id: int) -> str | None:
        """Exact text that this token adds inside a sequence; None for special, unused and partial-character tokens.

        Raises:
            DataError: the file's decoder is neither SentencePiece's nor byte-level.
        """
        if self._texts is None:
            vocabulary = self._backend.get_vocab(with_added_tokens=True)
            special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
            special |= set(self.special_ids.values())
            self._texts = json_token_texts(self._spec, vocabulary, special, self.definition)
        return self._texts.get(token_id)

    def to_json(self) -> bytes:
        """The definition as it is."""
        return self.definition.read_bytes()


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model` alone, run by the `sentencepiece` library; control symbols in raw text are plain text."""

    def __init__(self, definition: Path, files: list[Path], name: str) -> None:
        content = definition.read_bytes()
        try:
            self._backend = sentencepiece.SentencePieceProcessor()
            self._backend.load_from_serialized_proto(content)
        except Exception as error:  # RuntimeError for most damage, others for an empty file
            raise _damaged(definition, error) from error
        self.definition, self.files, self.name = definition, files, name
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.vocab_size = self._backend.get_piece_size()
        vocabulary = {self._backend.id_to_piece(i): i for i in range(self.vocab_size)}
        own = {role: getattr(self._backend, f"{role}_id")() for role in ROLES}
        named = {role: self._backend.id_to_piece(i) for role, i in own.items() if i >= 0}
        self.special_ids = _special_ids(files, vocabulary, named, definition)

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Token ids of each text, on one core; no BOS, no EOS."""
        return [np.array(ids, dtype=np.int32) for ids in self._backend.encode(list(texts), num_threads=1)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a token sequence; special tokens give nothing."""
        special = set(self.special_ids.values())
        return str(self._backend.decode([int(token) for token in ids if token not in special]))

    def text_of(self, token_id: int) -> str | None:
        """Exact text that this token adds inside a sequence; None for special, unused and partial-character tokens."""
        model = self._backend
        if not 0 <= token_id < self.vocab_size or token_id in self.special_ids.values():
            return None
        if model.is_control(token_id) or model.is_unknown(token_id) or model.is_unused(token_id):
            return None
        piece = model.id_to_piece(token_id)
        if model.is_byte(token_id):
            byte = byte_of(piece)
            return chr(byte) if byte is not None and byte < 0x80 else None
        return str(piece).replace("\u2581", " ")

    def to_json(self) -> bytes:
        """The definition converted; whether it gives the same ids, the caller has to check."""
        return sentencepiece_to_json(self.definition.read_bytes())


def load_tokenizer(path: str | Path, special_in_text: bool = False) -> Tokenizer:
    """Load a tokenizer from a folder, a definition file, or by its name on the Hugging Face Hub.

    Args:
        path: folder with `tokenizer.json` (preferred) or `tokenizer.model`; a file of either kind; else a Hub name.
        special_in_text: let a literal "<s>" in raw text become the special token instead of plain characters.

    Raises:
        DataError: nothing there, a damaged definition, no BOS token, or `special_in_text` without a tokenizer.json.
    """
    location = Path(path)
    name = (location.resolve().parent if location.name in DEFINITIONS else location.resolve()).name
    if not location.exists():
        name, location = str(path), _download(str(path))
    definition, files = _find_files(location)
    if definition.suffix == ".json":
        return JsonTokenizer(definition, files, name, special_in_text)
    if special_in_text:
        raise DataError(
            f"Special tokens in raw text need a tokenizer.json; {definition.name} is a SentencePiece model",
            remedy="Convert it to tokenizer.json, or leave special tokens in the text as plain text",
            location=definition,
        )
    return SentencePieceTokenizer(definition, files, name)


def _find_files(location: Path) -> tuple[Path, list[Path]]:
    """The definition file, and all files that belong to it (the definition first)."""
    folder = location if location.is_dir() else location.parent
    definition = (
        location if location.is_file() else next((folder / n for n in DEFINITIONS if (folder / n).is_file()), None)
    )
    if definition is None:
        raise DataError(
            "The folder holds neither tokenizer.json nor tokenizer.model",
            remedy="Give a tokenizer's folder, or make one with tools/train_tokenizer.py",
            location=location,
        )
    # Beside a file that was named outright, another definition would win once both are copied: leave it out.
    rivals = DEFINITIONS if location.is_file() else ()
    names = [n for n in COMPANIONS if n not in rivals and n != definition.name and (folder / n).is_file()]
    return definition, [definition, *(folder / n for n in names)]


def _canonical_name(definition: Path) -> str:
    return DEFINITIONS[0] if definition.suffix == ".json" else DEFINITIONS[1]


def _download(name: str) -> Path:
    """Folder of a Hub repository's tokenizer files, fetched or from the local cache."""
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(COMPANIONS)))
    except Exception as error:  # a dozen kinds: bad name, no such repository, gated, no network
        raise DataError(
            f"There is no such file or folder, and no tokenizer could be had from the Hub under that name "
            f"({type(error).__name__})",
            remedy="Check the path, or make a tokenizer with tools/train_tokenizer.py",
            location=name,
        ) from error


def _special_ids(
    files: list[Path], vocabulary: dict[str, int], built_in: dict[str, str], definition: Path
) -> dict[str, int]:
    """Ids by role; a settings file beats what the definition says, a usual name for BOS comes last."""
    named = dict(built_in)
    for file in files:
        if file.name in SETTINGS:
            named |= _roles_in(file)
    if named.get("bos") not in vocabulary:
        named |= {"bos": next((token for token in USUAL_BOS if token in vocabulary), "")}
    ids = {role: vocabulary[named[role]] for role in ROLES if named.get(role) in vocabulary}
    if "bos" not in ids:
        raise DataError(
            "The tokenizer has no beginning-of-sequence token, which opens every document",
            remedy='Name one as "bos_token" in the tokenizer_config.json beside it',
            location=definition,
        )
    return ids


def _roles_in(file: Path) -> dict[str, str]:
    """Special tokens that a settings file names: {"bos": "<s>", ...}."""
    try:
        settings: Any = json.loads(file.read_bytes())
        entries = {role: settings.get(f"{role}_token") for role in ROLES}
        contents = {role: entry["content"] if isinstance(entry, dict) else entry for role, entry in entries.items()}
    except (ValueError, AttributeError, KeyError) as error:
        raise _damaged(file, error) from error
    return {role: content for role, content in contents.items() if isinstance(content, str)}


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(
        f"The tokenizer file cannot be read: {error or type(error).__name__}",
        remedy="Fetch or make it again",
        location=file,
    )
