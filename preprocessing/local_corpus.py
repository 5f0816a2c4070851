"""A small real corpus from text that every machine with this project has: the sources of packages it depends on.

`SOURCES` lists the packages. They are required at run time, pinned in constraints.txt, and each is one wheel for all
platforms and Python versions, so the corpus depends only on constraints.txt and the caps. A module yields at most two
documents:

* **Code**: the module as it is, without an opening comment block that mentions a licence.
* **Prose**: the paragraphs of its triple-quoted strings, in source order.

Text files (`.rst`, `.md`, `.txt`, package descriptions) yield prose only. These are skipped:

* files in test folders, licence files, package records: boilerplate or data;
* code that is very short or long, has very long lines, many digits, or says that it is generated: data or output;
* paragraphs of few words, with much punctuation or many digits, with doctest prompts or licence words: headings,
  signatures, examples, boilerplate; and lists of parameters;
* code seen before, and paragraphs seen before anywhere: duplicates would make the corpus look easier.

Files are taken in the order of a hash of their path, a fixed shuffle, until the caps are reached, so a small corpus is
a sample of all packages. A hash of a file's content puts both its documents into training or both into validation: the
docstrings of a validation module are never trained on as code.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import orjson
import zstandard

from megatron_bipe.errors import DataError
from megatron_bipe.io import atomic_file

CODE, PROSE = "Code", "Prose"
SPLITS = ("train", "valid")

# Direct and transitive requirements of this project, each one wheel (py3-none-any) without generated modules.
SOURCES = (
    "transformers",
    "sympy",
    "networkx",
    "datasets",
    "huggingface_hub",
    "accelerate",
    "mpmath",
    "fsspec",
    "Jinja2",
)

SKIPPED_FOLDERS = frozenset({"test", "tests", "licenses", "__pycache__"})
TEXT_SUFFIXES = frozenset({".rst", ".md", ".txt"})
LICENCE_NAME = re.compile(r"licen[cs]e|copying|notice|authors|credits|third.?party", re.IGNORECASE)
LICENCE_WORDS = re.compile(r"\blicen[cs]e|copyright|warrant(?:y|ies)|redistribut|\ball rights reserved", re.IGNORECASE)
GENERATED_WORDS = re.compile(r"\b(?:auto-?|automatically )generated\b|\bdo not (?:edit|modify)\b", re.IGNORECASE)

MAX_FILE_BYTES = 2_000_000  # larger files are data, whatever their suffix
MIN_CODE_CHARS, MAX_CODE_CHARS = 300, 200_000
MAX_CODE_LINE_CHARS = 400
MAX_MEAN_CODE_LINE_CHARS = 60
MAX_CODE_DIGIT_SHARE = 0.08  # measured on ordinary modules: 0.5% to 4%
STRING_OR_COMMENT = re.compile(  # of Python source; the groups are the insides of triple quotes
    r'"""(.*?)(?<!\\)"""'
    r"|'{3}(.*?)(?<!\\)'{3}"
    r'|"[^"\\\n]*(?:\\.[^"\\\n]*)*"'
    r"|'[^'\\\n]*(?:\\.[^'\\\n]*)*'"
    r"|#[^\n]*",
    re.DOTALL,
)
F_STRING = re.compile(r"\b(?:f|fr|rf)\Z", re.IGNORECASE)  # prefix of the quotes
MIN_PARAGRAPH_WORDS = 10
MAX_PARAGRAPH_SIGN_SHARE = 0.1  # punctuation and digits; running English has 2% to 6%
MIN_WORDS_A_LINE = 4
FIELD_LINE = re.compile(r"^\W{0,2}[\w.]+(?: ?\([^)]*\)| [\w.]+)? ?:", re.MULTILINE)
MAX_FIELD_SHARE = 0.25  # of a paragraph's lines that read "name (type): ...", as parameter lists do
MIN_PROSE_CHARS = 300


class SubsetSize(NamedTuple):
    """Size of one subset in one of the files."""

    documents: int
    text_bytes: int


class CorpusDocument(NamedTuple):
    """One line of the corpus before it is written."""

    text: str
    subset: str  # CODE or PROSE
    valid: bool  # belongs to the validation file


def find_sources(pins: Mapping[str, str]) -> tuple[list[Distribution], list[str]]:
    """Return the installed distributions of `SOURCES`, and descriptions of differences from the pinned versions."""
    found, differences = [], []
    for name in SOURCES:
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            differences.append(f"{name} is not installed")
            continue
        found.append(installed)
        if installed.read_text("RECORD") is None:
            differences.append(f"{name} has no list of its files")
        if installed.version != pins.get(name):
            differences.append(f"{name} is {installed.version}, pinned is {pins.get(name)}")
    return found, differences


def list_sources(distributions: Iterable[Distribution]) -> list[Path]:
    """Return the candidate files of the distributions, in the order of a hash of their installed path."""
    listed = (file for found in distributions for file in found.files or () if _is_candidate(file))
    ordered = sorted(listed, key=lambda file: hashlib.sha256(file.as_posix().encode()).digest())
    return [Path(file.locate()) for file in ordered]


def collect(sources: Iterable[Path], max_bytes: int, valid_share: float) -> Iterator[CorpusDocument]:
    """Yield code and prose documents, each subset up to its cap.

    Args:
        sources: files in the order in which they are taken; unreadable ones are skipped.
        max_bytes: cap of each subset, UTF-8 bytes of text, training and validation together.
        valid_share: share of the files that goes to validation, 0 to 1.
    """
    room = {CODE: max_bytes, PROSE: max_bytes}
    seen: set[bytes] = set()
    for path in sources:
        if not any(room.values()):
            return
        raw = _read(path)
        if raw is None:
            continue
        valid = _is_valid(raw, valid_share)
        for subset, text in _documents(path, raw, room, seen):
            size = len(text.encode())
            if size > room[subset]:
                room[subset] = 0  # the first document that does not fit ends the subset
                continue
            room[subset] -= size
            yield CorpusDocument(text, subset, valid)


def corpus_files(folder: Path) -> list[Path]:
    """Return the files of a corpus, in the order of `SPLITS`."""
    return [folder / f"{split}.jsonl.zst" for split in SPLITS]


class CorpusSummary(NamedTuple):
    """Sizes and fingerprint of the two files."""

    sizes: dict[tuple[str, str], SubsetSize]
    """Keyed by subset and "train" or "valid"."""
    fingerprint: str
    """SHA-256 of the uncompressed lines of both files in the order of collection."""


def write_corpus(documents: Iterable[CorpusDocument], folder: Path) -> CorpusSummary:
    """Write the two files in the Pile's line format, under temporary names until both are complete.

    Raises:
        DataError: a subset is empty in one of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {(subset, split): SubsetSize(0, 0) for subset in (CODE, PROSE) for split in SPLITS}
    paths, fingerprint = corpus_files(folder), hashlib.sha256()
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_file(path)) for path in paths]
        streams = [stack.enter_context(zstandard.open(file, "wb")) for file in files]
        for text, subset, valid in documents:
            line = orjson.dumps({"text": text, "meta": {"pile_set_name": subset}}) + b"\n"
            streams[valid].write(line)
            fingerprint.update(b"%d" % valid + line)
            old = sizes[subset, SPLITS[valid]]
            sizes[subset, SPLITS[valid]] = SubsetSize(old.documents + 1, old.text_bytes + len(text.encode()))
        _check_complete(sizes, folder)
    return CorpusSummary(sizes, fingerprint.hexdigest())


