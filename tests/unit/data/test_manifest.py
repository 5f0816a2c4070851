"""The manifest: round trip, fingerprint, and every kind of invalid content."""

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_bipe import io
from megatron_bipe.data.manifest import MANIFEST_NAME, FileRecord, Manifest, SegmentRule, ShardRecord, TokenizerRecord
from megatron_bipe.errors import DataError
from tests.helpers.errors import raises


def shard(name: str = "s-00000", **counts: int) -> ShardRecord:
    record = FileRecord(bytes=10, sha256="b" * 64)
    fields = {"documents": 2, "tokens": 10, "segments": 3, "text_bytes": 40} | counts
    return ShardRecord(name=name, files={"bin": record, "idx": record, "seg": record}, **fields)


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "tokenizer": TokenizerRecord(name="t", fingerprint="a" * 64, vocab_size=100, special_ids={"bos": 1}),
        "rule": SegmentRule(spec="newline", token_ids=(13,)),
        "dtype": "uint16",
        "shards": (shard(), shard("s-00001", documents=5, tokens=20, segments=0, text_bytes=7)),
        "source": {"input": ["a.jsonl"], "workers": 2},
    }
    return Manifest(**(fields | changes))


def test_manifest_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    manifest().save(tmp_path)
    loaded = Manifest.load(tmp_path)
    assert loaded == manifest()
    assert (loaded.num_documents, loaded.num_tokens, loaded.num_segments, loaded.text_bytes) == (7, 30, 3, 47)
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_manifest_with_a_file_name_that_is_not_unicode_can_be_read_again(tmp_path: Path) -> None:
    manifest(source={"input": b"caf\xe9.txt".decode("utf-8", "surrogateescape")}).save(tmp_path)
    assert Manifest.load(tmp_path).source == {"input": "caf?.txt"}


def test_manifest_fingerprint_follows_the_content_alone() -> None:
    base = manifest()
    renamed = base.tokenizer.model_copy(update={"name": "elsewhere/t"})
    assert manifest(tokenizer=renamed, source={}).fingerprint == base.fingerprint
    other_tokenizer = base.tokenizer.model_copy(update={"fingerprint": "c" * 64})
    others = [
        manifest(tokenizer=other_tokenizer),
        manifest(rule=SegmentRule(spec="[13,14]", token_ids=(13, 14))),
        manifest(dtype="int32"),
        manifest(shards=base.shards[::-1]),
        manifest(shards=(base.shards[0], shard("s-00001", text_bytes=8))),
    ]
    assert len({other.fingerprint for other in [base, *others]}) == 6


def test_manifest_save_interrupted_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest().save(tmp_path)

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        manifest(dtype="int32").save(tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]
    assert Manifest.load(tmp_path).dtype == "uint16"


def test_manifest_load_without_folder_names_it_and_the_command(tmp_path: Path) -> None:
    with raises(DataError, location=tmp_path / "nowhere", remedy="tools/preprocess.py"):
        Manifest.load(tmp_path / "nowhere")


def test_manifest_load_of_a_folder_of_datasets_lists_them(tmp_path: Path) -> None:
    for name in ("arxiv", "books"):
        (tmp_path / name).mkdir()
        manifest().save(tmp_path / name)
    with raises(DataError, MANIFEST_NAME, "arxiv", "books", location=tmp_path):
        Manifest.load(tmp_path)


def test_manifest_cut_anywhere_is_one_error_with_the_byte(tmp_path: Path) -> None:
    manifest().save(tmp_path)
    path = tmp_path / MANIFEST_NAME
    intact = path.read_bytes().rstrip()
    for length in range(len(intact)):
        path.write_bytes(intact[:length])
        with raises(DataError, location=path) as error:
            Manifest.load(tmp_path)
        assert re.search(r"byte \d+", error.value.message)


@pytest.mark.parametrize(
    ("content", "observed"),
    [
        (b'{"a": \xff}', [6]),
        ('{"é": oops}'.encode(), [7]),
        (b"[]", ["list", 0]),
        (b"[" * 100_000, ["recursion"]),
        (b'{"a": ' + b"9" * 5000 + b"}", [5000]),
        (b'{"format_version": "1"}', ["format_version"]),
        (b'{"format_version": true}', ["format_version"]),
        (b'{"format_version": 0}', ["format_version"]),
    ],
)
def test_manifest_of_foreign_content_is_one_error(tmp_path: Path, content: bytes, observed: list[object]) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with raises(DataError, *observed, location=tmp_path / MANIFEST_NAME):
        Manifest.load(tmp_path)


