"""Shard files: exact bytes, round trips, Megatron's own reader and writer, and every kind of damage."""

import errno
import hashlib
import os
import pickle
import struct
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bipe.data.manifest import ShardRecord
from megatron_bipe.data.shard import Shard, ShardWriter, choose_dtype
from megatron_bipe.errors import DataError
from megatron_bipe.types import TokenizedDocument
from tests.helpers.errors import raises

U16, I32 = np.dtype("<u2"), np.dtype("<i4")
Pairs = list[tuple[list[int], list[bool]]]
EXAMPLE: Pairs = [
    ([7, 5, 9], [False, True, False]),
    ([], []),
    ([1, 2, 5, 5, 6, 3, 8], [False, False, True, True] * 1 + [False] * 3),
]
IDX_FIELDS = {
    "magic": (0, "9s"),
    "version": (9, "Q"),
    "dtype code": (17, "B"),
    "sequences": (18, "Q"),
    "document entries": (26, "Q"),
}
SEG_FIELDS = {"magic": (0, "8s"), "version": (8, "Q"), "tokens": (16, "Q")}


def write(folder: Path, documents: Pairs, dtype: np.dtype = U16, name: str = "s-00000") -> ShardRecord:
    with ShardWriter(folder, name, dtype) as writer:
        for tokens, ends in documents:
            writer.add(TokenizedDocument(np.array(tokens, dtype), np.array(ends, np.bool_), 2 * len(tokens), ""))
        return writer.finish()


def damage(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def test_shard_files_hold_exactly_the_documented_bytes(tmp_path: Path) -> None:
    record = write(tmp_path, EXAMPLE)
    assert (tmp_path / "s-00000.bin").read_bytes() == struct.pack("<10H", 7, 5, 9, 1, 2, 5, 5, 6, 3, 8)
    # Ends at tokens 1, 5 and 6, the lowest bit first.
    seg = b"BIPESEG\0" + struct.pack("<QQ", 1, 10) + bytes([0b01100010, 0])
    assert (tmp_path / "s-00000.seg").read_bytes() == seg
    idx = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4)
    idx += struct.pack("<3i", 3, 0, 7) + struct.pack("<3q", 0, 6, 6) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "s-00000.idx").read_bytes() == idx
    assert (record.documents, record.tokens, record.segments, record.text_bytes) == (3, 10, 3, 20)
    for suffix, file in record.files.items():
        data = (tmp_path / f"s-00000.{suffix}").read_bytes()
        assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())


@st.composite
def documents(draw: st.DrawFn) -> tuple[np.dtype, Pairs]:
    dtype = draw(st.sampled_from([U16, I32]))
    tokens = draw(st.lists(st.lists(st.integers(0, 65535 if dtype == U16 else 2**31 - 1), max_size=30), max_size=6))
    return dtype, [(ids, draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))) for ids in tokens]


@settings(max_examples=60)
@given(documents(), st.data())
def test_shard_any_slice_equals_a_plain_loop(case: tuple[np.dtype, Pairs], data: st.DataObject) -> None:
    dtype, pairs = case
    all_tokens = [token for tokens, _ in pairs for token in tokens]
    all_ends = [end for _, ends in pairs for end in ends]
    with tempfile.TemporaryDirectory() as name:
        record = write(Path(name), pairs, dtype)
        for shard in (Shard(Path(name), record), Shard(Path(name), "s-00000")):
            assert (shard.num_tokens, shard.num_documents, shard.dtype) == (len(all_tokens), len(pairs), dtype)
            start = data.draw(st.integers(0, len(all_tokens)))
            stop = data.draw(st.integers(start, len(all_tokens)))
            assert shard.tokens(start, stop).tolist() == all_tokens[start:stop]
            assert shard.ends(start, stop).tolist() == all_ends[start:stop]
            bounds = [0]
            for tokens, _ in pairs:
                bounds.append(bounds[-1] + len(tokens))
            assert shard.document_bounds.tolist() == bounds
        assert record.segments == sum(all_ends)


