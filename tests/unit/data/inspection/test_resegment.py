"""A dataset with another segment rule equals one made from the text; an error writes nothing."""

import errno
import json
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.inspection import resegment as module
from megatron_bipe.data.inspection.resegment import resegment
from megatron_bipe.data.inspection.verify import find_problems
from megatron_bipe.data.manifest import Manifest
from megatron_bipe.data.shard_layout import Suffix
from megatron_bipe.errors import DataError
from megatron_bipe.io import sha256_of, unfinished_path
from preprocessing.build import BuildOptions, build
from tests.helpers.errors import assert_error, raises

TEXTS = [["a cat\nsat.\n", "x\n\ny"], [], ["\u4e16\x1bz q\n", ""]]
RULES = ["newline", "sentence", "fixed:1", "fixed:3", "fixed:16", "[13]", '["a","\\n"]']
Write = Callable[..., Manifest]


@pytest.fixture
def folder(write_text_dataset: Write, tmp_path: Path) -> Path:
    write_text_dataset(tmp_path / "old", TEXTS)
    return tmp_path / "old"


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def without_source(folder: Path) -> tuple[dict[str, bytes], dict[str, object]]:
    """Return all files, and the manifest without `source`."""
    files = content(folder)
    manifest = json.loads(files.pop("manifest.json"))
    del manifest["source"]
    return files, manifest


