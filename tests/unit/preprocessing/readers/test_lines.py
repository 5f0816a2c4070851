"""Lines of complete files and of any ranges of them, compressed or not; damage is reported."""

import bz2
import errno
import gzip
import itertools
import lzma
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import orjson
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_bipe.errors import DataError
from preprocessing.readers import lines as lines_module
from preprocessing.readers.inputs import find_inputs
from preprocessing.readers.lines import BLOCK_BYTES, DECODERS, Block, Content, LineReader, read_text_file, reading
from preprocessing.readers.parse import Keys, parse_block
from tests.helpers.errors import raises


def read_blocks(file: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Yield the complete file in blocks."""
    with reading(file):
        if file.name.endswith(".txt"):
            yield read_text_file(file)
            return
        with LineReader(file) as reader:
            yield from reader.blocks(0, file.stat().st_size, block_bytes)


def texts_in(file: Path, block_bytes: int = 1 << 20) -> list[str]:
    parsed = [parse_block(block, Keys()) for block in read_blocks(file, block_bytes)]
    assert not any(part.malformed for part in parsed)
    return [document.text for part in parsed for document in part.documents]


def test_read_blocks_any_format_gives_the_same_texts(inputs: dict[str, Path], texts: list[str]) -> None:
    for kind in ("jsonl", "zst", "gz"):
        assert texts_in(inputs[kind]) == texts
    assert [text for item in find_inputs([str(inputs["txt"])]) for text in texts_in(Path(item.name))] == texts


@settings(max_examples=60)
@given(
    lines=st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), max_size=12),
    block_bytes=st.integers(1, 60),
    read_bytes=st.sampled_from([1, 5, 30, 1000]),
    ends_with_newline=st.booleans(),
)
@example(lines=[b"a" * 40, b"b" * 10, b"c" * 40], block_bytes=5, read_bytes=30, ends_with_newline=True)
def test_read_blocks_any_block_size_keeps_bytes_and_line_numbers(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    block_bytes: int,
    read_bytes: int,
    ends_with_newline: bool,
) -> None:
    file = tmp_path_factory.mktemp("blocks") / "x.jsonl"
    whole = b"\n".join([b"{}", *lines]) + (b"\n" if ends_with_newline else b"")
    file.write_bytes(whole)
    with mock.patch.object(lines_module, "READ_BYTES", read_bytes):
        blocks = list(read_blocks(file, block_bytes))
    assert b"".join(block.content for block in blocks) == whole
    assert sum(block.read_bytes for block in blocks) == len(whole)
    before = b""
    for block in blocks:
        assert block.first_line == before.count(b"\n") + 1
        assert len(block.content) <= block_bytes or block.content.count(b"\n", 0, -1) == 0  # or a single long line
        before += block.content


def test_read_blocks_large_file_comes_in_bounded_blocks_of_complete_lines(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl.zst"
    file.write_bytes(zstandard.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(100_000))))
    blocks = list(read_blocks(file, block_bytes=100_000))
    assert len(blocks) > 10
    assert all(block.content.endswith(b"\n") and len(block.content) <= 100_000 for block in blocks)
    assert texts_in(file, 100_000) == [str(n) for n in range(100_000)]


def test_read_blocks_byte_order_mark_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfa")
    assert texts_in(tmp_path / "a.jsonl") == texts_in(tmp_path / "b.txt") == ["a"]


def test_read_blocks_byte_order_mark_further_on_is_kept(tmp_path: Path) -> None:
    lines = b'{"text": "a"}\n\xef\xbb\xbfb\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    with mock.patch.object(lines_module, "READ_BYTES", 14), LineReader(tmp_path / "a.jsonl") as reader:
        assert b"".join(block.content for block in reader.blocks(0, len(lines))) == lines
        assert b"".join(block.content for block in reader.blocks(14, len(lines))) == lines[14:]


def test_read_blocks_carriage_returns_and_blank_lines_are_not_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\r\n\r\n \t\r\n{"text": "b\\r"}\r\n')
    assert texts_in(tmp_path / "a.jsonl") == ["a", "b\r"]


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("kind", ["zst", "gz", "bz2", "xz"])
@pytest.mark.parametrize("damage", ["cut short", "no such format", "flipped"])
def test_read_blocks_damaged_compression_is_named(tmp_path: Path, kind: str, damage: str) -> None:
    content = b"".join(orjson.dumps({"text": os.urandom(50).hex()}) + b"\n" for _ in range(3000))
    checked = zstandard.ZstdCompressor(write_checksum=True)
    packed = bytearray(checked.compress(content) if kind == "zst" else PACK[f".{kind}"](content))
    if damage == "cut short":
        del packed[-20:]
    elif damage == "flipped":
        packed[len(packed) // 2 : len(packed) // 2 + 40] = bytes(40)
    else:
        packed[:4] = b"none"
    file = tmp_path / f"x.jsonl.{kind}"
    file.write_bytes(packed)
    causes = {"zst": "zstd", "gz": "Error -3", "bz2": "damaged", "xz": "damaged"}
    cause = f".{kind}" if damage == "cut short" else causes[kind]
    with raises(DataError, cause, location=file):
        list(read_blocks(file))


def test_read_blocks_unreadable_file_is_named(tmp_path: Path) -> None:
    with raises(DataError, os.strerror(errno.ENOENT), location=tmp_path / "gone.jsonl"):
        list(read_blocks(tmp_path / "gone.jsonl"))


def packed(data: st.DataObject, content: bytes, kind: str) -> bytes:
    """Content as one frame or several, with and without checksums, sizes, empty and skippable frames between."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=4)))
    parts = [content[a:b] for a, b in itertools.pairwise([0, *cuts, len(content)])]
    if kind == "":
        return content
    if kind != ".zst":
        return b"".join(map(PACK[kind], parts)) + bytes(0 if kind == ".bz2" else data.draw(st.sampled_from([0, 4])))
    out = b""
    for part in parts:
        options = {"write_checksum": data.draw(st.booleans()), "write_content_size": data.draw(st.booleans())}
        skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
        out += (skippable if data.draw(st.booleans()) else b"") + zstandard.ZstdCompressor(**options).compress(part)
    return out


@settings(max_examples=150)
@given(data=st.data(), kind=st.sampled_from(list(PACK)), ends_with_newline=st.booleans())
def test_line_reader_any_ranges_in_any_order_give_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str, ends_with_newline: bool
) -> None:
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 5, 40, 300]), max_size=25))
    whole = b"\n".join(bytes([97 + n % 26]) * size for n, size in enumerate(lengths))
    whole += b"\n" if ends_with_newline else b""
    file = tmp_path_factory.mktemp("ranges") / f"x.jsonl{kind}"
    file.write_bytes(packed(data, whole, kind))
    size = file.stat().st_size
    bounds = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=6))})
    ranges = list(itertools.pairwise(bounds))
    found, ends = {}, {}
    step = data.draw(st.sampled_from([1, 7, 1000]))
    decoders = {kind: decoder._replace(step_bytes=step) for kind, decoder in DECODERS.items()}
    with (
        mock.patch.object(lines_module, "READ_BYTES", data.draw(st.sampled_from([1, 7, 1000]))),
        mock.patch.object(lines_module, "DECODERS", decoders),
        LineReader(file) as reader,
    ):
        for number in data.draw(st.permutations(range(len(ranges)))):
            blocks = list(reader.blocks(*ranges[number], data.draw(st.sampled_from([1, 50, 10_000]))))
            found[number] = b"".join(block.content for block in blocks)
            ends[number] = reader.skipped_bytes, reader.overrun_bytes
            assert reader.num_lines == found[number].count(b"\n")
            assert sum(block.read_bytes for block in blocks) <= ranges[number][1] - ranges[number][0]
    assert b"".join(found[number] for number in range(len(ranges))) == whole
    owed = 0
    for number in range(len(ranges)):  # what a range takes beyond its end, the next ones skip
        owed -= ends[number][0]
        assert owed == 0 or not found[number]
        owed += ends[number][1]
    assert owed == 0