@pytest.mark.parametrize("dtype", [U16, I32])
def test_shard_opened_by_megatron_core_returns_the_same(tmp_path: Path, dtype: np.dtype) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    write(tmp_path, EXAMPLE, dtype)
    theirs = indexed.IndexedDataset(str(tmp_path / "s-00000"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == [tokens for tokens, _ in EXAMPLE]
    assert theirs.index.dtype == dtype
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [U16, I32])
def test_shard_files_equal_those_of_megatron_cores_builder(tmp_path: Path, dtype: np.dtype) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    write(tmp_path, EXAMPLE, dtype)
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    for tokens, _ in EXAMPLE:
        builder.add_document(torch.tensor(tokens, dtype=torch.int64), [len(tokens)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"theirs.{suffix}").read_bytes() == (tmp_path / f"s-00000.{suffix}").read_bytes()


def test_choose_dtype_at_megatrons_bound_switches() -> None:
    assert [choose_dtype(size) for size in (10, 65499, 65500, 128000)] == [U16, U16, I32, I32]


def test_writer_leaving_by_an_exception_removes_temporaries_and_keeps_what_was(tmp_path: Path) -> None:
    write(tmp_path, EXAMPLE)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def stop_half_way() -> None:
        with ShardWriter(tmp_path, "s-00000", U16) as writer:
            writer.add(TokenizedDocument(np.array([1], U16), np.array([True]), 1, ""))
            assert len(list(tmp_path.iterdir())) == 4
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_half_way()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_writer_finish_syncs_every_file_before_renaming_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = [], os.fsync

    def record_fsync(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, sorted(p.name for p in tmp_path.iterdir())))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record_fsync)
    write(tmp_path, EXAMPLE)
    assert [name for name, _ in synced] == [
        "s-00000.bin.partial",
        "s-00000.idx.partial",
        "s-00000.seg.partial",
        tmp_path.name,
    ]
    assert all(entry.endswith(".partial") for _, entries in synced[:3] for entry in entries)
    assert synced[3][1] == ["s-00000.bin", "s-00000.idx", "s-00000.seg"]


def test_writer_failing_on_the_last_file_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        if ".seg" in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, EXAMPLE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("token", [-1, 65536])
def test_writer_token_beyond_the_storage_type_is_refused(tmp_path: Path, token: int) -> None:
    with ShardWriter(tmp_path, "s", U16) as writer, raises(DataError, token, "uint16", location="s.bin"):
        writer.add(TokenizedDocument(np.array([token], np.int64), np.array([True]), 1, ""))


