"""Datasets: the same bytes for any number of workers, nothing unfinished, nothing overwritten without the option."""

import errno
import gzip
import itertools
import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import zstandard

from megatron_bipe.data.dataset import TokenDataset, open_tokenizer
from megatron_bipe.data.manifest import Manifest
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.errors import DataError
from preprocessing import build as build_module
from preprocessing import range_worker
from preprocessing.build import BuildOptions, build
from preprocessing.commit import clear_output, partition_slug, recorded_files
from preprocessing.readers import inputs as inputs_module
from preprocessing.work_dir import WorkFolder
from tests.helpers.errors import raises


def options_for(
    tmp_path: Path, tokenizer_folder: Path, *inputs: Path, name: str = "out", **more: object
) -> BuildOptions:
    return BuildOptions([str(path) for path in inputs], str(tokenizer_folder), tmp_path / name, **more)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def decoded(folder: Path) -> list[str]:
    """Return the documents of a dataset, decoded by its own copy of the tokenizer."""
    dataset = TokenDataset(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    dataset.check_tokenizer(tokenizer.fingerprint, "test")
    bounds = dataset.document_bounds().tolist()
    return [tokenizer.decode(dataset.tokens(a, b).tolist()) for a, b in itertools.pairwise(bounds)]


def test_build_reads_back_as_the_texts(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], texts: list[str]
) -> None:
    options = options_for(tmp_path, tokenizer_folder, inputs["zst"])
    ((folder, manifest),) = build(options).items()
    assert folder == options.output
    assert decoded(folder) == texts
    assert Manifest.load(folder) == manifest
    assert manifest.num_documents == manifest.source["documents"] == manifest.source["lines"] == len(texts)
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.tokenizer.special_ids == {"bos": 1, "eos": 2, "unk": 0}
    assert manifest.source["inputs"] == [{"file": str(inputs["zst"]), "bytes": inputs["zst"].stat().st_size}]


def test_build_all_input_formats_give_the_same_dataset(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path]
) -> None:
    made = {}
    for kind, path in inputs.items():
        ((folder, manifest),) = build(options_for(tmp_path, tokenizer_folder, path, name=kind)).items()
        files = content(folder)
        del files["manifest.json"]  # names the input
        made[kind] = (files, manifest.fingerprint)
    assert made["jsonl"] == made["zst"] == made["gz"] == made["txt"]


def test_build_two_workers_give_the_bytes_of_one(
    tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "in.jsonl"
    lines = [json.dumps({"text": f"{n} words .\n" * (n % 90), "set": f"S {n % 3}"}) for n in range(4000)]
    file.write_text("\n".join([*lines, "bad", '{"text": "no set"}']))
    made = []
    for workers in (1, 2):
        more = {"workers": workers, "partition_by": "set", "shard_tokens": 100_000, "name": f"out{workers}"}
        with caplog.at_level(logging.INFO):
            build(options_for(tmp_path, tokenizer_folder, file, **more))
        made.append(content(tmp_path / f"out{workers}"))
    assert made[0] == made[1]
    assert caplog.text.count("Tokenizing: 100.0%") == 2
    assert {"s-0/tokens-00001.bin", "s-2/manifest.json", "s-1/tokenizer/tokenizer.json"} <= made[0].keys()


def test_build_partitions_split_the_documents(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], texts: list[str]
) -> None:
    made = build(options_for(tmp_path, tokenizer_folder, inputs["gz"], partition_by="meta.pile_set_name"))
    assert [folder.name for folder in made] == ["gutenberg-pg-19", "arxiv"]
    assert [manifest.source["partition"] for manifest in made.values()] == ["Gutenberg (PG-19)", "ArXiv"]
    first, second = made
    assert decoded(first) == texts[::2]
    assert decoded(second) == texts[1::2]


