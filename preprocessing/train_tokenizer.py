"""Train a tokenizer in LLaMA's layout: SentencePiece BPE with byte fallback, written also as tokenizer.json.

Ids: 0 <unk>, 1 <s>, 2 </s>, 3..258 the bytes (so newline is 13), then merges, then single characters. Nothing is
written before both files have given equal ids on a sample of the training text.
"""

import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as proto

from megatron_bipe.data.token_strings import SPACE_MARK, sentencepiece_to_json
from megatron_bipe.errors import DataError
from megatron_bipe.io import write_atomically
from preprocessing.document_tokenizer import HARD_TEXTS
from preprocessing.line_counts import LineCounts, require_at_least
from preprocessing.readers.documents import read_input, require_formats
from preprocessing.readers.inputs import Input, find_inputs
from preprocessing.readers.lines import LONGEST_LINE_BYTES
from preprocessing.readers.parse import Keys

SAMPLE_BYTES = 100_000_000  # training takes about 1.5 GB of memory: measured, 14 bytes per byte of text
MAX_LINE_BYTES = 4192  # LLaMA's; SentencePiece drops longer lines, so they are split first
CHARACTER_COVERAGE = 0.99995  # LLaMA's; rarer characters are encoded as bytes
RESERVED_CHARACTER = "\u2585"  # SentencePiece's own mark: it drops lines that contain it
STOP_PIECE = SPACE_MARK + "."  # a full stop after a space: half of the segment rule `reference`
SPECIAL_TOKENS = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}
NORMAL = 1  # ModelProto.SentencePiece.Type in SentencePiece's sentencepiece_model.proto

# The sample on which both forms of the tokenizer are compared.
CHECKED_SHARE = 0.01  # of the training text
MIN_CHECKED_CHARS = 200_000  # so that a small training text is checked in full
MAX_CHECKED_CHARS = 4_000_000  # takes a few seconds
MAX_CHARS_A_TEXT = 100_000

Model = Any  # sentencepiece_model_pb2.ModelProto, a generated class without types

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """Options of `tools/train_tokenizer.py`."""

    inputs: Sequence[str]
    vocab_size: int
    output: Path
    sample_bytes: int = SAMPLE_BYTES
    text_key: str = "text"
    max_malformed: int | None = None  # None: the default of `LineCounts`
    max_line_bytes: int = LONGEST_LINE_BYTES
    overwrite: bool = False


def train_tokenizer(options: TrainOptions) -> Path:
    """Train, check and write a tokenizer folder, and return it.

    Raises:
        DataError: bad options or inputs, an existing output, too little text for the vocabulary, or a tokenizer.json
            that disagrees with the model (nothing is written then).
    """
    require_at_least("--sample-bytes", options.sample_bytes, 1)
    require_at_least("--max-malformed", options.max_malformed, 0)
    require_at_least("--max-line-bytes", options.max_line_bytes, 1)
    files = find_inputs(options.inputs)
    if options.output.exists() and not options.output.is_dir():
        raise DataError(
            "The output is a file, but a tokenizer is a folder", remedy="Name another", location=options.output
        )
    names = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
    present = [name for name in names if (options.output / name).exists()]
    if present and not options.overwrite:
        raise DataError(
            f"The output folder holds {', '.join(present)}",
            remedy="Name another folder, or add --overwrite to replace the tokenizer",
            location=options.output,
        )
    require_formats(files)
    sample = CheckSample()
    counts = LineCounts(options.max_malformed)
    lines = _split_lines(sample.collect(_read_texts(files, options, counts)))
    model = _train(lines, options)
    definition = sentencepiece_to_json(model.SerializeToString())
    check_agreement(model.SerializeToString(), definition, sample.texts)
    contents = {"tokenizer.model": model.SerializeToString(), **settings_files(), "tokenizer.json": definition}
    options.output.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_atomically(options.output / name, contents[name])
    return options.output


