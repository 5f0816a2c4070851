"""What `tools/inspect_data.py` says about whole and damaged datasets."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_bipe.data import inspect
from megatron_bipe.data.dataset import TokenDataset
from megatron_bipe.data.inspect import find_problems, open_tokenizer, stats_table
from megatron_bipe.data.manifest import Manifest, SegmentRule
from megatron_bipe.data.show import show_document
from megatron_bipe.errors import DataError

TOOL = Path(__file__).parents[3] / "tools" / "inspect_data.py"
TEXTS = [["a cat\nsat.\n", "x\n\ny"], [], ["\u4e16\x1bz q\n", ""]]
Write = Callable[..., Manifest]


@pytest.fixture
def folder(write_text_dataset: Write, tmp_path: Path) -> Path:
    write_text_dataset(tmp_path, TEXTS)
    return tmp_path


def problems(folder: Path) -> list[str]:
    return [str(problem) for problem in find_problems(TokenDataset(folder))]


def flip(path: Path, offset: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def rehash(folder: Path, manifest: Manifest, **changes: object) -> None:
    """Make the manifest agree with the files as they are, so that only the other checks can find anything."""
    shards = [
        shard.model_copy(
            update={
                "files": {
                    suffix: file.model_copy(update={"sha256": inspect.sha256_of(folder / f"{shard.name}.{suffix}")})
                    for suffix, file in shard.files.items()
                }
            }
        )
        for shard in manifest.shards
    ]
    manifest.model_copy(update={"shards": tuple(shards)} | changes).save(folder)


@pytest.mark.parametrize("spec", ["newline", "fixed:3", "fixed:5", "sentence", '["a","\\n"]'])
def test_verify_of_a_whole_dataset_finds_nothing(
    write_text_dataset: Write, tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect, "CHUNK_TOKENS", 3)  # many chunks in a few tokens
    manifest = write_text_dataset(tmp_path, TEXTS, spec)
    read: list[int] = []
    assert list(find_problems(TokenDataset(tmp_path), read.append)) == []
    assert sum(read) == sum(file.bytes for shard in manifest.shards for file in shard.files.values())


@pytest.mark.parametrize("suffix", ["bin", "idx", "seg"])
def test_verify_of_any_flipped_bit_finds_it(folder: Path, suffix: str) -> None:
    path = folder / f"part-00000.{suffix}"
    header = {"bin": 0, "idx": 34, "seg": 24}[suffix]
    for offset in range(header, path.stat().st_size):
        for mask in (0x01, 0x80):
            flip(path, offset, mask)
            found = problems(folder)
            assert re.search(r"SHA-256.*part-00000\." + suffix, found[0])
            assert 1 <= len(found) <= 2
            flip(path, offset, mask)


def test_verify_of_a_wrong_bit_names_its_place_and_the_rule(folder: Path) -> None:
    flip(folder / "part-00000.seg", 24, 0b1000)
    rehash(folder, Manifest.load(folder))
    [found] = problems(folder)
    assert re.search(r"byte 24, bit 3 \(token 3, id \d+\) is 1; rule 'newline' makes it 0.*part-00000\.seg", found)


def test_verify_of_a_wrong_bit_in_a_fixed_rule_names_its_place(write_text_dataset: Write, tmp_path: Path) -> None:
    write_text_dataset(tmp_path, TEXTS, "fixed:3")
    flip(tmp_path / "part-00000.seg", 25, 0b1)
    rehash(tmp_path, Manifest.load(tmp_path))
    [found] = problems(tmp_path)
    assert re.search(r"byte 25, bit 0 \(token 8, id \d+\) is 0; rule 'fixed:3' makes it 1.*part-00000\.seg", found)


def test_verify_of_padding_that_is_not_zero_names_the_byte(folder: Path) -> None:
    assert TokenDataset(folder).shards[0].num_tokens == 17
    flip(folder / "part-00000.seg", 26, 0b10)
    rehash(folder, Manifest.load(folder))
    [found] = problems(folder)
    assert re.search(r"byte 26, the last, has bits set beyond the 17 tokens.*part-00000\.seg", found)


def test_verify_of_a_wrong_segment_count_names_both(folder: Path) -> None:
    manifest = Manifest.load(folder)
    shards = (manifest.shards[0].model_copy(update={"segments": 5}), *manifest.shards[1:])
    manifest.model_copy(update={"shards": shards}).save(folder)
    [found] = problems(folder)
    assert re.search(r"4 bits are set; the manifest says 5 segments.*part-00000\.seg", found)


def test_verify_of_a_token_outside_the_vocabulary_names_it(folder: Path) -> None:
    flip(folder / "part-00000.bin", 7, 0x80)
    rehash(folder, Manifest.load(folder))
    [found] = problems(folder)
    assert re.search(r"token 3 \(byte 6\) is 3\d{4}; the vocabulary has 288 ids.*part-00000\.bin", found)


def test_verify_without_the_tokenizer_says_so_and_goes_on(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    flip(folder / "part-00002.bin", 0)
    found = problems(folder)
    assert re.search(r"tokenizer's files are missing.*/tokenizer\]", found[0])
    assert "SHA-256" in found[1]


def test_verify_with_another_tokenizer_names_both_fingerprints(folder: Path) -> None:
    definition = folder / "tokenizer" / "tokenizer.json"
    definition.write_text(json.dumps(json.loads(definition.read_bytes()), indent=1))
    [found] = problems(folder)
    assert re.search(r"made with tokenizer letters \(fingerprint [0-9a-f]{64}\), but [0-9a-f]{64} is expected", found)


def test_verify_of_a_rule_that_resolves_otherwise_says_so(folder: Path) -> None:
    manifest = Manifest.load(folder)
    newline = manifest.rule.token_ids
    rehash(folder, manifest, rule=SegmentRule(spec="sentence", token_ids=newline))
    [found] = problems(folder)
    assert re.search(r"rule.token_ids lists 1 ids; rule 'sentence' comes out as 3 others.*manifest\.json", found)


def test_stats_counts_and_means_are_those_of_the_documents(folder: Path) -> None:
    lines = stats_table(Manifest.load(folder)).splitlines()
    assert lines[1] == "segments   newline: 1 token ids (13)"
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(("part", "all"))}
    assert rows["part-00000"] == ["2", "17", "4", "51", "4.25", "240.94"]
    assert rows["part-00001"] == ["0", "0", "0", "0", "-", "-"]
    assert rows["all"][:3] == ["4", "25", "5"]
    assert len({len(line) for line in lines[4:]}) == 1  # a table


def show(folder: Path, document: int = 0, tokens: int = 100, color: bool = False, width: int = 80) -> str:
    dataset = TokenDataset(folder)
    return show_document(dataset, open_tokenizer(dataset), document, tokens, color=color, width=width)


def test_show_plain_sets_both_ids_beside_each_token(folder: Path) -> None:
    assert show(folder).splitlines() == [
        "document 0 of 4 (part-00000): 12 tokens, 2 segment ends by rule newline",
        " inter  token, and its intra id below it",
        "     0  <bos> a · c a t ↵",
        "        0     1 2 3 4 5 6",
        "     1  s a t . ↵",
        "        0 1 2 3 4",
    ]


def test_show_of_a_later_shard_escapes_controls_and_counts_wide_characters(folder: Path) -> None:
    assert show(folder, document=2).splitlines()[2:] == [
        "     0  <bos> 世 \\x1b z · q ↵",
        "        0     1  2    3 4 5 6",
    ]


def test_show_in_a_narrow_terminal_wraps_segments(folder: Path) -> None:
    assert show(folder, width=18).splitlines()[2:8] == [
        "     0  <bos> a ·",
        "        0     1 2",
        "        c a t ↵",
        "        3 4 5 6",
        "     1  s a t . ↵",
        "        0 1 2 3 4",
    ]


def test_show_of_part_says_what_is_left(folder: Path) -> None:
    lines = show(folder, tokens=3).splitlines()
    assert lines[2:] == ["     0  <bos> a ·", "        0     1 2", "... 9 more tokens"]


def test_show_in_colour_alternates_backgrounds_and_is_the_same_text(folder: Path) -> None:
    colored = show(folder, document=1, color=True)
    backgrounds = re.findall(r"\x1b\[48;5;(\d+)m", colored)
    assert backgrounds == ["24", "94", "24"]
    bare = re.sub(r"\x1b\[[0-9;]*m", "", colored)
    assert [line.rstrip() for line in bare.splitlines()] == show(folder, document=1).splitlines()


@pytest.mark.parametrize("document", [-1, 4])
def test_show_of_a_document_that_is_not_there_is_refused(folder: Path, document: int) -> None:
    with pytest.raises(DataError, match=f"no document {document} among 4"):
        show(folder, document)


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=60)


def test_inspect_data_tool_on_a_whole_dataset_leaves_with_0(folder: Path) -> None:
    verify = run_tool("verify", str(folder))
    assert (verify.returncode, verify.stderr) == (0, "")
    assert "whole. 3 shards, 25 tokens" in verify.stdout
    assert "tokens/segment" in run_tool("stats", str(folder)).stdout
    shown = run_tool("show", str(folder), "--document", "1", "--tokens", "2")
    assert shown.returncode == 0 and "... 3 more tokens" in shown.stdout
    assert "\x1b" not in shown.stdout  # not a terminal
    assert "\x1b[48;5;" in run_tool("show", str(folder), "--color").stdout


def test_inspect_data_tool_on_damage_leaves_with_2_and_no_traceback(folder: Path) -> None:
    flip(folder / "part-00000.bin", 0)
    flip(folder / "part-00002.idx", 40)
    verify = run_tool("verify", str(folder))
    assert verify.returncode == 2
    assert verify.stderr.count("SHA-256") == 2 and "Traceback" not in verify.stderr
    for arguments in (
        ["show", str(folder / "x")],
        ["stats", str(folder / "x")],
        ["show", str(folder), "--tokens", "0"],
    ):
        result = run_tool(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith("DataError: ") and "Traceback" not in result.stderr