def test_build_shards_hold_at_most_the_tokens_asked_unless_one_document_is_longer(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], texts: list[str]
) -> None:
    options = options_for(tmp_path, tokenizer_folder, inputs["jsonl"], inputs["gz"], shard_tokens=60)
    (manifest,) = build(options).values()
    assert len(manifest.shards) > 2
    assert all(shard.tokens <= 60 or shard.documents == 1 for shard in manifest.shards)
    assert decoded(options.output) == texts + texts


def test_build_malformed_lines_are_named_and_counted_up_to_the_limit(
    tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "a"}\nbad\n{"text": ""}\n{"text": 3}\n')
    with caplog.at_level(logging.WARNING):
        (manifest,) = build(options_for(tmp_path, tokenizer_folder, file)).values()
    assert manifest.source | {"malformed_lines": 2, "empty_texts": 1, "lines": 4, "documents": 1} == manifest.source
    assert [(bad["file"], bad["line"]) for bad in manifest.source["first_malformed"]] == [
        (str(file), 2),
        (str(file), 4),
    ]
    assert f"{file}, line 2: no JSON" in caplog.text
    strict = options_for(tmp_path, tokenizer_folder, file, name="strict", max_malformed=1)
    with raises(DataError, 2, 4, 1, f"{file}, line 2", location=file, remedy="--max-malformed"):
        build(strict)
    with raises(DataError, "manifest.json", location=strict.output):
        TokenDataset(strict.output)
    build(replace(strict, max_malformed=2))  # continues with what was done
    assert content(strict.output) == content(tmp_path / "out")


def test_build_by_default_more_than_ten_lines_and_one_in_a_hundred_malformed_is_an_error(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    file = tmp_path / "in.jsonl"
    good = '{"text": "a"}\n'
    file.write_text("bad\n" * 10 + good)
    build(options_for(tmp_path, tokenizer_folder, file, name="few"))
    file.write_text("bad\n" * 11 + good * 1100)
    build(options_for(tmp_path, tokenizer_folder, file, name="share"))
    file.write_text("bad\n" * 11 + good * 1000)
    with raises(DataError, 11, 1011, location=file, remedy="--max-malformed"):
        build(options_for(tmp_path, tokenizer_folder, file, name="many"))


def test_build_no_text_is_an_error_that_leaves_nothing(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"txt": "a"}\n{"text": ""}\n')
    with raises(DataError, "2 lines", "1 malformed", "1 empty", f"{file}, line 1", location=file, remedy="--text-key"):
        build(options_for(tmp_path, tokenizer_folder, file))
    assert not (tmp_path / "out").exists()


def test_build_failing_midway_leaves_nothing(tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path]) -> None:
    damaged = tmp_path / "z.jsonl.zst"
    damaged.write_bytes(inputs["zst"].read_bytes()[:-9])
    options = options_for(
        tmp_path, tokenizer_folder, inputs["jsonl"], damaged, partition_by="meta.pile_set_name", shard_tokens=30
    )
    with raises(DataError, location=damaged):
        build(options)
    assert not options.output.exists()
    options.output.mkdir()  # a folder that was there stays, empty as it was
    with raises(DataError, location=damaged):
        build(options)
    assert list(options.output.iterdir()) == []


def test_build_overwrite_replaces_all_of_an_earlier_dataset(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], texts: list[str]
) -> None:
    build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], partition_by="meta.pile_set_name", shard_tokens=30))
    before = content(tmp_path / "out")
    options = options_for(tmp_path, tokenizer_folder, inputs["gz"])
    with raises(DataError, location=tmp_path / "out", remedy="--overwrite"):
        build(options)
    assert content(tmp_path / "out") == before
    build(options_for(tmp_path, tokenizer_folder, inputs["gz"], overwrite=True))
    assert decoded(options.output) == texts
    assert not (options.output / "arxiv").exists()
    build(options_for(tmp_path, tokenizer_folder, inputs["gz"], name="fresh"))
    assert content(options.output) == content(tmp_path / "fresh")


