"""The files and texts that an evaluation leaves behind."""

import csv
import io
import json
import math
from itertools import pairwise

import pytest
from matplotlib.axes import Axes

from megatron_bipe.errors import ConfigError
from megatron_bipe.eval.curves import Curve, spread, thin_ticks, values_beyond, visible_range
from megatron_bipe.eval.perplexity import LengthResult, Settings
from megatron_bipe.eval.plot import draw_perplexity
from megatron_bipe.eval.report import (
    ModelResults,
    as_csv,
    as_table,
    describe,
    prepare_output,
    unique_names,
    write_report,
)
from tests.helpers.errors import raises

FLAT = Curve("flat", 16, [(16, 20.0), (32, 19.0), (64, 21.0)])
EXPLODING = Curve("bursting", 16, [(16, 20.0), (32, 90.0), (64, math.inf)])
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def outcome(length, perplexity):
    return LengthResult(length, perplexity, math.log(min(perplexity, 1e300)), 1.5, 11, 172, 173, 0, 0.25)


@pytest.fixture
def models(make_subject):
    first = make_subject("bipe_rope", name="ours")
    second = make_subject("rope", name="theirs")
    return [
        ModelResults(first, (outcome(16, 20.0), outcome(32, 19.5))),
        ModelResults(second, (outcome(16, 20.25), outcome(32, math.inf))),
    ]


def test_write_report_makes_three_files_that_can_be_read(make_dataset, documents, models, tmp_path):
    dataset = make_dataset(documents)
    folder = tmp_path / "out"
    prepare_output(folder, overwrite=False)
    files = write_report(folder, dataset, Settings(max_tokens=100), models)

    assert [file.name for file in files] == ["perplexity.json", "perplexity.csv", "perplexity.png"]
    assert sorted(folder.iterdir()) == sorted(files)
    content = json.loads(files[0].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert content["protocol"] == "full" and "predicted once" in content["protocol_means"]
    assert content["data"]["fingerprint"] == dataset.manifest.fingerprint
    assert (content["data"]["num_tokens"], content["data"]["num_tokens_given"]) == (173, 100)
    ours, theirs = content["models"]
    assert (ours["name"], ours["encoding"], ours["train_len_tokens"]) == ("ours", "bipe_rope", 16)
    assert ours["results"][1]["perplexity"] == 19.5 and ours["results"][1]["length_tokens"] == 32
    assert theirs["results"][1]["perplexity"] is None
    assert files[2].read_bytes().startswith(PNG_MAGIC)


def test_as_csv_has_a_row_per_model_and_length(models):
    rows = list(csv.DictReader(io.StringIO(as_csv(models))))
    assert [(row["model"], row["length_tokens"], row["perplexity"]) for row in rows] == [
        ("ours", "16", "20.0"), ("ours", "32", "19.5"), ("theirs", "16", "20.25"), ("theirs", "32", "inf"),
    ]  # fmt: skip
    assert set(LengthResult._fields) < set(rows[0])


def test_as_table_aligns_and_marks_the_training_length(models):
    assert as_table(models).splitlines() == [
        "perplexity at      16      32",
        "-----------------------------",
        "ours           20.00*  19.50",
        "theirs         20.25*    inf",
        "* training length",
    ]


def test_describe_says_what_was_read_and_dropped(make_dataset, documents, models):
    text = describe(make_dataset(documents), Settings(max_tokens=100), models[0].results)
    assert "Protocol full" in text and "Given 100 of the dataset's 173 tokens" in text
    assert "11 sequences, 172 predictions, 173 tokens read, 0 dropped" in text


def test_unique_names_of_equal_names_are_what_was_loaded(make_subject):
    subjects = [
        make_subject(name="run")._replace(source="a/run"),
        make_subject(name="run")._replace(source="b/run"),
        make_subject(name="other"),
    ]
    assert unique_names([ModelResults(eval_model, ()) for eval_model in subjects]) == [
        "a/run",
        "b/run",
        "other",
    ]


@pytest.mark.parametrize("name", ["perplexity.json", "perplexity.csv", "perplexity.png"])
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


def test_visible_range_holds_everything_where_nothing_explodes():
    low, high = visible_range([FLAT])
    assert low < 19 and high > 21
    assert values_beyond([FLAT], high) == ""


def test_visible_range_is_not_stretched_by_an_exploding_line():
    low, high = visible_range([FLAT, EXPLODING])
    assert low < 19 and 21 < high == 50.0
    assert values_beyond([FLAT, EXPLODING], high) == "bursting 90 at 32, infinite at 64"


def test_visible_range_of_nearly_equal_values_does_not_magnify_noise():
    low, high = visible_range([Curve("one", 16, [(16, 20.0), (32, 20.01)])])
    assert high - low > 2


@pytest.mark.parametrize("curves", [[FLAT], [FLAT, EXPLODING], [EXPLODING], [Curve("point", 16, [(64, 12.0)])]])
def test_draw_perplexity_gives_a_picture_of_readme_size(curves):
    picture = draw_perplexity(curves, title="Perplexity")
    assert picture.startswith(PNG_MAGIC)
    width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
    assert 1000 < width < 1800 and 600 < height < 900
    assert draw_perplexity(curves, title="Perplexity") == picture


def test_draw_perplexity_line_to_infinity_is_drawn_out_of_the_plot(monkeypatch):
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **style: drawn.append(y) or plot(self, x, y, **style))
    draw_perplexity([FLAT, Curve("gone", 16, [(16, 20.0), (32, math.inf)])], title="Perplexity")
    assert drawn[0] == [20.0, 19.0, 21.0]
    assert drawn[1][0] == 20.0 and 50.0 < drawn[1][1] < math.inf


def test_draw_perplexity_many_models_reuse_colours():
    curves = [Curve(f"model {i}", 16, [(16, 20.0 + i), (32, 20.0 + i)]) for i in range(9)]
    assert draw_perplexity(curves, title="Perplexity").startswith(PNG_MAGIC)


def test_spread_keeps_order_and_distance():
    placed = spread([0.50, 0.10, 0.51, 0.52], gap=0.05)
    order = sorted(placed)
    assert [placed[1], placed[0], placed[2], placed[3]] == order
    assert min(b - a for a, b in pairwise(order)) >= 0.05 - 1e-9
    assert spread([0.1, 0.9], gap=0.05) == [0.1, 0.9]
    assert spread([], gap=0.05) == []


def test_thin_ticks_keeps_the_training_length_and_what_fits():
    assert thin_ticks([128, 256, 512, 1024, 8192], [256], smallest_gap=400) == [256, 1024, 8192]
    assert thin_ticks([1024, 2048], [1024], smallest_gap=60) == [1024, 2048]
