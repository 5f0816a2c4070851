"""Losses by document and position, their intervals, and the report that is made of them."""

import base64
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from megatron_bipe.data.segments import bilevel_ids, sequence_ends
from megatron_bipe.errors import CheckpointError, ConfigError, DataError
from megatron_bipe.eval.document_losses import read_documents
from megatron_bipe.eval.extrapolation import (
    NAMES,
    PAPER,
    ModelLosses,
    Subset,
    paper_subset,
    subset_names,
    write_extrapolation,
)
from megatron_bipe.eval.perplexity import (
    NUM_PARTS,
    DocumentLosses,
    EvalSettings,
    evaluate_documents,
    evaluate_perplexity,
)
from megatron_bipe.picture import PictureSettings
from tests.helpers.errors import raises
from tests.helpers.tools import assert_refuses, call_tool

# Stored: scripts read these names.
RESULT_KEYS = ["length_tokens", "perplexity", "interval", "num_predictions", "num_documents", "by_place"]


@pytest.mark.parametrize("protocol", ["full", "sliding", "reference"])
def test_evaluate_documents_adds_up_to_the_perplexity(make_dataset, make_eval_model, documents, protocol):
    dataset, eval_model, settings = (
        make_dataset(documents),
        make_eval_model(),
        EvalSettings(protocol=protocol, batch_tokens=40),
    )
    for length in (16, 24):
        found = evaluate_documents(eval_model, dataset, length, settings)
        expected = evaluate_perplexity(eval_model, dataset, length, settings)
        assert found.counts_MQ.sum() == expected.num_predictions
        assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-12)
        if protocol == "sliding":  # parts are those of the sequence: its first half counts in the first sequence only
            assert found.counts_MQ[:, : NUM_PARTS // 2].sum() == length // 2


def test_evaluate_documents_puts_each_loss_to_its_document_and_position(make_dataset, make_eval_model, documents):
    dataset, eval_model, length = make_dataset(documents), make_eval_model(), 16
    found = evaluate_documents(eval_model, dataset, length, EvalSettings())
    nats, counts = np.zeros((6, NUM_PARTS)), np.zeros((6, NUM_PARTS), int)
    tokens = np.concatenate(documents)
    for start in range(0, len(tokens) - 1, length):
        sequence = tokens[start : start + length + 1].astype(np.int64)
        ends = sequence_ends(dataset.ends(start, start + len(sequence) - 1)[None], dataset.rule)
        ids = [torch.from_numpy(x) for x in (sequence[None, :-1], *bilevel_ids(ends, 5))]
        with torch.no_grad():
            losses = -eval_model.model(tuple(ids)).log_softmax(-1)[0]
        for position, token in enumerate(sequence[1:]):
            document = next(d for d in range(6) if start + position + 1 < sum(map(len, documents[: d + 1])))
            nats[document, position] += float(losses[position, token])
            counts[document, position] += 1
    np.testing.assert_array_equal(found.counts_MQ, counts)
    np.testing.assert_allclose(found.nats_MQ, nats, rtol=1e-5)
    positions = dict(found.by_position)
    assert positions[0.5] == pytest.approx(math.exp(nats[:, 0].sum() / counts[:, 0].sum()), rel=1e-5)
    assert len(positions) == 16


def losses_of(nats, counts):
    rows = len(nats)
    spread = np.zeros((rows, NUM_PARTS)), np.zeros((rows, NUM_PARTS), dtype=np.int64)
    spread[0][:, 0], spread[1][:, 0] = nats, counts
    return DocumentLosses(16, *spread)


def test_interval_is_that_of_the_mean_over_documents():
    generator = np.random.default_rng(5)
    means = generator.normal(3.0, 0.2, 400)
    found = losses_of(means * 100, np.full(400, 100))
    low, high = found.interval()
    error = means.std() / math.sqrt(400)
    assert math.log(low) == pytest.approx(means.mean() - 1.96 * error, abs=0.3 * error)
    assert math.log(high) == pytest.approx(means.mean() + 1.96 * error, abs=0.3 * error)
    assert low < found.perplexity < high
    assert found.interval() == (low, high)


def test_interval_of_equal_documents_is_a_point_and_of_one_is_none():
    same = losses_of([20.0, 30.0, 10.0], [2, 3, 1])
    assert same.interval() == pytest.approx((same.perplexity, same.perplexity))
    assert losses_of([20.0, 0.0], [2, 0]).interval() is None


@pytest.mark.parametrize(
    ("name", "subset"),
    [("gutenberg-pg-19", "PG-19"), ("arxiv", "ArXiv"), ("Github", "GitHub"), ("books", None), ("arxiv-github", None)],
)
def test_paper_subset_of_a_name(name, subset):
    assert paper_subset(name) == subset
    assert subset is None or subset in PAPER


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["d/arxiv", "e/github"], ["arxiv", "github"]),
        (["d/arxiv/valid", "d/github/valid"], ["arxiv/valid", "github/valid"]),
        (["d/a/valid", "e/a/valid", "e/b/valid"], ["d/a/valid", "e/a/valid", "e/b/valid"]),
        (["d/valid", "d/../d/valid"], ["valid", "valid"]),
    ],
)
def test_subset_names_tell_all_datasets_apart(folders, names):
    assert subset_names([Path("/", folder) for folder in folders]) == names