@pytest.mark.parametrize(
    "name", ["notes.md", "arxiv/notes.md", "tokenizer/notes.md", "pictures/a/b.png", "arxiv/unfinished/job.json"]
)
def test_build_overwrite_never_touches_foreign_files(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], name: str
) -> None:
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("precious")
    with raises(DataError, name, location=tmp_path / "out"):
        build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], overwrite=True))
    assert foreign.read_text() == "precious"


def test_build_overwrite_never_deletes_what_its_own_records_do_not_list(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path]
) -> None:
    """Datasets below the output that other commands made, and files of our names without a record."""

    def refuses(foreign: str) -> None:
        before = content(tmp_path / "out")
        for output in ({"partition_by": "meta.pile_set_name"}, {"split": "train=0.5,valid=0.5"}, {}):
            options = options_for(tmp_path, tokenizer_folder, inputs["gz"], overwrite=True, **output)
            with raises(DataError, foreign, location=tmp_path / "out", remedy="move"):
                build(options)
        assert content(tmp_path / "out") == before

    partitioned = {"partition_by": "meta.pile_set_name"}
    for name, more in (("out/pile", {}), ("out/subsets", partitioned), ("out/train", {})):
        build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], name=name, **more))
        refuses(name.removeprefix("out/"))
        shutil.move(tmp_path / name, tmp_path / "away" / name)
    build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], **partitioned))
    shutil.copytree(tmp_path / "out" / "arxiv", tmp_path / "out" / "other")  # its manifest names a partition, too
    refuses("other")
    (tmp_path / "out" / "other").rename(tmp_path / "away" / "other")
    shutil.rmtree(tmp_path / "out" / "arxiv")
    shutil.copytree(tmp_path / "away/out/pile", tmp_path / "out" / "arxiv")  # not the dataset on record
    refuses("arxiv")
    shutil.rmtree(tmp_path / "out")
    shutil.copytree(tmp_path / "away/out/pile", tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    refuses("tokenizer")


@pytest.mark.parametrize("name", ["notes.md", "00000/000.bin", "tokens-00000.bin", "a/b/notes.md"])
def test_build_work_folder_without_a_record_is_refused(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], name: str
) -> None:
    foreign = tmp_path / "out" / "unfinished" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("precious")
    for overwrite in (False, True):
        with raises(DataError, f"unfinished/{name.partition('/')[0]}", location=tmp_path / "out"):
            build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], overwrite=overwrite))
        assert foreign.read_text() == "precious"


def test_build_foreign_files_beside_the_record_of_a_job_are_refused(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path]
) -> None:
    options = options_for(tmp_path, tokenizer_folder, inputs["jsonl"])
    with mock.patch.object(build_module, "publish", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        build(options)
    for name in ("00000/notes.md", "mine/000.bin", "notes.md"):
        foreign = options.output / "unfinished" / name
        foreign.parent.mkdir(exist_ok=True)
        foreign.write_text("precious")
        for change in ({}, {"overwrite": True}, {"overwrite": True, "append_eos": True}):
            with raises(DataError, "unfinished/" + name.removesuffix("/000.bin"), location=options.output):
                build(replace(options, **change))
        assert foreign.read_text() == "precious"
        foreign.unlink()
        if name.startswith("mine"):
            foreign.parent.rmdir()
    build(options)
    assert [path.name for path in options.output.glob("unfinished*")] == []


def test_build_dataset_added_during_the_run_is_not_replaced(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], name="other"))
    options = options_for(tmp_path, tokenizer_folder, inputs["gz"], overwrite=True)
    publish = build_module.publish

    def add(*given: object) -> object:
        shutil.copytree(tmp_path / "other", options.output, dirs_exist_ok=True)
        return publish(*given)

    with monkeypatch.context() as patch, raises(DataError, "manifest.json", location=options.output):
        patch.setattr(build_module, "publish", add)
        build(options)
    with raises(DataError, "manifest.json", location=options.output):
        build(options)
    assert content(options.output).items() > content(tmp_path / "other").items()


