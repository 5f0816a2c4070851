"""Tables: every row once for any division of a file, text at any key, bounded memory, one error for what is wrong."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bipe.errors import DataError
from preprocessing.readers.documents import read_input
from preprocessing.readers.hub_dataset import open_hub, read_hub
from preprocessing.readers.inputs import find_inputs, is_saved_dataset, saved_files
from preprocessing.readers.lines import BLOCK_BYTES
from preprocessing.readers.parse import Keys, Parsed
from preprocessing.readers.tables import read_arrow, read_parquet
from tests.helpers.errors import raises
from tests.helpers.hub import Fault, serve

ROOT = Path(__file__).parents[3]
SET_NAME = "meta.pile_set_name"
TEXT = Keys()


def a_table(num_rows: int = 60, **columns: Any) -> pa.Table:
    texts = [f"text {n} é" for n in range(num_rows)]
    return pa.table({"text": texts, "meta": [{"pile_set_name": f"set {n % 3}"} for n in range(num_rows)]} | columns)


def all_of(file: Path, keys: Keys = TEXT) -> list[Parsed]:
    size = file.stat().st_size
    groups = list(read_parquet(file, 0, size, keys) if file.suffix == ".parquet" else read_arrow(file, keys))
    assert sum(group.read_bytes for group in groups) == size
    return groups


def texts_of(groups: list[Parsed]) -> list[str]:
    return [document.text for group in groups for document in group.documents]


def reasons_of(groups: list[Parsed]) -> list[tuple[int, str]]:
    return [(bad.line, bad.reason) for group in groups for bad in group.malformed]


def write_stream(file: Path, table: pa.Table, **options: Any) -> None:
    with pa.ipc.new_stream(str(file), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=25)


def write_file(file: Path, table: pa.Table, **options: Any) -> None:
    with pa.ipc.new_file(str(file), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=25)


WRITERS: dict[str, tuple[str, Callable[[Path, pa.Table], None]]] = {
    "parquet": ("t.parquet", lambda file, table: pq.write_table(table, file, row_group_size=25)),
    "stream": ("t.arrow", write_stream),
    "compressed stream": ("t.arrow", lambda file, table: write_stream(file, table, compression="zstd")),
    "file": ("t.arrow", write_file),
}


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[pa.Table], Path]:
    """Function that writes a table as one kind of file."""
    name, writer = WRITERS[request.param]

    def to_file(table: pa.Table) -> Path:
        writer(tmp_path / name, table)
        return tmp_path / name

    return to_file


# Rows


def test_read_rows_any_kind_of_file_gives_texts_partitions_and_numbers(write: Callable[[pa.Table], Path]) -> None:
    file = write(a_table(other=[b"\xff"] * 60))
    documents = [document for group in all_of(file, Keys("text", SET_NAME)) for document in group.documents]
    assert [document.text for document in documents] == [f"text {n} é" for n in range(60)]
    assert [document.partition for document in documents] == [f"set {n % 3}" for n in range(60)]
    assert [(document.file, document.line) for document in documents] == [(str(file), n) for n in range(1, 61)]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_read_rows_any_type_of_strings_is_text(write: Callable[[pa.Table], Path], kind: pa.DataType) -> None:
    column = pa.array(["é", None, "", "\0b", "é"]).cast(kind)
    groups = all_of(write(pa.table({"text": column, "set": column})), Keys("text", None))
    assert texts_of(groups) == ["é", "\0b", "é"]
    assert reasons_of(groups) == [(2, 'no text at "text"')]
    assert (groups[0].num_empty, groups[0].num_lines) == (1, 5)


def test_read_rows_null_column_is_malformed_row_by_row(write: Callable[[pa.Table], Path]) -> None:
    file = write(pa.table({"text": pa.nulls(2), "meta": [None, {"body": "b"}]}))
    assert reasons_of(all_of(file)) == [(1, 'no text at "text"'), (2, 'no text at "text"')]
    assert reasons_of(all_of(file, Keys("text.body"))) == [(1, 'no text at "text.body"'), (2, 'no text at "text.body"')]
    assert texts_of(all_of(file, Keys("meta.body"))) == ["b"]


def test_read_rows_dotted_key_reaches_into_structs_and_a_literal_column_wins(
    write: Callable[[pa.Table], Path],
) -> None:
    nested = [{"lit": "nested", "in": {"body": f"b{n}"}, "number": n} for n in range(2)]
    file = write(pa.table({"meta.lit": ["literal"] * 2, "meta": nested}))
    for key, values in (("meta.lit", ["literal"] * 2), ("meta.number", ["0", "1"]), ("meta.in.body", ["b0", "b1"])):
        documents = [document for group in all_of(file, Keys("meta.in.body", key)) for document in group.documents]
        assert [document.text for document in documents] == ["b0", "b1"]
        assert [document.partition for document in documents] == values


def test_read_rows_bad_utf8_is_malformed_and_its_neighbours_kept(write: Callable[[pa.Table], Path]) -> None:
    good_and_bad = pa.array([b"before", b"\xff", b"after"]).view(pa.string())
    file = write(pa.table({"text": good_and_bad}))
    groups = all_of(file)
    assert texts_of(groups) == ["before", "after"]
    assert reasons_of(groups) == [(2, '"text" holds bytes, not a string')]
    if file.suffix == ".arrow":  # pyarrow itself refuses such a dictionary in a parquet file
        encoded = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), good_and_bad)
        assert reasons_of(all_of(write(pa.table({"text": encoded})))) == reasons_of(groups)


def test_read_rows_row_without_partition_is_malformed(write: Callable[[pa.Table], Path]) -> None:
    file = write(pa.table({"text": ["a", "b", "c"], "meta": [{"set": "x"}, None, {"set": None}]}))
    assert [line for line, _ in reasons_of(all_of(file, Keys("text", "meta.set")))] == [2, 3]


@pytest.mark.parametrize(
    ("keys", "observed", "remedy"),
    [
        (Keys("body"), ['nothing at "body"', "text (string)", "raw (binary)", "meta (struct<n: int64>)"], "--text-key"),
        (Keys("meta.body"), ['nothing at "meta.body"'], "--text-key"),
        (Keys("text.body"), ['nothing at "text.body"'], "--text-key"),
        (Keys("raw"), ['"raw" holds binary'], "--text-key"),
        (Keys("meta"), ['"meta" holds struct<'], "--text-key"),
        (Keys("meta.n"), ['"meta.n" holds int64'], "--text-key"),
        (Keys("text", "meta.set"), ['nothing at "meta.set"'], "--partition-by"),
        (Keys("text", "raw"), ['"raw" holds binary'], "--partition-by"),
    ],
)
def test_read_rows_key_without_column_is_one_error(
    write: Callable[[pa.Table], Path], keys: Keys, observed: list[str], remedy: str
) -> None:
    file = write(pa.table({"text": ["a"], "raw": [b"a"], "meta": [{"n": 1}]}))
    with raises(DataError, *observed, location=file, remedy=remedy):
        all_of(file, keys)


def test_read_rows_table_without_rows_has_no_documents(write: Callable[[pa.Table], Path]) -> None:
    assert texts_of(all_of(write(a_table(1).slice(0, 0)))) == []


def test_read_rows_long_text_comes_in_bounded_groups_with_running_numbers(
    write: Callable[[pa.Table], Path],
) -> None:
    texts = [None if n % 10 == 3 else f"{n:08}" * (BLOCK_BYTES // 64) for n in range(40)]
    groups = all_of(write(pa.table({"text": texts})))
    assert len(groups) == 5
    for group in groups:
        assert sum(len(document.text) for document in group.documents[:-1]) < BLOCK_BYTES
    lines = sorted(
        [document.line for group in groups for document in group.documents] + [3 + 1, 13 + 1, 23 + 1, 33 + 1]
    )
    assert lines == list(range(1, 41))
    assert [line for line, _ in reasons_of(groups)] == [4, 14, 24, 34]


@pytest.mark.parametrize("kind", ["t.parquet", "t.arrow"])
def test_read_rows_large_rows_are_never_in_memory_together(tmp_path: Path, kind: str) -> None:
    table = pa.table({"text": [f"{n:08}" * (1 << 17) for n in range(40)] + ["short"] * 10_000})  # 1 MiB each
    if kind == "t.parquet":  # one row group, whose rows are short on average
        pq.write_table(table, tmp_path / kind, use_dictionary=False, compression="none", write_batch_size=1)
    else:
        write_stream(tmp_path / kind, table)
    del table
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() - before for _ in iter_all(tmp_path / kind))
    assert peak < 12 << 20


def iter_all(file: Path) -> Iterator[Parsed]:
    size = file.stat().st_size
    yield from read_parquet(file, 0, size, TEXT) if file.suffix == ".parquet" else read_arrow(file, TEXT)


# Ranges of a parquet file


@pytest.fixture(scope="module")
def cut_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Row groups with and without dictionaries, one of them empty, and a file without any rows."""
    folder = tmp_path_factory.mktemp("cut")
    table = a_table()
    with pq.ParquetWriter(folder / "a.parquet", table.schema) as writer:
        for start, length in ((0, 25), (25, 0), (25, 1), (26, 34)):
            writer.write_table(table.slice(start, length))
    pq.write_table(table, folder / "b.parquet", row_group_size=7, use_dictionary=False, compression="zstd")
    pq.write_table(table.slice(0, 0), folder / "c.parquet")
    return [folder / "a.parquet", folder / "b.parquet", folder / "c.parquet"]