def test_picture_names_the_papers_curves_of_all_subsets_and_what_lies_beyond(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k))
    model = ModelLosses("m", "m", "rope", 16, (losses_of([3.0, 3.0], [1, 1]),))
    subsets = [Subset("arxiv", "f", (model,)), Subset("gutenberg-pg-19", "f", (model,))]
    write_extrapolation(tmp_path, EvalSettings(), subsets)
    [figure] = set(figures)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "m", "RoPE, the paper's", "training length", "shaded: 95% interval over documents",
    ]  # fmt: skip
    columns = [axes for axes in figure.axes if axes.get_title(loc="left").endswith("by sequence length")]
    low, high = columns[1].get_ylim()
    notes = [text.get_text() for text in columns[1].texts]
    assert low < 19 and (high > 41 or any("RoPE, the paper's 41 at 2,048" in note for note in notes))


def test_picture_in_bits_per_byte_counts_the_bytes_of_the_text_and_leaves_the_paper_out(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k))
    model = ModelLosses("m", "m", "rope", 16, (losses_of([3.0, 3.0], [1, 1]),))
    subsets = [Subset("arxiv", "f", (model,), text_bytes=4)]
    write_extrapolation(tmp_path, EvalSettings(), subsets, PictureSettings(("pdf",), measure="bits-per-byte"))
    by_length = figures[0].axes[0]
    assert by_length.get_ylabel().startswith("bits per byte")
    [values] = {tuple(line.get_ydata()) for line in by_length.lines if list(line.get_xdata()) == [16]}
    assert values == pytest.approx((6 / 4 / math.log(2),))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".html", ".json", ".pdf"]


@pytest.fixture
def command(tmp_path):
    """A function that returns the command line of `evaluate.py extrapolation`, which writes to tmp_path/out."""

    def arguments(models, datasets, *options, lengths="8..32"):
        folders = [dataset.path for dataset in datasets]
        given = ["--models", *models, "--data", *folders, "--lengths", lengths, "--output", tmp_path / "out"]
        return ["extrapolation", *given, "--device", "cpu", *options]

    return arguments