def test_manifest_path_that_is_a_folder_is_one_error(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).mkdir()
    with raises(DataError, os.strerror(errno.EISDIR), location=tmp_path / MANIFEST_NAME):
        Manifest.load(tmp_path)


def fields_of(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all required fields at all depths."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        if path[:1] not in {("source",)} and path[-1:] != ("special_ids",):
            if not isinstance(content, list):
                yield (*path, key)
            yield from fields_of(value, (*path, key))


def change(path: Path, field: tuple[Any, ...], edit: Callable[[Any, Any], None]) -> None:
    content = json.loads(path.read_bytes())
    position = content
    for key in field[:-1]:
        position = position[key]
    edit(position, field[-1])
    path.write_text(json.dumps(content))


def test_manifest_without_any_one_field_is_refused(tmp_path: Path) -> None:
    manifest().save(tmp_path)
    path = tmp_path / MANIFEST_NAME
    intact = path.read_bytes()
    fields = [field for field in fields_of(json.loads(intact)) if field != ("format_version",)]
    assert len(fields) > 25
    for field in fields:
        change(path, field, lambda position, key: position.pop(key))
        with raises(DataError, location=path) as error:
            Manifest.load(tmp_path)
        assert re.search(rf"\b{field[-1]}\b", error.value.message)
        path.write_bytes(intact)


def test_manifest_with_any_one_value_changed_is_refused(tmp_path: Path) -> None:
    manifest().save(tmp_path)
    path = tmp_path / MANIFEST_NAME
    intact = path.read_bytes()

    def edit(position: Any, key: Any) -> None:
        value = position[key]
        position[key] = value + 1 if isinstance(value, int) else [] if isinstance(value, list | dict) else value + "0"

    for field in fields_of(json.loads(intact)):
        if field == ("tokenizer", "name"):
            continue  # for people
        change(path, field, edit)
        with raises(DataError, location=path) as error:
            Manifest.load(tmp_path)
        assert field[0] in error.value.message or "fingerprint" in error.value.message
        path.write_bytes(intact)


def test_manifest_number_as_text_is_refused(tmp_path: Path) -> None:
    manifest().save(tmp_path)
    change(tmp_path / MANIFEST_NAME, ("shards", 1, "tokens"), lambda position, key: position.update({key: "20"}))
    with raises(DataError, "shards.1.tokens", "integer", location=tmp_path / MANIFEST_NAME):
        Manifest.load(tmp_path)


def test_manifest_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    manifest().save(tmp_path)
    change(tmp_path / MANIFEST_NAME, ("rule", "extra"), lambda position, key: position.update({key: 1}))
    with raises(DataError, "rule.extra", location=tmp_path / MANIFEST_NAME):
        Manifest.load(tmp_path)


def test_manifest_of_a_newer_format_says_to_update_whatever_else_it_holds(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text('{"format_version": 2, "things": []}')
    with raises(DataError, "format_version", 2, 1, location=tmp_path / MANIFEST_NAME, remedy="megatron_bipe"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("name", ["../s", "a/b", ".hidden", "", "a\\b"])
def test_shard_record_name_that_leaves_the_folder_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        shard(name)


def test_shard_record_of_more_segments_than_tokens_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"11 .* 10 "):
        shard(segments=11)


def test_shard_record_without_one_of_its_files_is_refused() -> None:
    files_left = {suffix: record for suffix, record in shard().files.items() if suffix != "seg"}
    with pytest.raises(ValidationError, match=" seg "):
        ShardRecord(name="s", documents=1, tokens=1, segments=1, text_bytes=1, files=files_left)


def test_manifest_listing_a_shard_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="s-00000"):
        manifest(shards=(shard(), shard()))


@pytest.mark.parametrize("name", ["pairs", "pairs/x_text_document", "pairs/x_text_document.idx"])
def test_manifest_missing_beside_pairs_of_megatron_says_how_to_convert_them(tmp_path: Path, name: str) -> None:
    (tmp_path / "pairs").mkdir()
    for suffix in ("bin", "idx"):
        (tmp_path / "pairs" / f"x_text_document.{suffix}").write_bytes(b"")
    with raises(DataError, "x_text_document.bin", location=tmp_path / name, remedy=f"resegment {tmp_path / name} "):
        Manifest.load(tmp_path / name)