def test_build_damaged_records_list_nothing(tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path]) -> None:
    options = options_for(tmp_path, tokenizer_folder, inputs["jsonl"], partition_by="meta.pile_set_name")
    build(options)
    record = options.output / "datasets.json"
    for damaged in ("", "{", "[]", '{"datasets": {"../away": "%s"}}' % ("0" * 64)):
        record.write_text(damaged)
        before = content(options.output)
        with raises(DataError, "arxiv", location=options.output):
            build(replace(options, overwrite=True))
        assert content(options.output) == before


def test_build_output_that_is_a_file_is_an_error(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path]
) -> None:
    (tmp_path / "out").write_text("x")
    with raises(DataError, "a file", location=tmp_path / "out"):
        build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], overwrite=True))


@pytest.mark.parametrize(
    "bad",
    [
        {"workers": 0},
        {"shard_tokens": 0},
        {"max_malformed": -1},
        {"segments": "no rule"},
        {"check_share": 1.1},
        {"check_share": -0.1},
    ],
)
def test_build_bad_option_is_named(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], bad: dict[str, object]
) -> None:
    ((name, value),) = bad.items()
    with raises(DataError, value, location="--" + name.replace("_", "-")):
        build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], **bad))
    assert not (tmp_path / "out").exists()


def test_build_too_many_partitions_is_an_error(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_worker, "MAX_DATASETS", 1)
    with raises(DataError, 1, "'ArXiv'", location="--partition-by"):
        build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], partition_by="meta.pile_set_name"))


def test_partition_slug_is_safe_and_unique() -> None:
    assert partition_slug("Gutenberg (PG-19)", set()) == "gutenberg-pg-19"
    assert partition_slug("Pile-CC", set()) == "pile-cc"
    assert partition_slug("gutenberg pg 19", {"gutenberg-pg-19"}).startswith("gutenberg-pg-19-")
    for value in ("..", "/", "\u4e2d\u6587", "../../etc", "a\x00b", "tokenizer"):
        slug = partition_slug(value, set())
        assert slug.strip(".") and "/" not in slug and "\x00" not in slug and not slug.startswith(".")
        assert slug != "tokenizer"  # the name of the folder that no partition may replace


@pytest.mark.parametrize("value", ["manifest.json", "tokenizer", "unfinished"])
def test_partition_slug_is_never_a_reserved_name(value: str) -> None:
    assert partition_slug(value, set()).startswith(f"{value}-")


def test_build_partitions_of_like_names_stay_apart_wherever_they_first_appear(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "LEAST_RANGE_TEXT_BYTES", 800)
    values = ["b", "B!", "a", "b", "b?", "A", "manifest.json"]
    for n, value in enumerate(values):
        (tmp_path / f"{n}.jsonl").write_text(json.dumps({"text": f"text {n}", "set": value}) + "\n" + " " * 900 + "\n")
    made = build(options_for(tmp_path, tokenizer_folder, tmp_path, partition_by="set", split="x=1", name="made/out"))
    assert list(dict.fromkeys(values)) == [manifest.source["partition"] for manifest in made.values()]
    assert [decoded(folder) for folder in made] == [["text 0", "text 3"], *([f"text {n}"] for n in (1, 2, 4, 5, 6))]
    names = [folder.name.partition("-")[0] for folder in made]
    assert names == ["b", "b", "a", "b", "a", "manifest.json"] and len({folder.name for folder in made}) == 6


