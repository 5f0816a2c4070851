"""The files and texts that an evaluation writes."""

import csv
import io
import json
import math

import pytest

from megatron_bipe.errors import ConfigError
from megatron_bipe.eval.perplexity import EvalSettings, PerplexityResult
from megatron_bipe.eval.report import (
    NAMES,
    ModelResults,
    as_csv,
    as_json,
    as_table,
    check_measure,
    coverage_text,
    prepare_output,
    unique_names,
    write_report,
)
from megatron_bipe.picture import PictureSettings
from tests.helpers.errors import raises

RESULT_KEYS = [
    "length_tokens",
    "perplexity",
    "nats_per_token",
    "bits_per_byte",
    "num_windows",
    "num_predictions",
    "num_tokens_read",
    "num_tokens_dropped",
    "seconds",
]  # stored: scripts read these names
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def outcome(length, perplexity):
    return PerplexityResult(length, perplexity, math.log(min(perplexity, 1e300)), 1.5, 11, 172, 173, 0, 0.25)


@pytest.fixture
def models(make_eval_model):
    first = make_eval_model("bipe_rope", name="ours")
    second = make_eval_model("rope", name="theirs")
    return [
        ModelResults(first, (outcome(16, 20.0), outcome(32, 19.5))),
        ModelResults(second, (outcome(16, 20.25), outcome(32, math.inf))),
    ]


def test_write_report_makes_files_that_can_be_read(make_dataset, documents, models, tmp_path):
    dataset = make_dataset(documents)
    folder = tmp_path / "out"
    prepare_output(folder, overwrite=False)
    files = write_report(folder, dataset, EvalSettings(max_tokens=100), models)

    assert [file.name for file in files] == list(NAMES)
    assert sorted(folder.iterdir()) == sorted(files)
    content = json.loads(files[0].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["protocol"] == "full" and "predicted once" in content["protocol_means"]
    assert content["data"]["fingerprint"] == dataset.manifest.fingerprint
    assert (content["data"]["num_tokens"], content["data"]["num_tokens_given"]) == (173, 60)
    ours, theirs = content["models"]
    assert (ours["name"], ours["encoding"], ours["train_len_tokens"]) == ("ours", "bipe_rope", 16)
    assert ours["results"][1]["perplexity"] == 19.5 and ours["results"][1]["length_tokens"] == 32
    assert theirs["results"][1]["perplexity"] is None
    assert list(theirs["results"][1]) == RESULT_KEYS
    assert files[2].read_bytes().startswith(PNG_MAGIC)


def test_as_csv_has_a_row_per_model_and_length(models):
    rows = list(csv.DictReader(io.StringIO(as_csv(models))))
    assert [(row["model"], row["length_tokens"], row["perplexity"]) for row in rows] == [
        ("ours", "16", "20.0"), ("ours", "32", "19.5"), ("theirs", "16", "20.25"), ("theirs", "32", "inf"),
    ]  # fmt: skip
    assert list(rows[0]) == ["model", "encoding", "train_len_tokens", *RESULT_KEYS]


def test_as_table_aligns_and_marks_the_training_length(models):
    assert as_table(models).splitlines() == [
        "perplexity at      16      32",
        "-----------------------------",
        "ours           20.00*  19.50",
        "theirs         20.25*    inf",
        "* training length",
    ]


def test_coverage_text_says_what_was_read_and_dropped(make_dataset, documents, models):
    text = coverage_text(make_dataset(documents), EvalSettings(max_tokens=100), models[0].results)
    assert "Protocol full" in text and "Given 60 of the dataset's 173 tokens: 2 complete documents of 6" in text
    assert "11 sequences, 172 predictions, 173 tokens read, 0 dropped" in text


def test_json_names_the_documents_and_the_treatment_of_empty_texts_if_chosen(make_dataset, documents, models):
    dataset = make_dataset(documents)
    plain, chosen = (
        as_json(dataset, settings, models)
        for settings in (EvalSettings(), EvalSettings(max_tokens=99, empty_texts="drop"))
    )
    assert "2 complete documents of 6" in chosen["data"]["documents_given"]
    assert chosen["empty_texts"] == "drop"
    assert "documents_given" not in plain["data"] and "empty_texts" not in plain


def test_unique_names_of_equal_names_are_what_was_loaded(make_eval_model):
    eval_models = [
        make_eval_model(name="run")._replace(source="a/run"),
        make_eval_model(name="run")._replace(source="b/run"),
        make_eval_model(name="other"),
    ]
    assert unique_names(eval_models) == ["a/run", "b/run", "other"]


@pytest.mark.parametrize("name", NAMES)
def test_prepare_output_earlier_results_are_kept_unless_asked(tmp_path, name):
    (tmp_path / name).write_text("earlier")
    with raises(ConfigError, name, location=tmp_path, remedy="--overwrite"):
        prepare_output(tmp_path, overwrite=False)
    prepare_output(tmp_path, overwrite=True)
    assert (tmp_path / name).read_text() == "earlier"


def test_prepare_output_makes_folders_and_leaves_other_files(tmp_path):
    prepare_output(tmp_path / "a" / "b", overwrite=False)
    (tmp_path / "a" / "b" / "notes.txt").write_text("mine")
    prepare_output(tmp_path / "a" / "b", overwrite=False)
    assert (tmp_path / "a" / "b" / "notes.txt").read_text() == "mine"


def test_prepare_output_where_a_file_is_says_so(tmp_path):
    (tmp_path / "out").write_text("")
    with raises(ConfigError, "File exists", location=tmp_path / "out"):
        prepare_output(tmp_path / "out", overwrite=False)


def test_formats_that_are_not_asked_for_are_not_kept_from_earlier(make_dataset, documents, models, tmp_path):
    dataset = make_dataset(documents)
    for name in NAMES:
        (tmp_path / name).write_text("earlier")
    (tmp_path / "notes.txt").write_text("mine")
    picture = PictureSettings(("svg",), "My $title", measure="bits-per-byte")
    write_report(tmp_path, dataset, EvalSettings(), models, picture)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "notes.txt", "perplexity.csv", "perplexity.json", "perplexity.svg",
    ]  # fmt: skip
    text = (tmp_path / "perplexity.svg").read_text()
    assert ">My $title</text>" in text and ">bits per byte (lower is better)</text>" in text


def test_bits_per_byte_that_will_not_be_known_are_refused_before_the_evaluation(make_dataset, documents):
    dataset = make_dataset(documents)
    check_measure("bits-per-byte", dataset, [16, 32], EvalSettings())
    check_measure("bits-per-byte", dataset, [16], EvalSettings(max_tokens=99))
    check_measure("nats", dataset, [16], EvalSettings(protocol="reference"))
    with raises(ConfigError, "protocol reference", location="--y", remedy="--protocol full"):
        check_measure("bits-per-byte", dataset, [16], EvalSettings(protocol="reference"))