def code_of(source: str) -> str | None:
    """Return the module as a code document, or None if it looks like data, a table or machine output."""
    text = _without_licence_header(source).strip() + "\n"
    lines = text.splitlines()
    keep = (
        MIN_CODE_CHARS <= len(text) <= MAX_CODE_CHARS
        and max(map(len, lines)) <= MAX_CODE_LINE_CHARS
        and len(text) / len(lines) <= MAX_MEAN_CODE_LINE_CHARS
        and sum(map(text.count, "0123456789")) / len(text) <= MAX_CODE_DIGIT_SHARE
        and not GENERATED_WORDS.search(source[:2000])
    )
    return text if keep else None


def strings_of(source: str) -> list[str]:
    """Return the triple-quoted strings of a module as they are written, docstrings and others, without f-strings.

    A regular expression finds them, because the compiler's constants differ between versions of Python.
    """
    triple_quoted = (literal for literal in STRING_OR_COMMENT.finditer(source) if literal.lastindex)
    return [
        literal[literal.lastindex or 0]
        for literal in triple_quoted
        if not F_STRING.search(source[max(0, literal.start() - 3) : literal.start()])
    ]


def paragraphs_of(text: str) -> list[str]:
    """Return the paragraphs of `text` that look like prose, their lines unindented and not re-wrapped."""
    blocks = re.split(r"\n\s*\n", text)
    unindented = ("\n".join(line.strip() for line in block.strip().splitlines()) for block in blocks)
    return [block for block in unindented if _is_prose(block)]