def test_build_output_inside_the_input_is_not_read(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = tmp_path / "tokenizer-with-merges"
    shutil.copytree(tokenizer_folder, tokenizer)
    (tokenizer / "merges.txt").write_text("not a text")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("a text")
    for overwrite in (False, True):
        options = BuildOptions([str(folder)], str(tokenizer), folder / "out", overwrite=overwrite)
        build(options)
        assert (options.output / "tokenizer" / "merges.txt").exists()
        assert decoded(options.output) == ["a text"]


def test_build_tokenizer_inside_the_output_is_refused_and_left_there(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path]
) -> None:
    options = options_for(tmp_path, tokenizer_folder, inputs["jsonl"])
    build(options)
    before = content(options.output)
    with raises(DataError, "output folder", location=options.output / "tokenizer" / "tokenizer.json"):
        build(replace(options, tokenizer=str(options.output / "tokenizer"), overwrite=True))
    assert content(options.output) == before


def test_build_file_name_that_is_not_utf8_is_spelled_out(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"\xff.jsonl"))
    file.write_text('{"text": "a"}\nbad\n')
    options = options_for(tmp_path, tokenizer_folder, file)
    with raises(DataError, 0, r"in\xff.jsonl, line 2", location=r"in\xff.jsonl", remedy="--max-malformed"):
        build(replace(options, max_malformed=0))
    (manifest,) = build(options).values()
    assert manifest.source["inputs"] == [{"file": f"{tmp_path}/in\\xff.jsonl", "bytes": 18}]
    assert manifest.source["first_malformed"][0]["file"] == f"{tmp_path}/in\\xff.jsonl"


@pytest.mark.parametrize("name", ["out/linked", "out/tokenizer", "out/tokens-00000.bin"])
def test_build_link_in_the_output_is_foreign(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], name: str
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "tokenizer.json").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "precious")
    with raises(DataError, Path(name).name, location=tmp_path / "out"):
        build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], overwrite=True))
    assert (tmp_path / name).is_symlink() and (tmp_path / "precious" / "tokenizer.json").exists()


def test_build_output_that_cannot_be_made_is_one_error(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path]
) -> None:
    with raises(DataError, os.strerror(errno.ENOTDIR), location=inputs["jsonl"] / "out"):
        build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], name="inputs/a.jsonl/out"))


def test_build_splits_of_partitions_count_as_datasets(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_worker, "MAX_DATASETS", 2)
    options = options_for(tmp_path, tokenizer_folder, inputs["jsonl"], partition_by="meta.pile_set_name")
    build(options)
    with raises(DataError, 2, "'Gutenberg (PG-19)'", location="--partition-by"):
        build(replace(options, split="a=0.5,b=0.5", output=tmp_path / "split"))


def test_build_tokenizer_is_on_the_disk_before_the_manifest(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[Path] = set()
    fsync, save = os.fsync, Manifest.save

    def note(descriptor: int) -> None:
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    def saved(manifest: Manifest, folder: Path) -> None:
        assert {folder, folder / "tokenizer", *(folder / "tokenizer").iterdir()} <= synced
        save(manifest, folder)
        synced.discard(folder.parent)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Manifest, "save", saved)
    options = options_for(
        tmp_path, tokenizer_folder, inputs["jsonl"], split="a=0.5,b=0.5", partition_by="meta.pile_set_name"
    )
    made = build(options)
    assert {folder.parent for folder in made} <= synced