@settings(max_examples=40)
@given(data=st.data())
def test_read_parquet_any_cut_gives_every_row_once(cut_files: list[Path], data: st.DataObject) -> None:
    for file in cut_files:
        size = file.stat().st_size
        cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=8)))
        texts = []
        for start, stop in zip([0, *cuts], [*cuts, size], strict=True):
            groups = list(read_parquet(file, start, stop, TEXT))
            assert sum(group.read_bytes for group in groups) == stop - start
            assert [document.line for group in groups for document in group.documents] == [
                n + 1 for n in range(len(texts_of(groups)))
            ]
            texts += texts_of(groups)
        assert texts == texts_of(all_of(file))
        assert len(texts) in (0, 60)


def test_read_parquet_row_group_belongs_to_the_range_with_its_first_page(cut_files: list[Path]) -> None:
    for file, num_rows in zip(cut_files, (25, 7, 0), strict=True):
        size = file.stat().st_size
        assert len(texts_of(list(read_parquet(file, 4, 5, TEXT)))) == num_rows  # the format's magic takes 4 bytes
        assert len(texts_of(list(read_parquet(file, 0, 4, TEXT)))) == 0
        assert len(texts_of(list(read_parquet(file, 5, size, TEXT)))) == len(texts_of(all_of(file))) - num_rows


