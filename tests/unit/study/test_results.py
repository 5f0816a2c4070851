"""Results as CSV, Markdown and a page, from the evaluations that exist."""

import csv
import io
import math
from pathlib import Path

import pytest

from megatron_bipe.errors import DataError
from megatron_bipe.study import Plan, load_plan
from megatron_bipe.study.result_page import perplexity_lines, plots, study_page
from megatron_bipe.study.results import Results, differences_csv, read_results, results_csv, tables
from tests.helpers.errors import raises
from tests.unit.study.conftest import WriteLosses, WriteStudy


@pytest.fixture
def results(plan: Plan, write_losses: WriteLosses, tmp_path: Path, text_dataset: Path) -> Results:
    """Results of two members, the second of which lacks one of three seeds."""
    data = tmp_path / "data" / "reference"
    data.mkdir(parents=True)
    (data / "valid").symlink_to(text_dataset)
    for job in plan.jobs(tmp_path):
        nats = {"rope": [20.0, 20.0 + job.seed], "bipe_rope": [22.0, 22.0 + job.seed]}[job.member.name]
        if job.name == "bipe_rope/seed-3":
            job.run_dir.mkdir(parents=True)
        else:
            write_losses(job, {16: nats, 32: [2 * value for value in nats]})
    return read_results(plan, tmp_path)


def test_csv_has_a_row_for_each_run_and_length(results: Results) -> None:
    rows = list(csv.DictReader(io.StringIO(results_csv(results))))
    assert [(row["member"], row["seed"], row["length"]) for row in rows] == [
        ("rope" if run < 3 else "bipe_rope", str(run % 3 + 1), length) for run in range(5) for length in ("16", "32")
    ]
    first = rows[0]
    assert first["model.encoding"] == "rope" and int(first["num_predictions"]) == 20
    assert float(first["nats_per_token"]) == pytest.approx(41 / 20)
    assert float(first["perplexity"]) == pytest.approx(math.exp(41 / 20))


def test_bits_per_byte_are_those_of_an_evaluation_of_the_full_text(results: Results, text_dataset: Path) -> None:
    from megatron_bipe.data.manifest import Manifest

    manifest = Manifest.load(text_dataset)
    row = next(csv.DictReader(io.StringIO(results_csv(results))))
    total_nats = float(row["nats_per_token"]) * (manifest.num_tokens - 1)
    assert manifest.text_bytes
    assert float(row["bits_per_byte"]) == pytest.approx(total_nats / math.log(2) / manifest.text_bytes)


def test_runs_without_evaluation_are_missing(results: Results, tmp_path: Path) -> None:
    assert results.missing == ["bipe_rope/seed-3 (not finished)"]
    assert "bipe_rope/seed-3 (not finished)" in study_page(results, tmp_path)


def test_table_has_mean_and_deviation_and_differences(results: Results) -> None:
    found = [math.exp((40 + seed) / 20) for seed in (1, 2, 3)]
    mean = sum(found) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in found) / 2)
    text = tables(results)
    assert f"| `rope` | {mean:.2f} ± {deviation:.2f} |" in text
    assert "| `bipe_rope` | `rope` | +0.200* [+0.200, +0.200] | +0.400* [+0.400, +0.400] |" in text


def test_differences_are_over_common_seeds(results: Results) -> None:
    rows = list(csv.DictReader(io.StringIO(differences_csv(results))))
    assert [(row["member"], row["reference"], row["length"]) for row in rows] == [
        ("bipe_rope", "rope", "16"),
        ("bipe_rope", "rope", "32"),
    ]
    assert {(row["num_seeds"], row["num_documents"]) for row in rows} == {("2", "2")}
    assert float(rows[0]["nats_per_token"]) == pytest.approx(4 / 20)


def test_plot_has_means_with_bands_of_the_extremes(results: Results) -> None:
    rope, bipe = perplexity_lines(results).lines
    found = [math.exp((40 + seed) / 20) for seed in (1, 2, 3)]
    assert rope.points[0] == (16, pytest.approx(sum(found) / 3))
    assert rope.band[0] == (16, pytest.approx(found[0]), pytest.approx(found[2]))
    assert (rope.name, rope.train_len_tokens, len(bipe.band)) == ("rope", 16, 2)
    made = plots(results)
    assert made["perplexity.png"].startswith(b"\x89PNG") and made["perplexity.pdf"].startswith(b"%PDF")