@pytest.fixture(scope="module")
def built(write_text_dataset: Write, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a dataset of several shards, made from text with a rule."""
    base = tmp_path_factory.mktemp("built")
    write_text_dataset(base / "letters", TEXTS)
    settings = base / "letters" / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(list("abc de.\n\u4e16"), size)) for size in generator.integers(1, 90, 40)]
    (base / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def make(rule: str) -> Path:
        output = base / f"made-{RULES.index(rule)}"
        if not output.exists():
            build(
                BuildOptions(
                    [str(base / "in.jsonl")],
                    str(base / "letters" / "tokenizer"),
                    output,
                    segments=rule,
                    shard_tokens=700,
                    append_eos=True,
                    backend="stock",
                )
            )
        return output

    return make


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("origin", ["sentence", "fixed:3"])
def test_resegment_equals_the_dataset_made_from_text_with_that_rule(
    built: Callable[[str], Path], tmp_path: Path, origin: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", 64)
    before = content(built(origin))
    done: list[int] = []
    made = resegment(built(origin), rule, tmp_path / "new", workers=2, advance=done.append)
    assert without_source(tmp_path / "new") == without_source(built(rule))
    assert len(made.shards) > 2 and sum(done) == made.num_tokens
    assert Manifest.load(tmp_path / "new") == made
    old = Manifest.load(built(origin))
    assert made.source == old.source | {"resegmented_from": {"rule": old.rule.spec, "fingerprint": old.fingerprint}}
    assert content(built(origin)) == before
    assert list(find_problems([TokenDataset(tmp_path / "new")])) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_resegment_links_tokens_and_index_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    resegment(folder, "sentence", tmp_path / "new")
    for path in folder.rglob("*.*"):
        linked = path.samefile(tmp_path / "new" / path.relative_to(folder))
        assert linked == (path.suffix in (".bin", ".idx")), path


def test_resegment_copies_where_links_are_impossible(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resegment(folder, "sentence", tmp_path / "linked")

    def refuse(*paths: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    resegment(folder, "sentence", tmp_path / "copied")
    assert content(tmp_path / "copied") == content(tmp_path / "linked")
    assert not (folder / "part-00000.bin").samefile(tmp_path / "copied" / "part-00000.bin")


def test_resegment_through_a_symbolic_link_links_the_file_itself(folder: Path, tmp_path: Path) -> None:
    target = (folder / "part-00000.bin").rename(tmp_path / "elsewhere.bin")
    (folder / "part-00000.bin").symlink_to(target)
    resegment(folder, "sentence", tmp_path / "new")
    assert not (tmp_path / "new" / "part-00000.bin").is_symlink()


def test_resegment_onto_a_dataset_is_refused_unless_overwriting(
    folder: Path, write_text_dataset: Write, tmp_path: Path
) -> None:
    write_text_dataset(tmp_path / "new", [["q"]] * 5)  # more shards than the new one
    before = content(tmp_path / "new")
    with raises(DataError, location=tmp_path / "new", remedy="--overwrite"):
        resegment(folder, "sentence", tmp_path / "new")
    assert content(tmp_path / "new") == before
    resegment(folder, "sentence", tmp_path / "new", overwrite=True)
    resegment(folder, "sentence", tmp_path / "fresh")
    assert content(tmp_path / "new") == content(tmp_path / "fresh")


def test_resegment_into_an_empty_folder_is_done(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    resegment(folder, "sentence", tmp_path / "new")
    assert TokenDataset(tmp_path / "new").rule.spec == "sentence"


@pytest.mark.parametrize("name", ["notes.txt", "sub/tokens-00000.bin", "tokenizer/notes.txt", "other-00000.bin"])
def test_resegment_onto_what_is_no_dataset_is_refused_even_when_told_to_overwrite(
    folder: Path, tmp_path: Path, name: str
) -> None:
    file = tmp_path / "new" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with raises(DataError, "sub" if name.startswith("sub/") else name, location=tmp_path / "new"):
        resegment(folder, "sentence", tmp_path / "new", overwrite=True)
    assert file.read_text() == "mine"


def test_resegment_replaces_no_files_without_a_manifest_that_lists_them(folder: Path, tmp_path: Path) -> None:
    resegment(folder, "sentence", tmp_path / "new")
    (tmp_path / "new" / "manifest.json").unlink()
    before = content(tmp_path / "new")
    with raises(DataError, "part-00000.bin", location=tmp_path / "new"):
        resegment(folder, "sentence", tmp_path / "new", overwrite=True)
    assert content(tmp_path / "new") == before


@pytest.mark.parametrize("name", ["old", "old/inner", "link"])
def test_resegment_onto_itself_is_refused_and_harmless(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(folder)
    before = content(folder)
    with raises(DataError, location=(tmp_path / name).resolve()):
        resegment(folder, "sentence", tmp_path / name, overwrite=True)
    assert content(folder) == before


def test_resegment_onto_a_dataset_that_gets_a_foreign_file_meanwhile_is_refused(
    folder: Path, write_text_dataset: Write, tmp_path: Path
) -> None:
    write_text_dataset(tmp_path / "new", [["q"]])
    before = content(tmp_path / "new")
    with raises(DataError, "notes.txt", location=tmp_path / "new"):
        resegment(
            folder,
            "sentence",
            tmp_path / "new",
            overwrite=True,
            advance=lambda _: (tmp_path / "new" / "notes.txt").write_text("mine"),
        )
    assert content(tmp_path / "new") == before | {"notes.txt": b"mine"}


@pytest.mark.parametrize("inside", ["", "draft/new"])
def test_resegment_of_the_folder_it_would_work_in_is_refused(folder: Path, tmp_path: Path, inside: str) -> None:
    source = unfinished_path(tmp_path / "new") / inside
    source.parent.mkdir(parents=True, exist_ok=True)
    source = folder.rename(source)
    before = content(source)
    with raises(DataError, location=tmp_path / "new"):
        resegment(source, "sentence", tmp_path / "new", overwrite=True)
    assert content(source) == before


def test_resegment_onto_a_file_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("mine")
    with raises(DataError, "a file", location=tmp_path / "new"):
        resegment(folder, "sentence", tmp_path / "new", overwrite=True)
    assert (tmp_path / "new").read_text() == "mine"


def test_resegment_after_a_killed_run_starts_anew(folder: Path, tmp_path: Path) -> None:
    left = unfinished_path(tmp_path / "new")
    (left / "draft" / "new").mkdir(parents=True)
    (left / "draft" / "new" / "part-00000.seg").write_bytes(b"half")
    os.link(folder / "part-00001.bin", left / "draft" / "new" / "part-00001.bin")
    resegment(folder, "sentence", tmp_path / "new")
    assert list(find_problems([TokenDataset(tmp_path / "new")])) == []
    assert not left.exists()


@pytest.mark.parametrize("function", ["data.inspection.resegment.link_or_copy", "io.fsync_path", "io.os.rename"])
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_resegment_that_fails_leaves_nothing_and_the_old_output_as_it_was(
    folder: Path,
    write_text_dataset: Write,
    tmp_path: Path,
    function: str,
    fault: BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_text_dataset(tmp_path / "new", [["q"]])
    before = content(tmp_path / "new")
    original, failed = pkgutil.resolve_name(f"megatron_bipe.{function}"), []

    def fail_once(*arguments: object) -> None:
        if failed:
            return original(*arguments)
        failed.append(True)
        raise type(fault)(*fault.args)  # a new one, since a handler names its path in it

    monkeypatch.setattr(f"megatron_bipe.{function}", fail_once)
    monkeypatch.setattr("megatron_bipe.io._exchange", lambda *_: False)  # so that the folders are renamed
    with pytest.raises(DataError if isinstance(fault, OSError) else KeyboardInterrupt) as caught:
        resegment(folder, "sentence", tmp_path / "new", overwrite=True, workers=2)
    if isinstance(fault, OSError):
        assert_error(caught.value, DataError, fault.strerror, location=tmp_path / "new")
    assert failed and content(tmp_path / "new") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_resegment_of_a_token_outside_the_vocabulary_names_it_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    tokens = folder / "part-00002.bin"
    damaged_error = bytearray(tokens.read_bytes())
    damaged_error[5] ^= 0x80
    tokens.write_bytes(damaged_error)
    token = int(np.frombuffer(damaged_error, "<u2")[2])
    with raises(DataError, 2, 4, token, 288, location=tokens):
        resegment(folder, "sentence", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_resegment_of_a_changed_file_names_it_and_leaves_nothing(folder: Path, tmp_path: Path, suffix: Suffix) -> None:
    path = folder / f"part-00002.{suffix}"
    path.write_bytes(path.read_bytes()[:-2] + b"\x07\x00")
    expected = Manifest.load(folder).shards[2].files[suffix].sha256
    with raises(DataError, sha256_of(path), expected, location=path):
        resegment(folder, "sentence", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


def test_resegment_with_fixed_length_of_a_damaged_index_names_it(folder: Path, tmp_path: Path) -> None:
    index = folder / "part-00000.idx"
    damaged_error = bytearray(index.read_bytes())
    damaged_error[34] ^= 1
    index.write_bytes(damaged_error)
    with raises(DataError, "byte offsets", 1, location=index):
        resegment(folder, "fixed:3", tmp_path / "new")


def test_resegment_by_a_bad_rule_or_without_the_tokenizer_writes_nothing(folder: Path, tmp_path: Path) -> None:
    with raises(DataError, "'sentense'", location="--segments", remedy="sentence?"):
        resegment(folder, "sentense", tmp_path / "new")
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with raises(DataError, location="tokenizer/tokenizer.json"):
        resegment(folder, "sentence", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