# Damage


@pytest.mark.parametrize("keep", [0, 1, 7, 300, -1, -8, -300])
def test_read_rows_file_cut_short_is_one_error(write: Callable[[pa.Table], Path], keep: int) -> None:
    file = write(a_table())
    file.write_bytes(file.read_bytes()[:keep])
    with raises(DataError, location=file):
        all_of(file)


def test_read_arrow_stream_cut_between_batches_is_an_error(tmp_path: Path) -> None:
    table = a_table()
    write_stream(tmp_path / "intact.arrow", table)
    intact = (tmp_path / "intact.arrow").read_bytes()
    with pa.ipc.open_stream(source := pa.BufferReader(intact)) as stream:
        ends = [source.tell() for _ in stream]
    for end in ends:
        (tmp_path / "t.arrow").write_bytes(intact[:end])
        with raises(DataError, location=tmp_path / "t.arrow"):
            all_of(tmp_path / "t.arrow")
    (tmp_path / "t.arrow").write_bytes(intact[: ends[0]] + intact[-8:] + intact[ends[0] :])  # an end before the end
    with raises(DataError, location=tmp_path / "t.arrow"):
        all_of(tmp_path / "t.arrow")


@pytest.mark.parametrize("checksum", [True, False])
def test_read_parquet_damaged_page_is_an_error(tmp_path: Path, checksum: bool) -> None:
    file = tmp_path / "t.parquet"
    options = {"write_page_checksum": True, "compression": "none"} if checksum else {"compression": "zstd"}
    pq.write_table(a_table(2000), file, use_dictionary=False, **options)
    content = bytearray(file.read_bytes())
    content[content.index(b"text 7") if checksum else 1000] ^= 1
    file.write_bytes(content)
    with raises(DataError, "CRC" if checksum else "ZSTD", location=file):
        all_of(file)


