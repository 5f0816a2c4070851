"""Train a tokenizer in LLaMA's layout: SentencePiece BPE with byte fallback, written also as tokenizer.json.

Ids: 0 <unk>, 1 <s>, 2 </s>, 3..258 the bytes (so newline is 13), then merges, then single characters.
"""

import io
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

from megatron_bipe.data.sentencepiece_json import sentencepiece_to_json
from megatron_bipe.errors import DataError
from megatron_bipe.io import write_atomically
from preprocessing.line_counts import LineCounts, require_at_least
from preprocessing.llama_layout import STOP_PIECE, Model, ensure_stop_piece, settings_files
from preprocessing.readers.documents import read_input
from preprocessing.readers.inputs import Input, find_inputs
from preprocessing.readers.parse import Keys
from preprocessing.tokenizer_check import CheckSample, check_agreement

SAMPLE_BYTES = 100_000_000  # training takes about 1.5 GB of memory: measured, 14 bytes per byte of text
MAX_LINE_BYTES = 4192  # LLaMA's; SentencePiece drops longer lines, so they are split first
CHARACTER_COVERAGE = 0.99995  # LLaMA's; rarer characters are encoded as bytes
RESERVED_CHARACTER = "\u2585"  # SentencePiece's own mark: it drops lines that contain it

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
    overwrite: bool = False


def train_tokenizer(options: TrainOptions) -> Path:
    """Train, check and write a tokenizer folder, and return it.

    Raises:
        DataError: bad options or inputs, an existing output, too little text for the vocabulary, or a tokenizer.json
            that disagrees with the model (nothing is written then).
    """
    require_at_least("--sample-bytes", options.sample_bytes, 1)
    require_at_least("--max-malformed", options.max_malformed, 0)
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
    sample = CheckSample()
    counts = LineCounts(options.max_malformed)
    lines = _lines(sample.tapped(_texts(files, options, counts)))
    model = _train(lines, options)
    definition = sentencepiece_to_json(model.SerializeToString())
    check_agreement(model.SerializeToString(), definition, sample.texts)
    contents = {"tokenizer.model": model.SerializeToString(), **settings_files(), "tokenizer.json": definition}
    options.output.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_atomically(options.output / name, contents[name])
    return options.output


def _texts(inputs: list[Input], options: TrainOptions, counts: LineCounts) -> Iterator[str]:
    """Yield texts up to `sample_bytes`, from the start of every file in proportion to its size on disk."""
    total = sum(item.size for item in inputs)
    taken = passed = 0
    for item in inputs:
        passed += item.size
        quota = options.sample_bytes * passed // max(total, 1)
        parts = read_input(item, Keys(options.text_key))
        while taken < quota and (parsed := next(parts, None)) is not None:
            counts.add(
                parsed.malformed,
                num_lines=parsed.num_lines,
                num_documents=len(parsed.documents),
                num_empty=parsed.num_empty,
            )
            for document in parsed.documents:
                if taken >= quota:
                    break
                taken += len(document.text.encode())
                yield document.text
    counts.finish(options.inputs)
    log.info("Training on %.1f MB of text", taken / 1e6)


def _lines(texts: Iterator[str]) -> Iterator[bytes]:
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
