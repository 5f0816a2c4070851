"""Prompts and answers of SCROLLS, at and next to every limit, and the benchmark's files."""

import json
import zipfile

import numpy as np
import pytest

from megatron_bipe.data.tokenizer import load_tokenizer
from megatron_bipe.errors import DataError
from megatron_bipe.tasks.scrolls import tasks as tasks_module
from megatron_bipe.tasks.scrolls.tasks import TASKS, Prompter, Question, find_task, first_words, questions, read_rows
from tests.helpers.errors import raises
from tests.helpers.paths import LLAMA
from tests.helpers.scrolls import rows_of, write_benchmark

HEAD, TAIL = "Context:\n", "\n Please summarize this report:"
QUESTIONS = [name for name, task in TASKS.items() if task.metric != "rouge"]
SUMMARIES = [name for name, task in TASKS.items() if task.metric == "rouge"]


def text_of(tokenizer, ids):
    return tokenizer.decode(ids)


# Limits


def test_tasks_are_the_seven_of_the_benchmark_with_its_metrics():
    assert {name: task.metric for name, task in TASKS.items()} == {
        "gov_report": "rouge",
        "summ_screen_fd": "rouge",
        "qmsum": "rouge",
        "narrative_qa": "f1",
        "qasper": "f1",
        "quality": "exact_match",
        "contract_nli": "exact_match",
    }


@pytest.mark.parametrize("name", QUESTIONS)
def test_question_is_complete_up_to_7991_tokens_and_its_end_is_cut_beyond(letters, name):
    prompter = Prompter(TASKS[name], 8192, letters)
    assert prompter.prompt_tokens == 7991
    for size in (7989, 7990, 7991, 9000):  # and BOS; one token per character
        text = "".join("abcdefgh"[position % 8] for position in range(size))
        (prompt,) = prompter.prompts([text])
        assert prompt.size == min(size + 1, 7991)
        assert prompt[0] == letters.bos_id
        assert text_of(letters, prompt[1:]) == text[:7990]


@pytest.mark.parametrize("name", SUMMARIES)
def test_summary_keeps_the_first_tokens_and_the_request_whatever_is_cut(letters, name):
    prompter = Prompter(TASKS[name], 8192, letters)
    assert prompter.prompt_tokens == 7191
    fitting = 7191 - 1 - len(HEAD) - len(TAIL)
    for size in (fitting - 1, fitting, fitting + 1, 9000):
        text = "".join("abcdefgh"[position % 8] for position in range(size))
        (prompt,) = prompter.prompts([text])
        assert prompt.size == min(1 + len(HEAD) + size + len(TAIL), 7191)
        assert text_of(letters, prompt[1:]) == HEAD + text[:fitting] + TAIL


@pytest.mark.parametrize(("name", "most"), [(name, 200) for name in QUESTIONS] + [(name, 1000) for name in SUMMARIES])
def test_answer_is_cut_behind_its_limit_and_ends_with_eos(letters, name, most):
    prompter = Prompter(TASKS[name], 8192, letters)
    for size in (1, most - 1, most, most + 1, 2 * most):
        (answer,) = prompter.answers(["x" * size])
        assert answer.size == min(size, most) + 1
        assert (answer == letters.eos_id).nonzero()[0].tolist() == [answer.size - 1]
    longest = prompter.prompts(["y" * 9000])[0].size + prompter.answers(["x" * 9000])[0].size
    assert longest == 8192


@pytest.mark.parametrize("name", QUESTIONS)
def test_question_ends_with_its_20000th_word(letters, name):
    prompter = Prompter(TASKS[name], 100_000, letters)
    for size in (19_999, 20_000, 20_001):
        (prompt,) = prompter.prompts([" ".join(["a"] * size)])
        assert prompt.size == 1 + 2 * min(size, 20_000) - 1
    (summary,) = Prompter(TASKS["qmsum"], 100_000, letters).prompts([" ".join(["a"] * 20_001)])
    assert summary.size == 1 + len(HEAD) + 2 * 20_001 - 1 + len(TAIL)


def test_first_words_keeps_the_text_between_them():
    text = "  one\n\ntwo  three\n"
    assert [first_words(text, count) for count in (1, 2, 3, 4, None)] == [
        "  one",
        "  one\n\ntwo",
        "  one\n\ntwo  three",
        text,
        text,
    ]


@pytest.mark.skipif(not LLAMA.is_dir(), reason="LLaMA's tokenizer is not next to the repository")
def test_request_has_seven_tokens_with_the_published_models_tokenizer():
    tokenizer = load_tokenizer(LLAMA)
    prompter = Prompter(TASKS["gov_report"], 8192, tokenizer)
    (encoded,) = tokenizer.encode_batch([f"{HEAD}{'some words ' * 9000}{TAIL}"])
    (prompt,) = prompter.prompts(["some words " * 9000])
    opened = np.concatenate([[tokenizer.bos_id], encoded])
    assert prompt.tolist() == [*opened[:7184], *opened[-7:]]
    assert tokenizer.text_of(int(prompt[-7])) == "\n"


