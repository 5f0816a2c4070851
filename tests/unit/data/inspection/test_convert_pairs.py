"""Pairs of .bin and .idx, written by Megatron's own builder or byte by byte, become datasets; bad ones are named."""

import errno
import itertools
import logging
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.inspection import resegment as resegment_module
from megatron_bipe.data.inspection.convert_pairs import DocumentCounts, convert_pairs
from megatron_bipe.data.inspection.megatron_pairs import MegatronPair, find_pairs
from megatron_bipe.data.inspection.resegment import resegment
from megatron_bipe.data.inspection.stats import count_dataset
from megatron_bipe.data.inspection.stats_text import as_json, datasets_table, stats_table
from megatron_bipe.data.inspection.verify import find_problems
from megatron_bipe.data.manifest import Manifest
from megatron_bipe.data.tokenizer import Tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.io import unfinished_path
from tests.helpers.errors import assert_warned, raises

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
BOS, EOS = 1, 2
NEWLINE = 3 + ord("\n")
DOCUMENTS = [[BOS, 262, NEWLINE, 263, EOS], [BOS, NEWLINE, NEWLINE, 270, 271, NEWLINE, EOS], [BOS, EOS]]
Documents = Sequence[Sequence[int]]
SMALL_VOCABULARY = 288  # of the tokenizer `letters`