def random_lines(count: int) -> bytes:
    return b"".join(os.urandom(40).hex().encode() + b"\n" for _ in range(count))


@pytest.mark.parametrize("pack", [zstandard.compress, gzip.compress])
def test_line_reader_neighbouring_ranges_decompress_once(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    file = tmp_path / ("x.jsonl.zst" if pack is zstandard.compress else "x.jsonl.gz")
    file.write_bytes(pack(random_lines(20_000)))
    bounds = [file.stat().st_size * n // 5 for n in range(6)]
    with mock.patch.object(Content, "_restart", autospec=True, side_effect=Content._restart) as restart:
        with LineReader(file) as reader:
            for start, stop in itertools.pairwise(bounds):
                assert list(reader.blocks(start, stop))
        assert restart.call_count == 1


def test_line_reader_line_that_was_begun_beyond_the_range_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    lines = [b"a" * 5 + b"\n", b"b" * 20 + b"\n", b"c" * 3 + b"\n"]
    file.write_bytes(b"".join(lines))
    # The second range is all in memory after the first, and ends inside a line.
    with mock.patch.object(lines_module, "READ_BYTES", 10), LineReader(file) as reader:
        found = [
            b"".join(block.content for block in reader.blocks(*bounds))
            for bounds in itertools.pairwise([0, 3, 13, file.stat().st_size])
        ]
    assert found == lines


@pytest.mark.parametrize("suffix", PACK)
def test_line_reader_interrupted_range_is_read_from_its_start(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x.jsonl{suffix}"
    content = random_lines(9000)
    file.write_bytes(PACK[suffix](content))
    size = file.stat().st_size
    with LineReader(file) as reader:
        first = list(reader.blocks(0, cut := size // 3 + 1))
        next(reader.blocks(cut, size, 1000))
        second = list(reader.blocks(cut, size))
        assert reader.num_lines == b"".join(block.content for block in second).count(b"\n")
    assert b"".join(block.content for block in first + second) == content


def test_content_many_frames_starts_in_the_one_before(tmp_path: Path) -> None:
    frame = zstandard.compress(random_lines(100))
    file = tmp_path / "x.jsonl.zst"
    file.write_bytes(frame * 100)
    with Content(file) as opened, mock.patch.object(opened, "_restart", wraps=opened._restart) as restart:
        assert opened.seek(len(frame) * 90)
        assert opened.position == len(frame) * 90
        opened.seek(len(frame) * 50 + 1)  # too little for any content: back one more
        opened.seek(len(frame) * 51 - 1)
    assert [call.args[0] // len(frame) for call in restart.call_args_list] == [89, 50, 49]


def test_content_blocks_of_one_repeated_byte_do_not_hide_where_frames_begin(tmp_path: Path) -> None:
    frame = zstandard.compress(b"a" * 500_000 + b"\n" + random_lines(20))
    file = tmp_path / "x.jsonl.zst"
    file.write_bytes(frame * 10)
    with Content(file) as opened, mock.patch.object(opened, "_restart", wraps=opened._restart) as restart:
        assert opened.seek(len(frame) * 9)
        assert restart.call_args.args[0] == len(frame) * 8


@pytest.mark.parametrize("suffix", [suffix for suffix in PACK if suffix])
def test_content_small_file_that_holds_much_comes_in_bounded_pieces(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x.jsonl{suffix}"
    bomb = zstandard.compress(b"a" * (96 << 20)) if suffix == ".zst" else PACK[suffix](b"a" * (1 << 20)) * 96
    file.write_bytes(bomb)
    with Content(file) as opened:
        assert max(map(len, opened.advance())) <= 64 << 20


@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_line_reader_line_above_the_limit_is_an_error_before_it_is_in_memory(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x.jsonl{suffix}"
    count = 400 if suffix else 8
    file.write_bytes(PACK[suffix](b"{}\n{}\n") + PACK[suffix](b"a" * (1 << 20)) * count)
    tracemalloc.start()
    try:
        with LineReader(file, 3 << 20) as reader, raises(DataError, 3 << 20, "Line 3", location=file):
            list(reader.blocks(0, file.stat().st_size))
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()


def test_line_reader_small_limit_holds_for_each_line(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    for end in (b"\n", b""):
        content = b"a\n" * 30 + b"a" * 10 + b"\n" + b"a" * 9 + end
        file.write_bytes(content)
        with LineReader(file, 10) as reader:
            assert b"".join(block.content for block in reader.blocks(0, len(content))) == content
        file.write_bytes(b"a\n" * 30 + b"a" * 11 + end)
        with LineReader(file, 10) as reader, raises(DataError, 10, "Line 31", location=file):
            list(reader.blocks(0, file.stat().st_size))


def test_read_text_file_above_the_limit_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "x.txt.xz"
    file.write_bytes(lzma.compress(b"a" * 1000))
    assert len(read_text_file(file, 1000).content) == 1000
    with raises(DataError, 999, location=file, remedy="--max-line-bytes"):
        read_text_file(file, 999)


def test_line_reader_file_that_shrank_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"text": "a"}\n' * 100)
    with LineReader(file) as reader:
        os.truncate(file, 300)
        with raises(DataError, 300, 1400, location=file), reading(file):
            list(reader.blocks(0, 1400))