def test_members_have_the_style_of_their_other_values_and_the_colour_of_their_encoding(
    write_study: WriteStudy, write_losses: WriteLosses, tmp_path: Path
) -> None:
    plan = load_plan(write_study(seeds=[1], grid={"model.encoding": ["rope", "alibi"], "optimizer.lr": [0.1, 0.2]}))
    for job in plan.jobs(tmp_path):
        write_losses(job, {16: [20.0], 32: [40.0]})
    lines = perplexity_lines(read_results(plan, tmp_path)).lines
    assert [(line.encoding, line.style) for line in lines] == [("rope", 0), ("rope", 1), ("alibi", 0), ("alibi", 1)]
    plan = load_plan(write_study(seeds=[1], grid={"optimizer.lr": [0.1, 0.2]}, data={"corpus": {}}))
    for job in plan.jobs(tmp_path):
        write_losses(job, {16: [20.0], 32: [40.0]})
    lines = perplexity_lines(read_results(plan, tmp_path)).lines
    assert [(line.encoding, line.style) for line in lines] == [("", 0), ("", 1)]


def test_page_states_the_range_of_what_members_do_not_share(
    write_study: WriteStudy, write_losses: WriteLosses, tmp_path: Path
) -> None:
    plan = load_plan(write_study(title="a <b> $x$ é", seeds=[1], grid={"train.steps": [4, 4000]}, reference="4000"))
    for job in plan.jobs(tmp_path):
        write_losses(job, {16: [20.0], 32: [40.0]})
    results = read_results(plan, tmp_path)
    html = study_page(results, tmp_path)
    assert "0.0 to 0.3 million tokens in 4 to 4,000 steps" in html and "a &lt;b&gt; $x$ é" in html
    assert plots(results)["perplexity.svg"]


def test_diverged_seeds_have_results(plan: Plan, write_losses: WriteLosses, tmp_path: Path) -> None:
    for job in plan.jobs(tmp_path):
        diverged = {2: math.nan, 3: 9000.0}.get(job.seed, 20.0) if job.member.name == "rope" else 20.0
        write_losses(job, {16: [20.0], 32: [diverged]})
    results = read_results(plan, tmp_path)
    assert "nan ± nan" in tables(results)
    assert "inf" in results_csv(results) and "bipe_rope" in differences_csv(results)
    assert "nan ± nan" in study_page(results, tmp_path) and plots(results)


def test_page_has_the_members_the_method_and_the_settings(results: Results, tmp_path: Path) -> None:
    html = study_page(results, tmp_path)
    for text in ("Two encodings", "5 of 6", "bipe_rope", "+0.200*", "Owen 2007", "base.yaml", "protocol full"):
        assert text in html


def test_study_with_one_seed_and_a_shorter_reach_has_no_deviations(
    write_study: WriteStudy, write_losses: WriteLosses, tmp_path: Path
) -> None:
    plan = load_plan(write_study(seeds=[4], grid={"model.encoding": ["rope", "learned"]}))
    rope, learned = plan.jobs(tmp_path)
    write_losses(rope, {16: [20.0], 32: [40.0]})
    write_losses(learned, {16: [21.0]})
    results = read_results(plan, tmp_path)
    assert f"| `learned` | {math.exp(2.1):.2f} |  |" in tables(results)
    assert "learned up to 16" in study_page(results, tmp_path)
    assert results_csv(results).splitlines()[1].split(",")[6] == ""  # the text is absent, and so are its bytes


@pytest.mark.parametrize(
    "content", ["", "subset,model\nvalid,a\n", "subset,model,length_tokens,nats,num_predictions\n"]
)
def test_damaged_evaluation_is_an_error(plan: Plan, tmp_path: Path, content: str) -> None:
    job = plan.jobs(tmp_path)[0]
    job.evaluation.mkdir(parents=True)
    (job.evaluation / "documents.csv").write_text(content)
    with raises(DataError, location=job.evaluation / "documents.csv"):
        read_results(plan, tmp_path)