def test_writer_wider_input_that_fits_is_stored(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s", U16) as writer:
        writer.add(TokenizedDocument(np.array([65535, 0], np.int32), np.array([True, False]), 1, ""))
        writer.finish()
    assert Shard(tmp_path, "s").tokens(0, 2).tolist() == [65535, 0]


@pytest.mark.parametrize("ends", [np.zeros(2, np.bool_), np.zeros(3, np.int8)])
def test_writer_ends_that_do_not_match_the_tokens_are_a_defect(tmp_path: Path, ends: np.ndarray) -> None:
    with ShardWriter(tmp_path, "s", U16) as writer, pytest.raises(ValueError, match=r"\(3,\)"):
        writer.add(TokenizedDocument(np.zeros(3, U16), ends, 1, ""))


def test_writer_of_an_unknown_type_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float64"):
        ShardWriter(tmp_path, "s", np.dtype(np.float64))


@pytest.mark.parametrize("with_record", [True, False])
@pytest.mark.parametrize("suffix", ["bin", "idx", "seg"])
def test_shard_file_of_any_other_length_is_refused_by_name(tmp_path: Path, suffix: str, with_record: bool) -> None:
    record = write(tmp_path, EXAMPLE)
    path = tmp_path / f"s-00000.{suffix}"
    intact = path.read_bytes()
    for content in [*(intact[:length] for length in range(len(intact))), intact + b"\0"]:
        path.write_bytes(content)
        with raises(DataError, len(content), location=path):
            Shard(tmp_path, record if with_record else "s-00000")


@pytest.mark.parametrize("with_record", [True, False])
@pytest.mark.parametrize(
    ("suffix", "field"), [*(("idx", field) for field in IDX_FIELDS), *(("seg", field) for field in SEG_FIELDS)]
)
def test_shard_header_field_of_any_other_value_is_refused_by_name(
    tmp_path: Path, suffix: str, field: str, with_record: bool
) -> None:
    record = write(tmp_path, EXAMPLE)
    path = tmp_path / f"s-00000.{suffix}"
    intact = path.read_bytes()
    offset, kind = (IDX_FIELDS if suffix == "idx" else SEG_FIELDS)[field]
    for position in range(offset, offset + struct.calcsize("<" + kind)):
        for flip in (0x01, 0x80, 0xFF):
            damage(path, position, bytes([intact[position] ^ flip]))
            # A valid but wrong dtype code, or a count that fits the size, contradicts another file or field.
            with raises(DataError, field) as caught:
                Shard(tmp_path, record if with_record else "s-00000")
            assert Path(caught.value.location).parent == tmp_path
            path.write_bytes(intact)
    Shard(tmp_path, record)


@pytest.mark.parametrize("code", [0, 1, 2, 3, 5, 6, 7, 9, 255])
def test_shard_dtype_code_that_no_tokens_have_is_refused(tmp_path: Path, code: int) -> None:
    record = write(tmp_path, EXAMPLE)
    damage(tmp_path / "s-00000.idx", 17, bytes([code]))
    with raises(DataError, "dtype code", 17, code, "uint16", "int32", location="s-00000.idx"):
        Shard(tmp_path, record)


def test_shard_dtype_code_of_the_other_token_type_is_refused(tmp_path: Path) -> None:
    record = write(tmp_path, EXAMPLE)
    damage(tmp_path / "s-00000.idx", 17, bytes([4]))
    with raises(DataError, 20, 10, "int32", 40, location="s-00000.bin"):
        Shard(tmp_path, record)


def test_shard_every_byte_of_the_index_arrays_is_checked(tmp_path: Path) -> None:
    record = write(tmp_path, EXAMPLE)
    path = tmp_path / "s-00000.idx"
    intact = path.read_bytes()
    names = {34: "sequence lengths", 46: "byte offsets", 70: "document indices"}
    for position in range(34, len(intact)):
        for flip in (0x01, 0x80):
            damage(path, position, bytes([intact[position] ^ flip]))
            shard = Shard(tmp_path, record)  # opening does not read the arrays
            with raises(DataError, location=path) as caught:
                _ = shard.document_bounds
            path.write_bytes(intact)
            (found,) = (name for name in names.values() if name in caught.value.message)
            array = names[max(at for at in names if at <= position)]
            # A wrong length may only show in the offset that should be its sum.
            assert found in {array, "byte offsets" if array == "sequence lengths" else array}


def test_shard_length_entry_negative_names_its_byte(tmp_path: Path) -> None:
    record = write(tmp_path, EXAMPLE)
    damage(tmp_path / "s-00000.idx", 34 + 4, struct.pack("<i", -1))
    with raises(DataError, "sequence lengths", 1, 38, location="s-00000.idx"):
        _ = Shard(tmp_path, record).document_bounds


def test_shard_with_several_sequences_a_document_is_refused(tmp_path: Path) -> None:
    write(tmp_path, EXAMPLE)
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 2)
    arrays = struct.pack("<3i", 3, 0, 7) + struct.pack("<3q", 0, 6, 6) + struct.pack("<2q", 0, 3)
    (tmp_path / "s-00000.idx").write_bytes(header + arrays)
    with raises(DataError, "document entries", 26, 2, 3, location="s-00000.idx"):
        Shard(tmp_path, "s-00000")


@pytest.mark.parametrize("suffix", ["bin", "idx", "seg"])
def test_shard_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    record = write(tmp_path, EXAMPLE)
    (tmp_path / f"s-00000.{suffix}").unlink()
    with raises(DataError, location=f"s-00000.{suffix}"):
        Shard(tmp_path, record)


@pytest.mark.parametrize("suffix", ["idx", "seg"])
def test_shard_path_that_is_a_folder_is_one_error(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, EXAMPLE)
    (tmp_path / f"s-00000.{suffix}").unlink()
    (tmp_path / f"s-00000.{suffix}").mkdir()
    with raises(DataError, os.strerror(errno.EISDIR), location=f"s-00000.{suffix}"):
        Shard(tmp_path, "s-00000")