def _read_texts(inputs: list[Input], options: TrainOptions, counts: LineCounts) -> Iterator[str]:
    """Yield texts up to `sample_bytes`, from the start of every file in proportion to its size on disk."""
    total_bytes = sum(item.size for item in inputs)
    taken_bytes = passed_bytes = 0
    for item in inputs:
        passed_bytes += item.size
        quota_bytes = options.sample_bytes * passed_bytes // max(total_bytes, 1)
        parts = read_input(item, Keys(options.text_key), options.max_line_bytes)
        while taken_bytes < quota_bytes and (parsed := next(parts, None)) is not None:
            counts.add_parsed(parsed)
            for document in parsed.documents:
                if taken_bytes >= quota_bytes:
                    break
                taken_bytes += len(document.text.encode())
                yield document.text
    counts.finish(options.inputs)
    log.info("Training on %.1f MB of text", taken_bytes / 1e6)


def _split_lines(texts: Iterator[str]) -> Iterator[bytes]:
    for text in texts:
        for line in text.replace(RESERVED_CHARACTER, " ").split("\n"):
            if line:
                yield from cut_line(line.encode(), MAX_LINE_BYTES)


def cut_line(line: bytes, max_bytes: int) -> Iterator[bytes]:
    """Split a line into pieces of at most `max_bytes`, at spaces if there are any, else between characters.

    The space at a split is dropped: SentencePiece begins every piece with one anyway.
    """
    while len(line) > max_bytes:
        end = line.rfind(b" ", 1, max_bytes + 1)
        if end > 0:
            yield line[:end]
            line = line[end + 1 :]
            continue
        end = max_bytes
        while end > 1 and line[end] & 0xC0 == 0x80:  # a UTF-8 continuation byte
            end -= 1
        yield line[:end]
        line = line[end:]
    if line:
        yield line


def _train(lines: Iterator[bytes], options: TrainOptions) -> Model:
    """Run SentencePiece, and turn its errors about sizes into `DataError`."""
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=written,
            vocab_size=options.vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=CHARACTER_COVERAGE,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=MAX_LINE_BYTES,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            required_chars=STOP_PIECE[1],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _size_error(str(error), options) from error
    model: Model = proto.ModelProto.FromString(written.getvalue())  # type: ignore[attr-defined]
    if ensure_stop_piece(model):
        log.warning("The text has too few full stops after a space: %r replaced the rarest merge", STOP_PIECE)
    return model


def _size_error(message: str, options: TrainOptions) -> Exception:
    largest = re.search(r"size too high .*<= (\d+)", message)
    smallest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if largest:
        what = f"is too large for this text; the largest possible size is {largest[1]}"
        remedy = f"Give --vocab-size {largest[1]} or less, or more text"
    elif smallest or options.vocab_size < 1:
        least = f"; bytes and single characters alone take {smallest[1]}" if smallest else ""
        what = f"is too small{least}"
        remedy = f"Give --vocab-size {int(smallest[1]) + 1 if smallest else 1000} or more"
    else:
        return DataError(f"SentencePiece cannot train on this text: {message}", location=", ".join(options.inputs))
    return DataError(f"A vocabulary of {options.vocab_size} {what}", remedy=remedy, location="--vocab-size")


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


class CheckSample:
    """Sample of a stream of texts, spread over all of it."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def collect(self, texts: Iterator[str]) -> Iterator[str]:
        """Yield the same texts, and keep some of them."""
        passed_chars = kept_chars = 0
        for text in texts:
            passed_chars += len(text)
            if kept_chars < min(max(MIN_CHECKED_CHARS, CHECKED_SHARE * passed_chars), MAX_CHECKED_CHARS):
                self.texts.append(text[:MAX_CHARS_A_TEXT])
                kept_chars += len(self.texts[-1])
            yield text


def check_agreement(model: bytes, definition: bytes, texts: list[str]) -> None:
    """Raise `DataError` if tokenizer.model and tokenizer.json give different ids on `texts` or on `HARD_TEXTS`."""
    model_form = sentencepiece.SentencePieceProcessor(model_proto=model)
    json_form = tokenizers.Tokenizer.from_str(definition.decode())
    json_form.encode_special_tokens = True
    for text in (*HARD_TEXTS, *texts):
        ids, others = model_form.encode(text), json_form.encode(text, add_special_tokens=False).ids
        if ids != others:
            position = next((n for n, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), 0)
            around = model_form.decode(ids[max(position - 5, 0) : position + 5])
            raise DataError(
                f"tokenizer.model and tokenizer.json disagree on training text near {around!r}, token {position}; "
                "nothing was written",
                remedy="Use another --vocab-size or other text, and report this",
                location="tokenizer.json",
            )
