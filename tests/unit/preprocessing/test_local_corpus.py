"""The local corpus: which files of the libraries are used or skipped, and how they are split and written."""

import json
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PathDistribution, distribution
from pathlib import Path

import pytest
import zstandard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_bipe.errors import DataError
from preprocessing import local_corpus
from preprocessing.local_corpus import CODE, PROSE, CorpusDocument
from tests.helpers.errors import raises
from tests.helpers.tools import assert_refuses, call_tool

REPO = Path(__file__).parents[3]

# Two paragraphs of ordinary English, wrapped as docstrings are, that differ from {topic} to {topic}.
ENGLISH = """The {topic} reader goes through the file from the first line to the last one.
Every record is checked before it is handed on, and a broken record is named.

Nothing is kept in memory longer than needed for the {topic}, so that very large
files can be read on very small machines. Whoever wants to sort the records has
to do so after reading them, since the order of the file is never changed."""

BODY = "\n".join(f"    value_{name} = combine(left, {name!r}, right)" for name in "abcdefghij")


def module(topic: str, header: str = "") -> str:
    """Source of a module that passes every rule."""
    return f'{header}"""{ENGLISH.format(topic=topic)}"""\n\n\ndef run(left, right):\n{BODY}\n    return left\n'


def install(root: Path, files: dict[str, str], version: str = "1.0", name: str = "thing") -> PathDistribution:
    """Make a distribution whose record lists these files."""
    record = Path(f"{name}-{version}.dist-info")
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    lines = "".join(f"{file},,\n" for file in files)
    write_tree(root, {f"{record}/METADATA": metadata, f"{record}/RECORD": lines} | files)
    return PathDistribution(root / record)


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def collect(root: Path, max_bytes: int = 10**6, valid_share: float = 0.5) -> list[CorpusDocument]:
    return list(local_corpus.collect(sorted(root.rglob("*.*")), max_bytes, valid_share))


def texts(documents: list[CorpusDocument], subset: str) -> list[str]:
    return [document.text for document in documents if document.subset == subset]


def test_collect_module_gives_code_and_its_docstring_as_prose(tmp_path: Path) -> None:
    documents = collect(write_tree(tmp_path, {"pkg/mod.py": module("log")}))
    assert texts(documents, CODE) == [module("log")]
    assert texts(documents, PROSE) == [ENGLISH.format(topic="log") + "\n"]


@pytest.mark.parametrize(
    "name", ["tests/mod.py", "pkg/test/mod.py", "pkg/licenses/words.txt", "LICENSE.md", "NOTICE.txt", "pkg/mod.pyc"]
)
def test_list_sources_skips_boilerplate_and_test_paths(tmp_path: Path, name: str) -> None:
    kept = {"pkg/kept.py": "", "thing-1.0.dist-info/METADATA": "x"}
    installed = install(tmp_path, kept | {name: "", "thing-1.0.dist-info/top_level.txt": ""})
    assert {path.name for path in local_corpus.list_sources([installed])} == {"kept.py", "METADATA"}


def test_list_sources_lists_only_files_in_the_record(tmp_path: Path) -> None:
    installed = install(tmp_path, {"pkg/mod.py": ""})
    write_tree(tmp_path, {"pkg/written_later.py": "", "other/mod.py": ""})
    assert local_corpus.list_sources([installed]) == [tmp_path / "pkg/mod.py"]


def test_list_sources_order_depends_on_installed_paths_alone(tmp_path: Path) -> None:
    names = {f"pkg/{name}.py": "" for name in "abcdefgh"}
    first, second = tmp_path / "one", tmp_path / "two"
    installed = install(first, names), install(second, dict(reversed(names.items())))
    orders = [local_corpus.list_sources([one]) for one in installed]
    order, other = (
        [path.relative_to(root) for path in paths] for root, paths in zip((first, second), orders, strict=True)
    )
    assert order == other
    assert order != sorted(order)


def test_find_sources_names_what_is_missing_or_of_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("right", "newer", "recordless"):
        install(tmp_path, {}, name=name)
    (tmp_path / "recordless-1.0.dist-info" / "RECORD").unlink()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(local_corpus, "SOURCES", ("right", "newer", "recordless", "missing"))
    found, differences = local_corpus.find_sources({"right": "1.0", "newer": "0.9", "recordless": "1.0"})
    assert [one.name for one in found] == ["right", "newer", "recordless"]
    assert [words.split()[0] for words in differences] == ["newer", "recordless", "missing"]
    assert "1.0" in differences[0] and "0.9" in differences[0]


def requirements(name: str) -> Iterator[str]:
    """Return the names of a distribution's requirements on this platform, without extras."""
    for line in distribution(name).requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name