def write_pair(
    prefix: Path,
    sequences: Documents,
    dtype: str = "uint16",
    *,
    entries: Sequence[int] | None = None,
    tail: bytes = b"",
) -> Path:
    """Write a pair: sequences of token ids, and the first sequence of each document and the end of the last."""
    lengths = [len(sequence) for sequence in sequences]
    entries = range(len(lengths) + 1) if entries is None else entries
    tokens = np.array([token for sequence in sequences for token in sequence], dtype)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(f"{prefix.name}.bin").write_bytes(tokens.tobytes())
    offsets = np.cumsum([0, *lengths])[:-1] * tokens.itemsize
    arrays = np.array(lengths, "<i4"), np.array(offsets, "<i8"), np.array(entries, "<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(entries))
    index = b"".join([header, *(array.tobytes() for array in arrays), tail])
    prefix.with_name(f"{prefix.name}.idx").write_bytes(index)
    return prefix


def convert(source: Path, tokenizer: Tokenizer, output: Path, spec: str = "newline", **options: object) -> TokenDataset:
    """Convert pairs, verify every byte of the result, and return it."""
    made = convert_pairs(find_pairs(source), tokenizer, spec, output, **options)  # type: ignore[arg-type]
    dataset = TokenDataset(output)
    assert dataset.manifest == made and list(find_problems([dataset])) == []
    return dataset


def read_documents(dataset: TokenDataset) -> list[list[int]]:
    bounds = dataset.document_bounds().tolist()
    return [dataset.tokens(*span).tolist() for span in itertools.pairwise(bounds)]


def found_documents(dataset: TokenDataset) -> DocumentCounts:
    return DocumentCounts(**dataset.manifest.source["documents"])


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Return a folder of two pairs, with other files."""
    write_pair(tmp_path / "pairs" / "b_text_document", DOCUMENTS[2:])
    write_pair(tmp_path / "pairs" / "a_0.1_text_document", DOCUMENTS[:2])
    (tmp_path / "pairs" / "cache").mkdir()
    (tmp_path / "pairs" / "notes.txt").write_text("mine")
    return tmp_path / "pairs"


@pytest.mark.parametrize(("dtype", "is_linked"), [("uint16", True), ("int32", True), ("int64", False)])
def test_pair_of_megatron_cores_builder_becomes_a_dataset(
    letters: Tokenizer, tmp_path: Path, dtype: str, is_linked: bool
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.dtype(dtype).type)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(str(tmp_path / "x.idx"))
    dataset = convert(tmp_path / "x", letters, tmp_path / "new")
    assert read_documents(dataset) == DOCUMENTS
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"x.{suffix}").samefile(dataset.shards[0].path(suffix)) == is_linked
    theirs = indexed.IndexedDataset(str(tmp_path / "new" / "tokens-00000"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert dataset.dtype == ("int32" if dtype == "int32" else "uint16")


def test_pairs_of_a_folder_become_shards_in_the_order_of_their_names(
    pairs: Path, letters: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    done: list[int] = []
    dataset = convert(pairs, letters, tmp_path / "new", workers=2, advance=done.append)
    assert sum(done) == dataset.num_tokens == 14
    assert read_documents(dataset) == DOCUMENTS
    assert [(shard.documents, shard.tokens, shard.segments) for shard in dataset.manifest.shards] == [
        (2, 12, 4),
        (1, 2, 0),
    ]
    assert dataset.manifest.tokenizer == letters.record
    assert [pair["name"] for pair in dataset.manifest.source["megatron_pairs"]] == [
        "a_0.1_text_document",
        "b_text_document",
    ]
    assert "2 files and folders" in caplog.text and "cache, notes.txt" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]  # BOS first, as preprocess.py
    assert found_documents(dataset) == (3, 0, 3, 3)


@pytest.mark.parametrize("name", ["a_0.1_text_document", "a_0.1_text_document.bin", "a_0.1_text_document.idx"])
def test_pair_is_named_with_or_without_suffix(pairs: Path, letters: Tokenizer, tmp_path: Path, name: str) -> None:
    assert read_documents(convert(pairs / name, letters, tmp_path / "new")) == DOCUMENTS[:2]


@pytest.mark.parametrize("spec", ["newline", "fixed:3"])
@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "uint16"])
def test_converted_pair_equals_the_dataset_of_its_tokens(
    letters: Tokenizer, tmp_path: Path, dtype: str, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resegment_module, "CHUNK_TOKENS", 8)
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, SMALL_VOCABULARY, size).tolist() for size in (0, 9, 1, 30, 0, 17)]
    write_pair(tmp_path / "x", documents, dtype)
    write_pair(tmp_path / "other", documents)
    dataset = convert(tmp_path / "x", letters, tmp_path / "new", spec)
    assert read_documents(dataset) == documents
    expected = convert(tmp_path / "other", letters, tmp_path / "other-new", spec)
    assert dataset.ends(0, dataset.num_tokens).tolist() == expected.ends(0, dataset.num_tokens).tolist()
    begin = sum(document[:1] == [BOS] for document in documents)
    end = sum(document[-1:] == [EOS] for document in documents)
    assert found_documents(dataset) == (6, 2, begin, end)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([0, 2, 3], [DOCUMENTS[0] + DOCUMENTS[1], DOCUMENTS[2]]),  # sentences
        ([0, 1, 1, 3], [DOCUMENTS[0], [], DOCUMENTS[1] + DOCUMENTS[2]]),  # an empty text
        ([0], DOCUMENTS),  # merged by GPT-NeoX
        ([], DOCUMENTS),
    ],
)
def test_documents_of_several_sequences_are_joined_and_those_without_a_list_are_sequences(
    letters: Tokenizer, tmp_path: Path, entries: list[int], expected: Documents
) -> None:
    write_pair(tmp_path / "x", DOCUMENTS, entries=entries)
    dataset = convert(tmp_path / "x", letters, tmp_path / "new")
    assert read_documents(dataset) == expected
    assert (tmp_path / "x.bin").samefile(dataset.shards[0].path("bin"))


def test_pairs_of_different_types_get_the_type_of_the_vocabulary(letters: Tokenizer, tmp_path: Path) -> None:
    write_pair(tmp_path / "in" / "a", DOCUMENTS[:1], "int32")
    write_pair(tmp_path / "in" / "b", DOCUMENTS[1:], "uint16")
    dataset = convert(tmp_path / "in", letters, tmp_path / "new")
    assert dataset.dtype == "uint16" and read_documents(dataset) == DOCUMENTS


def test_documents_that_begin_otherwise_are_counted_with_a_warning(
    letters: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pair(tmp_path / "x", [[262, 263, EOS], [264, EOS], [], [BOS, 265]])
    dataset = convert(tmp_path / "x", letters, tmp_path / "new")
    assert_warned(caplog, "2 of 4", "id 1", "2 end with EOS (id 2)", "BOS")
    assert found_documents(dataset) == (4, 1, 1, 2)


def test_length_of_the_text_is_unknown_everywhere(pairs: Path, letters: Tokenizer, tmp_path: Path) -> None:
    dataset = convert(pairs, letters, tmp_path / "new")
    resegment(tmp_path / "new", "fixed:2", tmp_path / "again")
    for manifest in (dataset.manifest, Manifest.load(tmp_path / "again")):
        assert manifest.text_bytes is None and manifest.special_in_text is None
    assert stats_table(dataset.manifest).count("unknown") == 3
    assert as_json(dataset.manifest, count_dataset(dataset))["text_bytes"] is None
    known = dataset.manifest.model_copy(
        update={"shards": (dataset.manifest.shards[0].model_copy(update={"text_bytes": 10}),)}
    )
    assert known.text_bytes == 10
    assert datasets_table({"a": known, "b": dataset.manifest}).count("unknown") == 2  # of b, and of all


def flip(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("suffix", "change", "observed"),
    [
        ("idx", lambda data: b"TNTIDX\0\0" + data[8:], ["TNTIDX"]),
        ("idx", lambda data: b"PK\x03\x04" + data[4:], ["PK"]),
        ("idx", lambda data: data[:20], [20, 34]),
        ("idx", lambda _: b"", ["b''"]),
        ("idx", lambda data: data[:9] + struct.pack("<Q", 2) + data[17:], ["version 2"]),
        ("idx", lambda data: data[:17] + b"\x06" + data[18:], [6, "floating"]),
        ("idx", lambda data: data[:17] + b"\x63" + data[18:], [99]),
        ("idx", lambda data: data[:-1], [101, 102, 3, 4]),
        ("idx", lambda data: data + bytes(3), ["mode", 3]),
        ("idx", lambda data: data[:26] + data[34:-32], ["fairseq", 3]),
        ("idx", lambda data: data[:34] + struct.pack("<i", -5) + data[38:], ["sequence lengths", 0, -5]),
        ("idx", lambda data: data[:54] + struct.pack("<q", 12) + data[62:], ["byte offsets", 1, 12]),
        ("idx", lambda data: data[:78] + struct.pack("<q", 3) + data[86:], ["document indices", 2, "is less"]),
        ("idx", lambda data: data[:-8] + struct.pack("<q", 2), ["document indices", 0, 2, 3]),
        ("bin", lambda data: data[:-1], [27, 2, "uint16"]),
        ("bin", lambda data: data[:-2], [13, 14]),
        ("bin", lambda data: data + bytes(2), [15, 14]),
        ("bin", lambda _: b"", [0, 14]),
    ],
)
def test_damaged_or_other_pair_is_refused_by_name(
    letters: Tokenizer, tmp_path: Path, suffix: str, change: Callable[[bytes], bytes], observed: list[object]
) -> None:
    write_pair(tmp_path / "x", DOCUMENTS)
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(change(path.read_bytes()))
    before = sorted(tmp_path.iterdir())
    with raises(DataError, *observed) as caught:
        convert_pairs(find_pairs(tmp_path / "x"), letters, "newline", tmp_path / "new")
    assert caught.value.location in (str(path), str(tmp_path / "x.idx"))
    assert sorted(tmp_path.iterdir()) == before


def test_multimodal_pair_of_megatron_cores_builder_is_refused(letters: Tokenizer, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.uint16, multimodal=True)
    builder.add_document(torch.tensor([BOS, 270]), [2], [1])
    builder.finalize(str(tmp_path / "x.idx"))
    with raises(DataError, "multimodal", 1, location="x.idx"):
        find_pairs(tmp_path / "x")


@pytest.mark.parametrize(("dtype", "token", "low"), [("uint16", 50300, 1), ("int32", 70000, 1), ("int64", -7, -7)])
def test_ids_outside_the_vocabulary_are_named_with_their_document_and_range(
    letters: Tokenizer, tmp_path: Path, dtype: str, token: int, low: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resegment_module, "CHUNK_TOKENS", 8)
    write_pair(tmp_path / "x", [*DOCUMENTS, [], [BOS, token, max(token, 900)]], dtype)
    with raises(DataError, "document 4 ", token, 15, low, max(token, 900), 288, remedy="tokenizer") as caught:
        convert_pairs(find_pairs(tmp_path / "x"), letters, "newline", tmp_path / "new")
    assert caught.value.location == str(tmp_path / "x.bin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_type_that_cannot_hold_the_vocabulary_is_refused(letters: Tokenizer, tmp_path: Path, dtype: str) -> None:
    write_pair(tmp_path / "x", [[BOS, 5]], dtype)
    with raises(DataError, dtype, 288, location="x.idx", remedy="tokenizer"):
        convert_pairs(find_pairs(tmp_path / "x"), letters, "newline", tmp_path / "new")


def test_pairs_without_tokens_are_refused(letters: Tokenizer, tmp_path: Path) -> None:
    write_pair(tmp_path / "x", [[], []])
    with raises(DataError, "x.bin", location=tmp_path):
        convert_pairs(find_pairs(tmp_path / "x"), letters, "newline", tmp_path / "new")


@pytest.mark.parametrize(("left", "missing"), [("bin", "idx"), ("idx", "bin")])
@pytest.mark.parametrize("in_folder", [True, False])
def test_half_of_a_pair_is_named(pairs: Path, left: str, missing: str, in_folder: bool) -> None:
    (pairs / f"b_text_document.{missing}").unlink()
    with raises(DataError, f"b_text_document.{missing}", location=f"b_text_document.{left}"):
        find_pairs(pairs if in_folder else pairs / "b_text_document")


def test_folder_or_name_without_pairs_is_named(pairs: Path) -> None:
    for source in (pairs / "absent", pairs / "absent.bin", pairs / "cache", pairs / "notes.txt"):
        with raises(DataError, location=source):
            find_pairs(source)
    with raises(DataError, "pairs", location=pairs.parent):
        find_pairs(pairs.parent)


@pytest.mark.parametrize("output", ["pairs", ".", "link", "in"])
def test_output_that_contains_the_pairs_is_refused_and_harmless(
    pairs: Path, letters: Tokenizer, tmp_path: Path, output: str
) -> None:
    (tmp_path / "link").symlink_to(pairs)
    source = write_pair(unfinished_path(tmp_path / "in") / "draft" / "x", DOCUMENTS) if output == "in" else pairs
    before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
    with raises(DataError, location=(tmp_path / output).resolve()):
        convert_pairs(find_pairs(source), letters, "newline", tmp_path / output, overwrite=True)
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


def test_output_inside_the_folder_of_the_pairs_is_made(pairs: Path, letters: Tokenizer) -> None:
    dataset = convert(pairs, letters, pairs / "dataset")
    assert convert(pairs, letters, pairs / "dataset", "fixed:2", overwrite=True).num_tokens == dataset.num_tokens
    with raises(DataError, location=pairs / "dataset", remedy="--overwrite"):
        convert(pairs, letters, pairs / "dataset")


def test_full_disk_is_one_error_that_leaves_nothing(
    letters: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(tmp_path / "x", DOCUMENTS)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_bipe.data.inspection.convert_pairs.link_or_copy", fail)
    with raises(DataError, "No space", location=tmp_path / "new"):
        convert_pairs(find_pairs(tmp_path / "x"), letters, "newline", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_file_that_shrinks_meanwhile_is_named(tmp_path: Path) -> None:
    pair = MegatronPair(write_pair(tmp_path / "x", DOCUMENTS))
    (tmp_path / "x.bin").write_bytes(b"")
    with raises(DataError, 0, 14, location="x.bin"):
        pair.tokens(0, 14)
    (tmp_path / "x.idx").write_bytes(b"")
    with raises(DataError, 34, location="x.idx"):
        _ = pair.document_bounds
