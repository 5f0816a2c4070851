"""Building datasets: same bytes for any number of workers, nothing unfinished, nothing overwritten unasked."""

import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.manifest import Manifest
from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.errors import DataError
from preprocessing import ranges
from preprocessing.build import BuildOptions, build
from preprocessing.output import partition_slug


def options_for(
    tmp_path: Path, tokenizer_folder: Path, *inputs: Path, name: str = "out", **more: object
) -> BuildOptions:
    return BuildOptions([str(path) for path in inputs], str(tokenizer_folder), tmp_path / name, **more)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def decoded(folder: Path) -> list[str]:
    """The documents of a dataset, read back through its own copy of the tokenizer."""
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
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "in.jsonl"
    lines = [json.dumps({"text": f"{n} words .\n" * (n % 90), "set": f"S {n % 3}"}) for n in range(4000)]
    file.write_text("\n".join([*lines, "bad", '{"text": "no set"}']))
    made = []
    for workers in (1, 2):
        more = {"workers": workers, "partition_by": "set", "shard_tokens": 100_000, "name": f"out{workers}"}
        build(options_for(tmp_path, tokenizer_folder, file, **more))
        made.append(content(tmp_path / f"out{workers}"))
    assert made[0] == made[1]
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


def test_build_malformed_lines_are_named_counted_and_let_pass_up_to_the_limit(
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
    with pytest.raises(DataError, match=r"2 of 4 lines are malformed, more than the 1 .*line 2.*--max-malformed"):
        build(strict)
    with pytest.raises(DataError, match="no manifest"):
        TokenDataset(strict.output)
    build(replace(strict, max_malformed=2))  # goes on with what was done
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
    with pytest.raises(DataError, match="11 of 1011 lines"):
        build(options_for(tmp_path, tokenizer_folder, file, name="many"))


def test_build_no_text_is_an_error_that_leaves_nothing(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"txt": "a"}\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"hold no text \(2 lines, 1 malformed, 1 empty\).*--text-key"):
        build(options_for(tmp_path, tokenizer_folder, file))
    assert not (tmp_path / "out").exists()


def test_build_failing_midway_leaves_nothing(tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path]) -> None:
    damaged = tmp_path / "z.jsonl.zst"
    damaged.write_bytes(inputs["zst"].read_bytes()[:-9])
    options = options_for(
        tmp_path, tokenizer_folder, inputs["jsonl"], damaged, partition_by="meta.pile_set_name", shard_tokens=30
    )
    with pytest.raises(DataError, match=r"z\.jsonl\.zst"):
        build(options)
    assert not options.output.exists()
    options.output.mkdir()  # a folder that was there stays, empty as it was
    with pytest.raises(DataError):
        build(options)
    assert list(options.output.iterdir()) == []


def test_build_overwrite_replaces_all_of_an_earlier_dataset(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], texts: list[str]
) -> None:
    build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], partition_by="meta.pile_set_name", shard_tokens=30))
    before = content(tmp_path / "out")
    options = options_for(tmp_path, tokenizer_folder, inputs["gz"])
    with pytest.raises(DataError, match=r"holds a dataset.*--overwrite"):
        build(options)
    assert content(tmp_path / "out") == before
    build(options_for(tmp_path, tokenizer_folder, inputs["gz"], overwrite=True))
    assert decoded(options.output) == texts
    assert not (options.output / "arxiv").exists()
    build(options_for(tmp_path, tokenizer_folder, inputs["gz"], name="fresh"))
    assert content(options.output) == content(tmp_path / "fresh")


@pytest.mark.parametrize("place", ["notes.md", "arxiv/notes.md", "tokenizer/notes.md", "pictures/a/b.png"])
def test_build_overwrite_never_touches_foreign_files(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], place: str
) -> None:
    foreign = tmp_path / "out" / place
    foreign.parent.mkdir(parents=True)
    foreign.write_text("precious")
    with pytest.raises(DataError, match="no part of a dataset"):
        build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], overwrite=True))
    assert foreign.read_text() == "precious"


def test_build_output_that_is_a_file_is_an_error(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path]
) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(DataError, match="must be a folder"):
        build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], overwrite=True))


@pytest.mark.parametrize("bad", [{"workers": 0}, {"shard_tokens": 0}, {"max_malformed": -1}, {"segments": "no rule"}])
def test_build_bad_option_is_named(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], bad: dict[str, object]
) -> None:
    with pytest.raises(DataError, match="--" + next(iter(bad)).replace("_", "-")):
        build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], **bad))
    assert not (tmp_path / "out").exists()


def test_build_too_many_partitions_is_an_error(
    tmp_path: Path, tokenizer_folder: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "MAX_PARTITIONS", 1)
    with pytest.raises(DataError, match="more than 1 values"):
        build(options_for(tmp_path, tokenizer_folder, inputs["jsonl"], partition_by="meta.pile_set_name"))


def test_partition_slug_is_safe_and_unlike_the_ones_taken() -> None:
    assert partition_slug("Gutenberg (PG-19)", set()) == "gutenberg-pg-19"
    assert partition_slug("Pile-CC", set()) == "pile-cc"
    assert partition_slug("gutenberg pg 19", {"gutenberg-pg-19"}).startswith("gutenberg-pg-19-")
    for value in ("..", "/", "\u4e2d\u6587", "../../etc", "a\x00b", "tokenizer"):
        slug = partition_slug(value, set())
        assert slug.strip(".") and "/" not in slug and "\x00" not in slug and not slug.startswith(".")
        assert slug != "tokenizer"  # the name of the folder that no partition may replace