def test_sources_are_installed_for_running_and_the_same_on_every_platform() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    needed, waiting = set[str](), [Requirement(line).name for line in project["dependencies"]]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in needed:
            needed.add(name)
            waiting += requirements(name)
    for name in local_corpus.SOURCES:
        assert canonicalize_name(name) in needed
        assert "Tag: py3-none-any" in (distribution(name).read_text("WHEEL") or "")


@pytest.mark.parametrize(
    ("why", "source"),
    [
        ("short", "x = y\n"),
        ("long line", module("log") + f"data = '{'ab cd ' * 100}'\n" + "\n" * 20 + "done = True\n"),
        ("wide lines", "\n".join(f"name_{letter} = '" + "word " * 20 + "'" for letter in "abcdefgh")),
        ("table", "\n".join(f"    ({i}, {i * 7919}, {i * 104729})," for i in range(40))),
        ("generated", "# This file is automatically generated.\n" + module("log")),
        ("large", module("log") * 1000),
    ],
)
def test_code_of_data_like_source_is_skipped(why: str, source: str) -> None:
    assert local_corpus.code_of(source) is None


def test_code_of_licence_header_is_cut_and_other_headers_stay() -> None:
    licensed = module("log", header="#!/usr/bin/env python\n# Copyright someone\n#\n# Licensed to all.\n\n")
    assert local_corpus.code_of(licensed) == module("log")
    commented = module("log", header="# Reads logs.\n")
    assert local_corpus.code_of(commented) == commented


def test_strings_of_triple_quoted_literals_come_in_source_order() -> None:
    first, second, third = (ENGLISH.format(topic=topic) for topic in ("log", "mail", "page"))
    source = (
        f"class A:\n    def f(self):\n        r\"\"\"{first}\"\"\"\n\nTEXT = '''{second}'''\n\n"
        f'def g():\n    """{third}"""\n'
    )
    assert local_corpus.strings_of(source) == [first, second, third]


@pytest.mark.parametrize(
    "line",
    [
        '# a comment with """ in it',
        "# don't",
        """quotes = '"' + '\\'' + '""" + '"""' + """'""",
        'f"""words of a {kind} of string"""',
        'Rf"""words of a {kind} of string"""',
        'plain = "words", \'words\', ""',
        "size = 5 if x else f",
    ],
)
def test_strings_of_other_quotes_and_comments_are_skipped(line: str) -> None:
    assert local_corpus.strings_of(f'{line}\n"""One."""\n{line}\nx = """Two, \\""" and more."""') == [
        "One.",
        'Two, \\""" and more.',
    ]


@pytest.mark.parametrize(
    "block",
    [
        "A heading of some few words",
        "The function adds any two numbers and is used like so in many places:\n>>> add the first to the last",
        ".. image of a reader that goes through a file from the first line to the last one",
        "==== ==== ==== | a | b | c | (x, y) -> [z] ; { k: v } <= 4 * 5 + 6 / 7 && !q || @w # $e % ^ & *",
        "Permission is granted to use this software under the licence that comes with it, without any fee.",
        "alpha\nbeta\ngamma\ndelta\nepsilon\nzeta\neta\ntheta\niota\nkappa\nlambda\nmu",
        "path (str): the file that is to be read from the disk\nmode (str, optional): how the file is to be opened",
    ],
)
def test_paragraphs_of_skips_what_is_not_prose(block: str) -> None:
    prose = ENGLISH.format(topic="log").split("\n\n")
    assert local_corpus.paragraphs_of("\n\n".join([prose[0], block, prose[1]])) == prose


def test_paragraphs_of_indented_lines_are_unindented_and_not_rewrapped() -> None:
    text = "    The first line of a paragraph says what the thing is for.\n      The second line goes on, further in."
    assert local_corpus.paragraphs_of(text) == [text.replace("      ", "").replace("    ", "")]


def test_collect_yields_repeated_code_and_paragraphs_once(tmp_path: Path) -> None:
    files = {"a.py": module("log"), "b.py": module("log"), "c.md": ENGLISH.format(topic="log")}
    documents = collect(write_tree(tmp_path, files))
    assert len(texts(documents, CODE)) == 1
    assert len(texts(documents, PROSE)) == 1


def test_collect_package_description_gives_its_body_without_its_fields(tmp_path: Path) -> None:
    metadata = "Name: thing\nSummary: " + "words of a summary that goes on and on " * 3 + "\n\n" + ENGLISH
    path = write_tree(tmp_path, {"thing.dist-info/METADATA": metadata}) / "thing.dist-info/METADATA"
    documents = list(local_corpus.collect([path], 10**6, 0.5))
    assert texts(documents, PROSE) == [ENGLISH + "\n"]