def test_command_writes_a_page_that_needs_nothing_else(
    command, make_dataset, make_eval_model, documents, save_run, tmp_path
):
    datasets = [make_dataset(documents, name="arxiv"), make_dataset(documents[::-1], name="own <data>")]
    eval_models = [make_eval_model("bipe_rope", name="ours & theirs"), make_eval_model("alibi", name="other")]
    models = [save_run(eval_model, datasets[0]) for eval_model in eval_models]

    call_tool("evaluate", *command(models, datasets))

    report = json.loads((tmp_path / "out" / "extrapolation.json").read_text())
    assert [subset["name"] for subset in report["subsets"]] == ["arxiv", "own <data>"]
    assert report["subsets"][0]["paper"][0]["name"] == "BiPE-RoPE" and not report["subsets"][1]["paper"]
    for subset, dataset in zip(report["subsets"], datasets, strict=True):
        for line, eval_model in zip(subset["models"], eval_models, strict=True):
            assert [result["length_tokens"] for result in line["results"]] == [8, 16, 24, 32]
            want = evaluate_perplexity(eval_model, dataset, 24, EvalSettings())
            result = line["results"][2]
            assert result["perplexity"] == pytest.approx(want.perplexity, rel=1e-6)
            assert result["interval"][0] < result["perplexity"] < result["interval"][1]
            assert (result["num_documents"], result["num_predictions"]) == (6, 172)
            assert list(result) == RESULT_KEYS and list(result["by_place"][0]) == ["tokens", "perplexity"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(NAMES)
    page = (tmp_path / "out" / "extrapolation.html").read_text()
    picture = (tmp_path / "out" / "extrapolation.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and base64.b64encode(picture).decode() in page
    assert "ours &amp; theirs" in page and "own &lt;data&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)|<script|@import|url\(", page)
    for value in (line["results"][0]["perplexity"] for line in report["subsets"][0]["models"]):
        assert f"{value:,.2f}" in page
    rows = (tmp_path / "out" / "extrapolation.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * 4 + sum(len(curve.points) for curve in PAPER["ArXiv"])
    assert "arxiv,paper: BiPE-ALiBi,bipe_alibi,2048,5.7,," in rows
    assert_refuses("evaluate", command(models, datasets), ConfigError, "--overwrite", location=tmp_path / "out")


def test_command_writes_the_loss_of_each_document(
    command, make_dataset, make_eval_model, documents, save_run, tmp_path
):
    dataset, eval_model = make_dataset(documents), make_eval_model()
    call_tool("evaluate", *command([save_run(eval_model, dataset)], [dataset], "--documents"))
    found = read_documents(tmp_path / "out" / "documents.csv")
    assert list(found) == [8, 16, 24, 32]
    expected = evaluate_documents(eval_model, dataset, 24, EvalSettings())
    assert found[24].nats_M == pytest.approx(expected.nats_MQ.sum(1), rel=1e-6)
    assert found[24].counts_M.tolist() == expected.counts_MQ.sum(1).tolist()
    assert math.exp(found[24].nats_per_token) == pytest.approx(expected.perplexity, rel=1e-6)


def test_losses_of_several_models_in_one_file_are_refused(tmp_path):
    path = tmp_path / "documents.csv"
    rows = ["valid,a,8,0,1.5,3", "valid,b,8,0,1.5,3"]
    path.write_text("\n".join(["subset,model,length_tokens,document,nats,num_predictions", *rows]))
    with raises(DataError, 2, location=path):
        read_documents(path)


@pytest.mark.parametrize(
    ("options", "error", "observed", "location"),
    [
        ({"lengths": "32..8"}, ConfigError, "'32..8'", "--lengths"),
        ({"lengths": "8..32..64"}, ConfigError, "'8..32..64'", "--lengths"),
        ({"lengths": "8,200"}, DataError, 173, "corpus"),
        ({"model": "gone"}, CheckpointError, "RUN_DIR", "gone"),
    ],
)
def test_command_bad_input_is_named_before_anything_is_written(
    command, make_dataset, make_eval_model, documents, save_run, tmp_path, options, error, observed, location
):
    dataset = make_dataset(documents)
    model = options.get("model") or save_run(make_eval_model(), dataset)
    arguments = command([model], [dataset], lengths=options.get("lengths", "8"))
    assert_refuses("evaluate", arguments, error, observed, location=location)
    assert not list((tmp_path / "out").glob("*"))