def test_read_arrow_offsets_that_lead_outside_are_an_error(tmp_path: Path) -> None:
    wrong = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\xff\xff\xff\x7f\2\0\0\0"), pa.py_buffer(b"ab"))
    parent = pa.StructArray.from_arrays([wrong], ["text"])
    codes = pa.DictionaryArray.from_arrays(pa.array([0, 7]), pa.array(["a"]), safe=False)
    for column, key, bad in ((wrong, "text", 2**31 - 1), (parent, "text.text", 2**31 - 1), (codes, "text", 7)):
        write_stream(tmp_path / "t.arrow", pa.table({"text": column, "set": ["x"] * len(column)}))
        with raises(DataError, bad, location=tmp_path / "t.arrow"):
            all_of(tmp_path / "t.arrow", Keys(key, "set"))


def test_read_arrow_lengths_that_disagree_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "t.arrow"
    write_stream(file, pa.table({"meta": [{"body": "a"}] * 3, "set": ["x"] * 3}))
    node = (3).to_bytes(8, "little") + bytes(8)  # length and nulls, of the column, then of what is inside it
    content = file.read_bytes()
    place = content.index(2 * node) + len(node)
    file.write_bytes(content[:place] + b"\2" + content[place + 1 :])
    with raises(DataError, "2 < 3", location=file):
        all_of(file, Keys("meta.body", "set"))


def test_read_parquet_counts_that_disagree_lose_no_rows_quietly(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table({"text": [f"{n}" for n in range(77)]}), file, **options)
    content = file.read_bytes()
    count, fewer = b"\x9a\x01", b"\x8c\x01"  # 77 and 70, as the format writes them
    places = [place for place in range(len(content)) if content[place:].startswith(count)]
    outcomes = []
    for place in places:
        file.write_bytes(content[:place] + fewer + content[place + 2 :])
        try:
            outcomes.append(len(texts_of(all_of(file))))
        except DataError as error:
            outcomes.append(error.message)
    assert len([outcome for outcome in outcomes if outcome != 77]) >= 3
    assert all("is damaged" in outcome for outcome in outcomes if isinstance(outcome, str))
    assert {outcome for outcome in outcomes if isinstance(outcome, int)} <= {77}


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_read_rows_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with raises(DataError, os.strerror(errno.ENOENT), location=tmp_path / name):
        list(iter_all_of_gone(tmp_path / name))


def iter_all_of_gone(file: Path) -> Iterator[Parsed]:
    return read_parquet(file, 0, 10, TEXT) if file.suffix == ".parquet" else read_arrow(file, TEXT)


@pytest.mark.parametrize(("package", "name"), [("pyarrow.parquet", "t.parquet"), ("pyarrow", "t.arrow")])
def test_read_input_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    file = tmp_path / name
    write_stream(file, a_table(1))  # no parquet file, but it is not read
    (found,) = find_inputs([str(file)])
    monkeypatch.delitem(sys.modules, "preprocessing.readers.tables")
    monkeypatch.setitem(sys.modules, package, None)
    with raises(DataError, package, location=file, remedy="pip install datasets"):
        list(read_input(found, TEXT))


def test_hub_dataset_without_datasets_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for read in (lambda: open_hub("org/name"), lambda: list(read_hub("org/name", 0, "c0ffee", TEXT))):
        with raises(DataError, "datasets", location="org/name", remedy="pip install datasets"):
            read()


# Folders saved by `datasets`


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Dataset(a_table(24)).save_to_disk(tmp_path / "saved", num_shards=12)
    return tmp_path / "saved"


def test_saved_files_dataset_in_shards_gives_all_rows_in_order(saved: Path) -> None:
    assert is_saved_dataset(saved)
    groups = [group for file in saved_files(saved) for group in all_of(file, Keys("text", SET_NAME))]
    assert texts_of(groups) == [f"text {n} é" for n in range(24)]


@pytest.mark.parametrize("name", ["/data-00000-of-00012.arrow", "../saved/data-00000-of-00012.arrow"])
def test_saved_files_outside_the_folder_are_refused(saved: Path, name: str) -> None:
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with raises(DataError, name, location=saved / "state.json"):
        saved_files(saved)