def test_collect_puts_both_documents_of_a_module_into_one_file(tmp_path: Path) -> None:
    documents = collect(write_tree(tmp_path, {f"{i}.py": module(f"topic{i}") for i in range(40)}))
    code = {document.text.partition("The ")[2][:8]: document.valid for document in documents if document.subset == CODE}
    prose = {document.text[4:12]: document.valid for document in documents if document.subset == PROSE}
    assert code == prose
    assert 5 < sum(code.values()) < 35


def test_collect_cap_holds_for_each_subset_and_keeps_the_order(tmp_path: Path) -> None:
    write_tree(tmp_path, {f"{i}.py": module(f"topic{i}") for i in range(20)})
    everything, capped = collect(tmp_path), collect(tmp_path, max_bytes=2500)
    for subset in (CODE, PROSE):
        some = texts(capped, subset)
        assert 0 < sum(len(text.encode()) for text in some) <= 2500
        assert some == texts(everything, subset)[: len(some)]


def test_collect_skips_unreadable_files(tmp_path: Path) -> None:
    write_tree(tmp_path, {"good.py": module("log")})
    (tmp_path / "latin.py").write_bytes(module("caf\xe9").encode("latin-1"))
    assert texts(collect(tmp_path), CODE) == [module("log")]


def test_write_corpus_lines_are_the_piles_and_the_same_each_time(tmp_path: Path) -> None:
    documents = collect(write_tree(tmp_path / "tree", {f"{i}.py": module(f"topic{i}") for i in range(20)}))
    written = local_corpus.write_corpus(documents, tmp_path / "out")
    assert local_corpus.write_corpus(documents, tmp_path / "again") == written
    for split, path in zip(local_corpus.SPLITS, local_corpus.corpus_files(tmp_path / "out"), strict=True):
        lines = [json.loads(line) for line in zstandard.open(path, "rt", encoding="utf-8")]
        wanted = [document for document in documents if document.valid == (split == "valid")]
        assert lines == [{"text": text, "meta": {"pile_set_name": subset}} for text, subset, _ in wanted]
        assert sum(written.sizes[subset, split].documents for subset in (CODE, PROSE)) == len(lines)
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.jsonl.zst", "valid.jsonl.zst"]


def test_write_corpus_fingerprint_is_of_texts_subsets_splits_and_order(tmp_path: Path) -> None:
    documents = [
        CorpusDocument(f"{subset} {valid}", subset, valid) for subset in (CODE, PROSE) for valid in (False, True)
    ]
    changes = ({"text": "other"}, {"valid": True}, {"subset": PROSE})
    added = [documents[0]._replace(**{"text": "same"} | change) for change in ({}, *changes)]
    variants = [documents, documents[::-1], *([*documents, one] for one in added)]
    found = [local_corpus.write_corpus(some, tmp_path / str(place)).fingerprint for place, some in enumerate(variants)]
    assert len(set(found)) == len(variants)


def test_write_corpus_empty_subset_is_an_error_that_leaves_no_file(tmp_path: Path) -> None:
    with raises(DataError, "Code", "Prose", "train.jsonl.zst", location=tmp_path, remedy="--max-bytes"):
        local_corpus.write_corpus([CorpusDocument("x", CODE, valid=False)], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_corpus_of_the_pinned_versions_is_this_text(tmp_path: Path) -> None:
    """A new version in constraints.txt changes the fingerprint: update it here and in the docs."""
    output = call_tool("corpus", "--output", tmp_path, "--max-bytes", 2_000_000, "--valid-share", 0.1).output
    assert "not installed" not in output and "pinned" not in output, output
    assert output.split()[-1] == "9f02b55d45afa70f3be2db377c1b5e039f45ba1d3f775cd4cba50183752d89ba"


def test_corpus_tool_existing_output_exits_2_and_overwrite_replaces_it(tmp_path: Path) -> None:
    train, valid = local_corpus.corpus_files(tmp_path)
    train.write_text("old")
    options = ("--output", tmp_path, "--max-bytes", 200_000, "--valid-share", 0.3)
    assert_refuses("corpus", options, DataError, "--overwrite", location=train)
    assert train.read_text() == "old"
    assert_refuses("corpus", ["--output", train, "--overwrite"], DataError, location=train)
    *_, fingerprint = lines = call_tool("corpus", *options, "--overwrite").output.splitlines()
    assert len(lines) == 5 and re.fullmatch("fingerprint [0-9a-f]{64}", fingerprint)
    assert json.loads(zstandard.open(valid, "rt").readline())["meta"]