@pytest.mark.parametrize("suffix", ["idx", "seg"])
def test_shard_foreign_file_of_the_right_size_is_refused(tmp_path: Path, suffix: str) -> None:
    record = write(tmp_path, EXAMPLE)
    path = tmp_path / f"s-00000.{suffix}"
    path.write_bytes(b"PK\x03\x04".ljust(path.stat().st_size, b"x"))
    with raises(DataError, "magic", 0, "b'PK", location=path):
        Shard(tmp_path, record)


def test_shard_seg_of_a_newer_version_says_to_update(tmp_path: Path) -> None:
    record = write(tmp_path, EXAMPLE)
    damage(tmp_path / "s-00000.seg", 8, struct.pack("<Q", 2))
    with raises(DataError, "version", 8, 2, 1, location="s-00000.seg", remedy="megatron_bipe"):
        Shard(tmp_path, record)


def test_shard_seg_of_another_shard_is_refused(tmp_path: Path) -> None:
    record = write(tmp_path, EXAMPLE)
    write(tmp_path, [([1] * 11, [False] * 11)], name="other")
    (tmp_path / "other.seg").replace(tmp_path / "s-00000.seg")  # 11 and 10 bits fill as many bytes
    with raises(DataError, "tokens", 16, 11, 10, location="s-00000.seg"):
        Shard(tmp_path, record)
    with raises(DataError, 20, 11, 22, location="s-00000.bin"):
        Shard(tmp_path, "s-00000")


def test_shard_idx_of_another_shard_is_refused(tmp_path: Path) -> None:
    record = write(tmp_path, EXAMPLE)
    write(tmp_path, [*EXAMPLE[:2], ([1] * 6, [False] * 6)], name="other")
    (tmp_path / "other.idx").replace(tmp_path / "s-00000.idx")
    with raises(DataError, "sequence lengths", 34, 9, 10, location="s-00000.idx"):
        _ = Shard(tmp_path, record).document_bounds


@pytest.mark.parametrize(("count", "field", "suffix"), [("documents", "sequences", "idx"), ("tokens", "tokens", "seg")])
def test_shard_count_that_the_record_contradicts_is_refused(
    tmp_path: Path, count: str, field: str, suffix: str
) -> None:
    record = write(tmp_path, EXAMPLE)
    found = getattr(record, count)
    wrong = record.model_copy(update={count: found + 1})
    with raises(DataError, field, found, found + 1, location=f"s-00000.{suffix}"):
        Shard(tmp_path, wrong)


@pytest.mark.parametrize("suffix", ["bin", "seg"])
def test_shard_file_cut_after_opening_is_one_error(tmp_path: Path, suffix: str) -> None:
    shard = Shard(tmp_path, write(tmp_path, EXAMPLE))
    (tmp_path / f"s-00000.{suffix}").write_bytes(b"\0")
    with raises(DataError, 1 if suffix == "bin" else 24, location=f"s-00000.{suffix}"):
        _ = shard.tokens(0, 10) if suffix == "bin" else shard.ends(0, 10)


def test_shard_out_of_file_descriptors_is_one_error(tmp_path: Path) -> None:
    shard = Shard(tmp_path, write(tmp_path, EXAMPLE))
    error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    with mock.patch.object(Path, "open", side_effect=error), raises(DataError, remedy="ulimit -n"):
        shard.tokens(0, 1)


def test_shard_range_outside_is_an_index_error(tmp_path: Path) -> None:
    shard = Shard(tmp_path, write(tmp_path, EXAMPLE))
    for start, stop in [(-1, 2), (0, 11), (5, 4)]:
        with pytest.raises(IndexError, match=r"10$"):
            shard.tokens(start, stop)
        with pytest.raises(IndexError, match=r"10$"):
            shard.ends(start, stop)


def test_shard_pickled_after_use_carries_no_data(tmp_path: Path) -> None:
    shard = Shard(tmp_path, write(tmp_path, [([3] * 5000, [False] * 5000)]))
    shard.tokens(0, 5000)
    data = pickle.dumps(shard)
    assert len(data) < 2000
    assert pickle.loads(data).tokens(4998, 5000).tolist() == [3, 3]