def test_saved_files_order_is_that_of_the_state_file(saved: Path) -> None:
    state = json.loads((saved / "state.json").read_text())
    state["_data_files"].reverse()
    (saved / "state.json").write_text(json.dumps(state))
    assert [file.name for file in saved_files(saved)] == [entry["filename"] for entry in state["_data_files"]]


def test_saved_files_several_splits_asks_for_one(tmp_path: Path) -> None:
    rows = Dataset(a_table(2))
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved")
    assert is_saved_dataset(tmp_path / "saved")
    with raises(DataError, "test", "train", location=tmp_path / "saved", remedy="saved/test"):
        saved_files(tmp_path / "saved")
    assert len(saved_files(tmp_path / "saved" / "train")) == 1


def test_is_saved_dataset_rejects_other_folders(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    assert not is_saved_dataset(tmp_path)
    assert not is_saved_dataset(tmp_path / "gone")


@pytest.mark.parametrize("state", ["{", "{}", "[]", '{"_data_files": 3}', '{"_data_files": [{}]}', "\xff"])
def test_saved_files_damaged_state_file_is_an_error(saved: Path, state: str) -> None:
    (saved / "state.json").write_bytes(state.encode("latin-1"))
    with raises(DataError, location=saved / "state.json"):
        saved_files(saved)


def test_saved_files_incomplete_folder_is_an_error(saved: Path) -> None:
    (saved / "data-00003-of-00012.arrow").unlink()
    with raises(DataError, "data-00003-of-00012.arrow", location=saved):
        saved_files(saved)
    (saved / "state.json").write_text('{"_data_files": []}')
    with raises(DataError, location=saved) as error:
        saved_files(saved)
    assert ".arrow" not in error.value.message


# The Hub. `datasets` takes its address when it is imported: hence other processes, and many questions in each.

ASK = f"""
import json, sys
from megatron_bipe.errors import DataError
from preprocessing.readers.parse import Keys
from preprocessing.readers.hub_dataset import open_hub, read_hub

def answer(name, part, text):
    try:
        if part is None:
            return open_hub(name)
        groups = list(read_hub(name, part, open_hub(name).commit, Keys(text, "{SET_NAME}")))
        rows = [(row.text, row.partition, row.file, row.line) for group in groups for row in group.documents]
        return [rows, sum(group.read_bytes for group in groups)]
    except DataError as error:
        return str(error)

print(json.dumps([answer(*question) for question in json.loads(sys.argv[1])]))
"""

Question = tuple[str, int | None, str]


def ask(questions: list[Question], script: str = ASK, **environment: str) -> dict[Question, Any]:
    """Return the results of `open_hub` or, if a part is named, `read_hub` in a process with this environment."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(questions)],
        env=kept | {"PYTHONPATH": str(ROOT), "USE_TORCH": "0", "HF_HUB_OFFLINE": "0"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(questions, json.loads(done.stdout), strict=True))


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[Question, Any]:
    folder = tmp_path_factory.mktemp("hub")
    for name in ("tables/data", "lines", "configs/one", "configs/two", "script", "damaged"):
        (folder / name).mkdir(parents=True)
    for part in range(3):
        table = a_table(60).slice(20 * part, 20)
        pq.write_table(table, folder / f"tables/data/train-{part:05}-of-00003.parquet", row_group_size=7)
    pq.write_table(a_table(1), folder / "tables/data/validation-00000-of-00001.parquet")
    meta = {"pile_set_name": "x"}
    for name in ("lines", "configs/one", "configs/two"):
        (folder / name / "train.jsonl").write_text(
            json_lines([{"text": f"{name} {n}", "meta": meta} for n in range(3)])
        )
    configs = "\n".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl" for name in ("one", "two"))
    (folder / "configs/README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    (folder / "script/script.py").write_text("raise SystemExit(3)\n")
    whole = (folder / "tables/data/train-00001-of-00003.parquet").read_bytes()
    (folder / "damaged/train-00000-of-00002.parquet").write_bytes(whole)
    (folder / "damaged/train-00001-of-00002.parquet").write_bytes(whole[:4] + bytes(40) + whole[44:])
    repos = ("tables", "lines", "configs", "script", "damaged")
    with serve({f"org/{name}": {"main": folder / name} for name in repos}) as hub:
        hub.faults.append(Fault("*/org/gated*", times=100, method="*", status=403, error="GatedRepo"))
        return ask(QUESTIONS, HF_ENDPOINT=hub.endpoint, HF_HOME=str(folder / "home"))


QUESTIONS: list[Question] = [
    ("org/tables", None, "text"),
    ("org/tables:validation", None, "text"),
    *((f"org/tables{split}", part, "text") for split, part in (("", 0), ("", 1), ("", 2), (":validation", 0))),
    ("org/tables", 3, "text"),
    ("org/tables", 0, "body"),
    ("org/tables:test", None, "text"),
    ("org/lines", None, "text"),
    ("org/lines", 0, "text"),
    ("org/configs", None, "text"),
    ("org/configs/two:train", 0, "text"),
    ("org/configs/three", None, "text"),
    ("org/none", None, "text"),
    ("org/none", 0, "text"),
    ("org/script", None, "text"),
    ("org/gated", None, "text"),
    ("org/damaged", 1, "text"),
]


def test_read_hub_parts_give_all_rows_in_order(answers: dict[Question, Any]) -> None:
    assert answers["org/tables", None, "text"][0] == 3
    for part in range(3):
        rows, read = answers["org/tables", part, "text"]
        numbers = range(20 * part, 20 * part + 20)
        assert rows == [[f"text {n} é", f"set {n % 3}", "org/tables", n - 20 * part + 1] for n in numbers]
        assert read == 1


def test_read_hub_reads_the_commit_that_was_opened(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text(json_lines([{"text": "new", "meta": {"pile_set_name": "x"}}]))
    ask_after = ASK.replace("open_hub(name).commit", '"0" * 40')
    with serve({"org/name": {"main": tmp_path / "data"}}) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        question: Question = ("org/name", 0, "text")
        assert ask([("org/name", None, "text")], **environment)["org/name", None, "text"] == [1, hub.commit("org/name")]
        assert isinstance(ask([question], ask_after, **environment)[question], str)  # no such commit


def test_read_hub_name_chooses_config_and_split(answers: dict[Question, Any]) -> None:
    assert answers["org/tables:validation", None, "text"][0] == 1
    assert [row[0] for row in answers["org/tables:validation", 0, "text"][0]] == ["text 0 é"]
    assert answers["org/lines", None, "text"][0] == 1
    assert [row[0] for row in answers["org/lines", 0, "text"][0]] == ["lines 0", "lines 1", "lines 2"]
    assert answers["org/configs/two:train", 0, "text"][0][0][0] == "configs/two 0"


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (("org/tables", 3, "text"), ["Part 3", "has 3 parts", "--overwrite"]),
        (("org/tables", 0, "body"), ['nothing at "body"', "text (string)", "--text-key"]),
        (("org/tables:test", None, "text"), ["test", "train", "validation", "ORG/NAME[/CONFIG][:SPLIT]"]),
        (("org/configs", None, "text"), ["one", "two", "ORG/NAME[/CONFIG][:SPLIT]"]),
        (("org/configs/three", None, "text"), ["three", "one", "two", "ORG/NAME[/CONFIG][:SPLIT]"]),
        (("org/none", None, "text"), ["doesn't exist", "Check the name", "hf auth login"]),
        (("org/none", 0, "text"), ["doesn't exist", "Check the name"]),
        (("org/gated", None, "text"), ["gated", "ask for access", "hf auth login"]),
        (("org/script", None, "text"), ["scripts are no longer supported", "tools/download_data.py"]),
        (("org/damaged", 1, "text"), ["`datasets` failed", "tools/download_data.py"]),
    ],
    ids=lambda value: ":".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_read_hub_what_cannot_be_read_is_one_error(
    answers: dict[Question, Any], question: Question, words: list[str]
) -> None:
    message = answers[question]
    assert isinstance(message, str)
    assert all(word in message for word in words), message
    assert message.endswith(f"[{question[0]}]")
    assert "\n" not in message


def test_open_hub_name_that_is_also_a_local_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "org/name/train.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    with raises(DataError, "org/name", "disk", location="org/name/config"):
        open_hub("org/name/config")


def test_open_hub_without_network_is_an_error(tmp_path: Path) -> None:
    question: Question = ("org/name", None, "text")
    message = ask([question], HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))[question]
    assert "Check the network" in message and message.endswith("[org/name]")
