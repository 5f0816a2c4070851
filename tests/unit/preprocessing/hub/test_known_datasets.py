"""Datasets with a short name: what it stands for, and the evaluation subsets in folders of their own."""

import itertools
import json
from pathlib import Path

import zstandard

from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.tokenizer import load_tokenizer
from preprocessing.build import BuildOptions, build
from preprocessing.hub.download import download
from preprocessing.hub.plan import DEFAULT, KNOWN, DownloadOptions, find_known, next_commands
from tests.helpers.hub import serve


def test_find_known_takes_short_names_and_repositories() -> None:
    assert find_known("pile").repo == find_known("monology/pile-uncopyrighted").repo == DEFAULT
    assert find_known("pile").include == find_known(DEFAULT).include == ()
    assert find_known(DEFAULT).next_commands
    assert find_known("pile-val").include == ("val.jsonl.zst",)
    other = find_known("owner/other")
    assert (other.repo, other.include, other.next_commands) == ("owner/other", (), ())


def test_next_commands_are_those_whose_files_are_there() -> None:
    train, val, subsets = next_commands(KNOWN["pile"], Path("my pile"), ["train/00.jsonl.zst", "val.jsonl.zst"])
    assert "--input 'my pile'/train " in train
    assert "--input 'my pile'/val.jsonl.zst " in val and "--partition-by" not in val
    assert subsets.endswith("--partition-by meta.pile_set_name")
    assert next_commands(KNOWN["pile"], Path("pile"), ["test.jsonl.zst"]) == []
    assert next_commands(find_known("owner/other"), Path("pile"), ["val.jsonl.zst"]) == []


def test_pile_val_partitioned_puts_each_subset_into_its_own_folder(tmp_path: Path, tokenizer_folder: Path) -> None:
    folders = {"Gutenberg (PG-19)": "gutenberg-pg-19", "ArXiv": "arxiv", "Github": "github", "Pile-CC": "pile-cc"}
    lines = [
        json.dumps({"text": f"{name} number {n}", "meta": {"pile_set_name": name}})
        for n in range(3)
        for name in folders
    ]
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "val.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines).encode()))
    (tmp_path / "source" / "test.jsonl.zst").write_bytes(b"not wanted")
    known = find_known("pile-val")
    with serve({known.repo: {"main": tmp_path / "source"}}) as hub:
        download(DownloadOptions(tmp_path / "pile", known.repo, include=known.include, endpoint=hub.endpoint))
    assert not (tmp_path / "pile" / "test.jsonl.zst").exists()
    build(
        BuildOptions(
            [str(tmp_path / "pile" / "val.jsonl.zst")],
            str(tokenizer_folder),
            tmp_path / "subsets",
            partition_by="meta.pile_set_name",
        )
    )
    for name, folder in folders.items():
        dataset = TokenDataset(tmp_path / "subsets" / folder)
        tokenizer = load_tokenizer(tmp_path / "subsets" / folder / "tokenizer")
        bounds = itertools.pairwise(dataset.document_bounds().tolist())
        texts = [tokenizer.decode(dataset.tokens(first, end).tolist()) for first, end in bounds]
        assert texts == [f"{name} number {n}" for n in range(3)]
        assert dataset.manifest.source["partition"] == name
