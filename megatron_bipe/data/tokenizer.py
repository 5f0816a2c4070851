"""Tokenizers, loaded from their own definition files: `tokenizer.json`, else `tokenizer.model`.

`transformers` is avoided on purpose: its `AutoTokenizer` replaces LLaMA's normalizer, which changes the ids of a few
percent of documents. `data.token_strings` gives the text of single ids.
"""

import hashlib
import json
import logging
import re
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

from megatron_bipe.data.hub import LFS_REMEDY, LFS_START, protect_token, require_no_path
from megatron_bipe.data.manifest import TokenizerRecord
from megatron_bipe.data.token_strings import SPACE_MARK, json_token_texts, parse_byte_token, sentencepiece_to_json
from megatron_bipe.errors import DataError

DEFINITIONS = ("tokenizer.json", "tokenizer.model")  # in order of preference
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
COMPANIONS = (*DEFINITIONS, *SETTINGS, "added_tokens.json", "vocab.json", "merges.txt")
ROLES = ("bos", "eos", "unk", "pad")
USUAL_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>", "[BOS]")  # used if no settings file names one
TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")  # a token in base64, and its rank

log = logging.getLogger(__name__)


class Tokenizer(ABC):
    """Interface of a tokenizer, independent of the library that runs it.

    Attributes:
        definition: file that defines the ids; `fingerprint` is the SHA-256 of its bytes, in hex.
        files: the definition and its settings files; `copy_to` stores them with a dataset or a model.
        special_ids: ids by role: always `bos`, and `eos`, `unk`, `pad` if they exist.
        vocab_size: largest id plus one.
        special_in_text: True if the name of a special token in a text becomes that token.
    """

    definition: Path
    files: list[Path]
    name: str
    fingerprint: str
    vocab_size: int
    special_ids: dict[str, int]
    special_in_text: bool

    @property
    def record(self) -> TokenizerRecord:
        """Record for the manifest of a dataset."""
        return TokenizerRecord(
            name=self.name,
            fingerprint=self.fingerprint,
            vocab_size=self.vocab_size,
            special_ids=self.special_ids,
        )

    @property
    def bos_id(self) -> int:
        """Id of the token that starts a document."""
        return self.special_ids["bos"]

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text, or None."""
        return self.special_ids.get("eos")

    @property
    def unk_id(self) -> int | None:
        """Id of the token for text that the vocabulary cannot express, or None."""
        return self.special_ids.get("unk")

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Return the token ids of each text without BOS and EOS, using one core."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a token sequence, without special tokens."""

    @abstractmethod
    def text_of(self, token_id: int) -> str | None:
        """Return the text of one token inside a sequence; None for special, unused and partial-character tokens."""

    @abstractmethod
    def to_json(self) -> bytes:
        """Return a `tokenizer.json` for these ids; one converted from a SentencePiece model must be compared."""

    def copy_to(self, folder: Path) -> None:
        """Copy the tokenizer's files into `folder`, where `load_tokenizer(folder)` then finds the same tokenizer."""
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
        except Exception as error:  # the library raises a bare Exception for any invalid file
            raise _damaged(definition, error) from error
        # By default, the library turns "<s>" in raw text into the BOS token.
        self._backend.encode_special_tokens = not special_in_text
        self.special_in_text = special_in_text
        self._backend.no_truncation()
        self._backend.no_padding()
        self.definition, self.files, self.name = definition, files, name
        self.fingerprint = hashlib.sha256(content).hexdigest()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        unknown = spec.get("model", {}).get("unk_token")
        self.special_ids = _special_ids(files, vocabulary, {"unk": unknown} if unknown else {}, definition)
        if special_in_text:  # tokens that only a settings file calls special are found in a text, too
            names = {token for token, number in vocabulary.items() if number in self.special_ids.values()}
            known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
            if self._backend.add_special_tokens(sorted(names - known)):
                content = self._backend.to_str().encode()
        self._json = content
        self._spec = spec
        self._texts: dict[int, str | None] | None = None

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        encode = self._backend.encode_batch_fast  # one text per call: the library would spread a batch over all cores
        return [np.array(encode([text], add_special_tokens=False)[0].ids, dtype=np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode([int(token) for token in ids], skip_special_tokens=True))

    def text_of(self, token_id: int) -> str | None:
        """Return the text of one token; raise DataError if the decoder is neither SentencePiece's nor byte-level."""
        if self._texts is None:
            vocabulary = self._backend.get_vocab(with_added_tokens=True)
            special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
            special |= set(self.special_ids.values())
            self._texts = json_token_texts(self._spec, vocabulary, special, self.definition)
        return self._texts.get(token_id)

    def to_json(self) -> bytes:
        return self._json


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model`, run by the `sentencepiece` library; control symbols in raw text are plain text."""

    special_in_text = False

    def __init__(self, definition: Path, files: list[Path], name: str) -> None:
        content = definition.read_bytes()
        try:
            self._backend = sentencepiece.SentencePieceProcessor()
            self._backend.load_from_serialized_proto(content)
        except Exception as error:  # RuntimeError for most damaged files, other types for an empty file
            if TIKTOKEN_LINE.match(content):
                raise _tiktoken_error(definition) from error
            raise _damaged(definition, error) from error
        self.definition, self.files, self.name = definition, files, name
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.vocab_size = self._backend.get_piece_size()
        vocabulary = {self._backend.id_to_piece(i): i for i in range(self.vocab_size)}
        own = {role: getattr(self._backend, f"{role}_id")() for role in ROLES}
        named = {role: self._backend.id_to_piece(i) for role, i in own.items() if i >= 0}
        self.special_ids = _special_ids(files, vocabulary, named, definition)

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        return [np.array(ids, dtype=np.int32) for ids in self._backend.encode(list(texts), num_threads=1)]

    def decode(self, ids: Sequence[int]) -> str:
        special = set(self.special_ids.values())
        return str(self._backend.decode([int(token) for token in ids if token not in special]))

    def text_of(self, token_id: int) -> str | None:
        model = self._backend
        if not 0 <= token_id < self.vocab_size or token_id in self.special_ids.values():
            return None
        if model.is_control(token_id) or model.is_unknown(token_id) or model.is_unused(token_id):
            return None
        piece = model.id_to_piece(token_id)
        if model.is_byte(token_id):
            byte = parse_byte_token(piece)
            return chr(byte) if byte is not None and byte < 0x80 else None
        return str(piece).replace(SPACE_MARK, " ")

    def to_json(self) -> bytes:
        return sentencepiece_to_json(self.definition.read_bytes())


def load_tokenizer(path: str | Path, special_in_text: bool = False) -> Tokenizer:
    """Load a tokenizer from a folder, a definition file, or the Hugging Face Hub.

    Args:
        path: folder with `tokenizer.json` (preferred) or `tokenizer.model`, one of these files, or a name on the Hub.
        special_in_text: parse a literal "<s>" in raw text as the special token instead of plain characters.

    Raises:
        DataError: the definition is missing, damaged or without BOS, or `special_in_text` needs a tokenizer.json.
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
    """Return the definition file, and all files that belong to it (the definition first)."""
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
    # For an explicit file, skip the other definition next to it, which could take precedence after copying.
    rivals = DEFINITIONS if location.is_file() else ()
    names = [n for n in COMPANIONS if n not in rivals and n != definition.name and (folder / n).is_file()]
    return definition, [definition, *(folder / n for n in names)]


def _canonical_name(definition: Path) -> str:
    return DEFINITIONS[0] if definition.suffix == ".json" else DEFINITIONS[1]


def _download(name: str) -> Path:
    """Return the folder of a Hub repository's tokenizer files, from the local cache or downloaded.

    Raises:
        DataError: the name looks like a mistyped path, or nothing can be downloaded under it.
    """
    require_no_path(name)
    protect_token()
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(COMPANIONS)))
    except Exception as error:  # of many types: bad name, no such repository, gated, no network
        raise DataError(
            f"There is no such file or folder, and no tokenizer could be downloaded from the Hub under that name "
            f"({type(error).__name__})",
            remedy="Check the path, or make a tokenizer with tools/train_tokenizer.py",
            location=name,
        ) from error
    log.info("%s is not a path here: using the tokenizer of this name on the Hub, commit %s", name, folder.name)
    return folder


def _special_ids(
    files: list[Path], vocabulary: dict[str, int], built_in: dict[str, str], definition: Path
) -> dict[str, int]:
    """Return ids by role. Settings files override the definition; a usual BOS name is the last resort."""
    named = dict(built_in)
    for file in files:
        if file.name in SETTINGS:
            named |= _roles_in(file)
    if named.get("bos") not in vocabulary:
        named |= {"bos": next((token for token in USUAL_BOS if token in vocabulary), "")}
    ids = {role: vocabulary[named[role]] for role in ROLES if named.get(role) in vocabulary}
    if "bos" not in ids:
        raise DataError(
            "The tokenizer has no beginning-of-sequence token, which must start every document",
            remedy='Name one as "bos_token" in a tokenizer_config.json next to it',
            location=definition,
        )
    return ids


def _roles_in(file: Path) -> dict[str, str]:
    """Return the special tokens that a settings file names: {"bos": "<s>", ...}."""
    try:
        settings: Any = json.loads(file.read_bytes())
        entries = {role: settings.get(f"{role}_token") for role in ROLES}
        contents = {role: entry["content"] if isinstance(entry, dict) else entry for role, entry in entries.items()}
    except (ValueError, AttributeError, KeyError) as error:
        raise _damaged(file, error) from error
    return {role: content for role, content in contents.items() if isinstance(content, str)}


def _tiktoken_error(file: Path) -> DataError:
    return DataError(
        "This is a vocabulary of tiktoken, which lacks the rule by which text is split; a tokenizer.model must be of "
        "SentencePiece",
        remedy="Use the tokenizer.json of the same model: its repository on the Hub has one, or transformers makes one "
        "(transformers.integrations.tiktoken.convert_tiktoken_to_fast)",
        location=file,
    )


def _damaged(file: Path, error: Exception) -> DataError:
    if file.read_bytes().startswith(LFS_START):
        what = "This is a pointer of Git LFS to a file that was not fetched"
        return DataError(what, remedy=LFS_REMEDY, location=file)
    return DataError(
        f"The tokenizer file cannot be read: {error or type(error).__name__}",
        remedy="Download or make it again",
        location=file,
    )