def test_build_range_with_too_much_malformed_stops_every_run(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "LEAST_RANGE_TEXT_BYTES", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 3000)  # so 11 are not too many of all
    (tmp_path / "b.jsonl").write_text("bad\n" * 11 + '{"text": "b"}\n' * 60)
    options = options_for(tmp_path, tokenizer_folder, tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    for _ in range(2):
        with raises(DataError, 11, 71, 10, location=tmp_path / "b.jsonl", remedy="--max-malformed"):
            build(options)
    (manifest,) = build(replace(options, max_malformed=11)).values()
    assert manifest.source["malformed_lines"] == 11


def test_build_inputs_without_text_are_skipped(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jsonl", "b.json", "c.txt"):
        (folder / name).touch()
    (folder / "d.jsonl").write_bytes(b"\n \n\r\n")
    (folder / "e.jsonl.zst").write_bytes(zstandard.compress(b""))
    for more in ({}, {"deduplicate": True}):
        with raises(DataError, "1 lines", "0 malformed", "1 empty", location=folder, remedy="--text-key"):
            build(options_for(tmp_path, tokenizer_folder, folder, **more))
        assert not (tmp_path / "out").exists()
    (folder / "f.txt").write_bytes(b"x")
    (manifest,) = build(options_for(tmp_path, tokenizer_folder, folder, deduplicate=True)).values()
    assert (manifest.num_documents, manifest.source["empty_texts"]) == (1, 1)


@pytest.mark.parametrize("pack", [bytes, zstandard.compress, gzip.compress])
def test_build_lines_longer_than_ranges_are_complete_in_any_order_of_reading(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(inputs_module, "LEAST_RANGE_TEXT_BYTES", 5000)
    texts = [
        "first",
        random.Random(0).randbytes(30_000).hex(),
        "second",
        random.Random(1).randbytes(9_000).hex(),
        "last",
    ]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)  # no newline at the end
    file = tmp_path / ("in.jsonl" + {bytes: "", zstandard.compress: ".zst", gzip.compress: ".gz"}[pack])
    file.write_bytes(pack(lines.encode()))
    options = options_for(tmp_path, tokenizer_folder, file, shard_tokens=1)
    for order in (1, -1):  # backwards: no range continues the one before
        monkeypatch.setattr(build_module, "split_evenly", lambda numbers, weights, count: [numbers[::order]])  # noqa: B023
        output = tmp_path / str(order)
        build(replace(options, output=output))
        assert decoded(output) == texts


def test_build_first_texts_of_the_input_decide_the_backend(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\nbad\n')
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n{"text": "third"}\n')
    chosen = mock.Mock(return_value="stock")
    monkeypatch.setattr(build_module, "choose_backend", chosen)
    monkeypatch.setattr(build_module, "FIRST_CHARS", len("firstsecond"))
    build(options_for(tmp_path, tokenizer_folder, tmp_path / "a.jsonl", tmp_path / "b.jsonl", special_in_text=True))
    _, choice, special_in_text, documents = chosen.call_args.args
    assert (choice, special_in_text) == ("auto", True)
    assert [document.text for document in documents] == ["first", "second"]


def test_build_special_in_text_and_append_eos_make_special_tokens(
    tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("a<s>b")
    for special, eos in itertools.product((False, True), repeat=2):
        output = f"{special}-{eos}"
        more = {"special_in_text": special, "append_eos": eos, "name": output}
        (manifest,) = build(options_for(tmp_path, tokenizer_folder, tmp_path / "a.txt", **more)).values()
        ids = TokenDataset(tmp_path / output).tokens(0, manifest.num_tokens).tolist()
        assert (ids.count(1), ids[-1] == 2) == (1 + special, eos)
        assert manifest.record.special_in_text is special
        tokenizer = open_tokenizer(TokenDataset(tmp_path / output))  # gives the ids of the data
        assert tokenizer.encode_batch(["a<s>b"])[0].tolist() == ids[1 : len(ids) - eos]
        assert manifest.source["document_ends_with"] == ("eos" if eos else None)
    assert "slower" not in caplog.text  # the fast tokenizer was compared with the one that does the same


def test_build_append_eos_without_such_a_token_is_an_error(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path / "bare")
    (tmp_path / "a.txt").write_text("a")
    with raises(DataError, location=tmp_path / "bare" / "tokenizer.json", remedy="--append-eos"):
        build(options_for(tmp_path, tmp_path / "bare", tmp_path / "a.txt", append_eos=True))


def test_build_shard_is_filled_to_the_last_token(tmp_path: Path, tokenizer_folder: Path) -> None:
    line = '{"text": "the same text"}\n'
    (tmp_path / "a.jsonl").write_text(line * 2)
    (tmp_path / "b.jsonl").write_text(line * 2)
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    (single,) = build(options_for(tmp_path, tokenizer_folder, *files, name="single")).values()
    for documents, shards in ((4, [4]), (3, [3, 1]), (2, [2, 2]), (1, [1, 1, 1, 1])):
        more = {"shard_tokens": documents * single.num_tokens // 4, "name": str(documents)}
        (manifest,) = build(options_for(tmp_path, tokenizer_folder, *files, **more)).values()
        assert [shard.documents for shard in manifest.shards] == shards


@pytest.mark.parametrize("backend", ["auto", "stock"])
def test_build_empty_texts_are_dropped_or_kept_as_special_tokens_alone(
    tmp_path: Path, tokenizer_folder: Path, backend: str
) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": ""}\n{"text": "a"}\n{"text": ""}\n')
    (tmp_path / "z.txt").touch()
    options = options_for(tmp_path, tokenizer_folder, tmp_path / "in.jsonl", tmp_path / "z.txt", backend=backend)
    (dropped,) = build(options).values()
    assert (dropped.num_documents, dropped.source["empty_texts"]) == (1, 3)
    kept = replace(options, output=tmp_path / "kept", empty_texts="keep", append_eos=True)
    (manifest,) = build(kept).values()
    assert (manifest.num_documents, manifest.source["empty_texts"]) == (3, 1)  # an empty file has no record
    dataset = TokenDataset(kept.output)
    bounds = dataset.document_bounds().tolist()
    documents = [dataset.tokens(*pair).tolist() for pair in itertools.pairwise(bounds)]
    assert documents[0] == documents[2] == [1, 2] and documents[1][0] == 1 and len(documents[1]) > 2


def test_build_duplicates_are_skipped_and_counted(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n % 4}"}}\n' for n in range(9)))
    (tmp_path / "b.txt").write_text("3")
    options = options_for(tmp_path, tokenizer_folder, tmp_path / "a.jsonl", tmp_path / "b.txt", deduplicate=True)
    (manifest,) = build(options).values()
    assert decoded(options.output) == ["0", "1", "2", "3"]
    assert (manifest.source["duplicate_texts"], manifest.source["lines"]) == (6, 10)


def test_build_malformed_lines_of_one_range_are_numbered_within_their_files(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path]
) -> None:
    for name, lines in (("a.jsonl", "bad\n" * 7), ("b.jsonl", '{"text": "b"}\n' + "bad\n" * 7)):
        (tmp_path / name).write_text(lines)
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    (manifest,) = build(options_for(tmp_path, tokenizer_folder, *files, max_malformed=14)).values()
    places = [(Path(bad["file"]).name, bad["line"]) for bad in manifest.source["first_malformed"]]
    assert places == [*(("a.jsonl", n) for n in range(1, 8)), *(("b.jsonl", n) for n in (2, 3, 4))]


def test_partition_slug_of_long_values_is_a_unique_file_name() -> None:
    first = partition_slug("a" * 300 + "1", set())
    second = partition_slug("a" * 300 + "2", {first})
    assert first != second and max(len(first), len(second)) < 150


def test_clear_output_removes_each_manifest_first(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], partition_by="meta.pile_set_name"))
    iterdir, unlink, removed = Path.iterdir, Path.unlink, []
    monkeypatch.setattr(Path, "iterdir", lambda path: sorted(iterdir(path), reverse=True))
    monkeypatch.setattr(Path, "unlink", lambda path, **more: removed.append(path) or unlink(path, **more))
    work = WorkFolder(tmp_path / "out")
    work.begin({}, recorded_files(work), overwrite=True)
    clear_output(work)
    work.remove()
    first = {path.parent.name: path.name for path in reversed(removed)}
    assert first | dict.fromkeys(("arxiv", "gutenberg-pg-19"), "manifest.json") == first
    assert list((tmp_path / "out").rglob("*.*")) == []