def test_sequence_too_short_for_a_prompt_is_refused(letters):
    Prompter(TASKS["qasper"], 203, letters)
    with raises(DataError, 202, "qasper", 200, location="--length", remedy=203):
        Prompter(TASKS["qasper"], 202, letters)
    least = 1000 + 3 + len(TAIL)
    Prompter(TASKS["qmsum"], least, letters)
    with raises(DataError, least - 1, "qmsum", 1000, location="--length", remedy=least):
        Prompter(TASKS["qmsum"], least - 1, letters)


def test_tokenizer_without_eos_is_refused(tmp_path, write_text_dataset):
    write_text_dataset(tmp_path, [["a"]])
    with raises(DataError, location="tokenizer/tokenizer.json", remedy="eos_token"):
        Prompter(TASKS["qasper"], 8192, load_tokenizer(tmp_path / "tokenizer"))


def test_unknown_task_is_refused_with_the_nearest_name():
    with raises(DataError, "'quasper'", location="--task", remedy="qasper?"):
        find_task("quasper")


# Files


def test_rows_and_questions_are_read_from_folders_and_from_the_hubs_zip_files(tmp_path):
    write_benchmark(tmp_path)
    for task in TASKS:
        for split in ("train", "validation", "test"):
            rows = list(read_rows(tmp_path, task, split))
            assert [row.pid for row in rows] == [row["pid"] for row in rows_of(task, split)]
            assert [row.output for row in rows] == [row["output"] for row in rows_of(task, split)]
            asked = questions(rows)
            assert [question.id for question in asked] == [f"{task}-{n}" for n in range(6)]
            assert [len(question.outputs) for question in asked] == ([0] * 6 if split == "test" else [1, 2] * 3)
    assert asked[0] == Question("contract_nli-0", rows_of("contract_nli", "test")[0]["input"], ())


GOOD = {"id": "a", "pid": "a_0", "input": "q", "output": "x"}


@pytest.mark.parametrize(
    ("line", "observed"),
    [
        ({key: GOOD[key] for key in ("id", "input")}, ["'pid', 'output'", "id, pid, input, output"]),
        (GOOD | {"input": 3}, ["'input'", 3]),
        (GOOD | {"id": None}, ["'id'", "None"]),
        (GOOD | {"input": " \n"}, ["'input'"]),
        (["a"], ["list"]),
        ("{", ["line 2 column 1"]),
    ],
)
def test_line_that_is_not_a_row_is_named(tmp_path, line, observed):
    (tmp_path / "qasper").mkdir()
    text = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "qasper" / "train.jsonl").write_text(json.dumps(GOOD) + "\n\n" + text + "\n")
    with raises(DataError, *observed, location="train.jsonl, line 3"):
        list(read_rows(tmp_path, "qasper", "train"))


def test_missing_files_are_named_with_the_command_that_fetches_them(tmp_path):
    with raises(DataError, "qmsum/train.jsonl", "qmsum.zip", location=tmp_path, remedy="--include qmsum.zip"):
        list(read_rows(tmp_path, "qmsum", "train"))
    write_benchmark(tmp_path)
    with raises(DataError, "qasper/dev.jsonl", location="qasper.zip"):
        list(read_rows(tmp_path, "qasper", "dev"))
    (tmp_path / "qasper.zip").write_bytes(b"no zip file")
    with raises(DataError, "not a zip file", location="qasper.zip"):
        list(read_rows(tmp_path, "qasper", "train"))


def test_output_without_text_is_none(tmp_path):
    (tmp_path / "qasper").mkdir()
    lines = [
        {"id": "a", "pid": f"a{n}", "input": "?", "output": text} for n, text in enumerate(["", " \n", None, " x "])
    ]
    (tmp_path / "qasper" / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert questions(read_rows(tmp_path, "qasper", "test")) == [Question("a", "?", (" x ",))]


def test_zip_file_that_is_damaged_anywhere_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "qasper.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        lines = [{"id": f"{n}", "pid": f"{n}", "input": f"text {n * n}", "output": "x"} for n in range(300)]
        archive.writestr("qasper/train.jsonl", "\n".join(map(json.dumps, lines)))
    intact = (tmp_path / "qasper.zip").read_bytes()
    for position in range(60, 300, 7):
        (tmp_path / "qasper.zip").write_bytes(
            intact[:position] + bytes([intact[position] ^ 0x55]) + intact[position + 1 :]
        )
        with raises(DataError) as error:
            list(read_rows(tmp_path, "qasper", "train"))
        assert error.value.location.startswith(str(tmp_path / "qasper.zip"))


@pytest.mark.parametrize("is_packed", [False, True])
def test_read_rows_line_above_the_limit_is_an_error(tmp_path, monkeypatch, is_packed):
    line = json.dumps({"id": "a", "pid": "a", "input": "x", "output": "y"}) + "\n"
    content = line + " " * 500 + line
    (tmp_path / "qasper").mkdir()
    if is_packed:
        with zipfile.ZipFile(tmp_path / "qasper.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("qasper/train.jsonl", content)
    else:
        (tmp_path / "qasper/train.jsonl").write_text(content)
    assert len(list(read_rows(tmp_path, "qasper", "train"))) == 2
    monkeypatch.setattr(tasks_module, "LONGEST_LINE_BYTES", 400)
    with raises(DataError, 400, location="train.jsonl, line 2"):
        list(read_rows(tmp_path, "qasper", "train"))