def _check_complete(sizes: dict[tuple[str, str], SubsetSize], folder: Path) -> None:
    empty = [f"{subset} in {split}.jsonl.zst" for (subset, split), size in sizes.items() if not size.documents]
    if empty:
        raise DataError(
            f"no documents of {', '.join(empty)}: every subset must be in both files",
            remedy="Raise --max-bytes or --valid-share, or run inside the environment that make setup creates",
            location=folder,
        )


def _is_candidate(file: PurePosixPath) -> bool:
    if not SKIPPED_FOLDERS.isdisjoint(file.parts[:-1]) or LICENCE_NAME.search(file.name):
        return False
    if file.parent.suffix == ".dist-info":
        return file.name == "METADATA"
    return file.suffix == ".py" or file.suffix in TEXT_SUFFIXES


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8") if path.stat().st_size <= MAX_FILE_BYTES else None
    except (OSError, UnicodeDecodeError):
        return None


def _is_valid(raw: str, valid_share: float) -> bool:
    return int.from_bytes(_digest(raw)[:8], "little") < valid_share * 2**64


def _documents(path: Path, raw: str, room: dict[str, int], seen: set[bytes]) -> Iterator[tuple[str, str]]:
    """Yield (subset, text) of one file for the subsets that have room, and update `seen`."""
    is_module = path.suffix == ".py"
    if is_module and room[CODE]:
        code = code_of(raw)
        if code is not None and _is_new(code, seen):
            yield CODE, code
    if room[PROSE]:
        strings = strings_of(raw) if is_module else [raw]
        paragraphs = [block for string in strings for block in paragraphs_of(string) if _is_new(block, seen)]
        prose = "\n\n".join(paragraphs) + "\n"
        if len(prose) >= MIN_PROSE_CHARS:
            yield PROSE, prose


def _is_prose(block: str) -> bool:
    words = len(block.split())
    return (
        words >= MIN_PARAGRAPH_WORDS
        and words >= MIN_WORDS_A_LINE * (block.count("\n") + 1)
        and len(re.findall(r"[^\w\s]|[\d_]", block)) <= MAX_PARAGRAPH_SIGN_SHARE * len(block)
        and len(FIELD_LINE.findall(block)) <= MAX_FIELD_SHARE * (block.count("\n") + 1)
        and not block.startswith(("..", "|"))
        and ">>>" not in block
        and not LICENCE_WORDS.search(block)
    )


def _without_licence_header(source: str) -> str:
    header = re.match(r"(?:[ \t]*#[^\n]*\n|[ \t]*\n)+", source)
    return source[header.end() :] if header and LICENCE_WORDS.search(header[0]) else source


def _is_new(text: str, seen: set[bytes]) -> bool:
    """Return True the first time a text is seen."""
    digest = _digest(text)
    if digest in seen:
        return False
    seen.add(digest)
    return True


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
