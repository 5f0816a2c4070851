"""Pages of runs: complete, self-contained, escaped, small, and there is one for whatever a run folder holds."""

import json
import re

import numpy as np
import pytest

from megatron_bipe.config import engine_config, load_run_config
from megatron_bipe.errors import CheckpointError, ConfigError, DataError
from megatron_bipe.estimate.memory import stage_memories
from megatron_bipe.io import locked
from megatron_bipe.monitor.event_text import duration, event_text, moment
from megatron_bipe.monitor.history import read_history
from megatron_bipe.monitor.provenance_section import provenance_section
from megatron_bipe.monitor.run_page import run_names, run_page, settings_table
from megatron_bipe.monitor.run_sections import event_marks, training_section
from megatron_bipe.monitor.status import Limits, read_status
from megatron_bipe.monitor.svg_chart import Mark, Plot, Series, draw, extremes_by_column, noisy, short
from megatron_bipe.train.metrics_file import valid_key
from tests.helpers.errors import raises
from tests.helpers.pages import assert_self_contained
from tests.helpers.recorded_runs import PROVENANCE, RecordedRun
from tests.helpers.tools import assert_refuses, call_tool


def losses(step, by_length):
    found = {valid_key("pile", length, "nats"): loss for length, loss in by_length.items()}
    return found | {valid_key("pile", length, "nats_by_position"): [3.0] * 15 + [None] for length in by_length}


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A run with a failure, a rollback, validation at two lengths, evaluations and hostile texts."""
    run = RecordedRun(tmp_path_factory.mktemp("runs") / "busy <i>").start(setup_s=2.0).steps(40)
    run.validate(1.0, losses(40, {32: 3.5, 64: 4.5})).save().steps(8).fail(40, 5.0)
    run.start(30.0, 10.0, versions={"torch": "2.14"}, allow=["optimizer"]).steps(8)
    run.event(
        "bad step", step=48, samples=[8, 16], windows=[1], reason="<script>bad</script>", loss_nats=9, grad_norm=1
    )
    run.roll_back(40, 2.0).steps(40).validate(1.0, losses(80, {32: 3.25, 64: 4.25})).save()
    run.event("slow rank", step=80, rank=1, name="rank 1 on node2", own_s=3.0, median_s=1.0, steps=100)
    run.event("<b>future</b>", detail="<x>", step=80)
    lines = [
        {
            "time": 1.0,
            "step": step,
            "kind": "perplexity <k>",
            "values": {"ppl": step / 2, "text": "<u>said</u>"},
        }
        for step in (40, 80)
    ]
    run.write()
    (run.run_dir / "evaluations.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, {"step": 1}]))
    return run


def test_page_of_a_run_has_all_parts(busy):
    outline = assert_self_contained(run_page([read_history(busy.run_dir)], busy.time_s + 5))
    text = outline.text
    for part in ("killed", "6 s after", "80 of 1,000", "16 steps were repeated", "2 launches", "GPU X x 8"):
        assert part in text
    for part in ("pile, 32 tokens", "3.25", "64 tokens", "perplexity <k>", "<u>said</u>", "0123456789, modified"):
        assert part in text
    for part in ("rank 1 on node2 was slow", "Rolled back from step 48 to 40", "<b>future</b>: detail <x>"):
        assert part in text
    assert "<script>bad</script>" in text and "busy <i>" in text  # as text, not as elements
    assert not {"script", "u"} & {tag for tag, _ in outline.elements}
    assert "versions.torch 2.13 2.14" in text and "optimizer" in text


def test_marks_show_starts_rollbacks_and_bad_steps(busy):
    html = run_page([read_history(busy.run_dir)], busy.time_s)
    first_chart = html[html.index("loss, nats per token") :].split("</svg>")[0]
    for kind, count in (("start", 1), ("rollback", 1), ("bad-step", 1)):
        assert first_chart.count(f'class="mark {kind}"') == count


def test_memory_is_next_to_its_estimate(busy):
    history = read_history(busy.run_dir)
    ds_config = engine_config(history.config, PROVENANCE["deepspeed"]["settings"], 8, "zero1.json")
    expected = stage_memories(history.config, ds_config, 8)[0].device / 2**30
    text = assert_self_contained(run_page([history], busy.time_s)).text
    assert "1.50 GiB" in text and f"{expected:.2f} GiB" in text


def test_comparison_switches_axes_without_scripts_and_lists_differences(busy, tmp_path):
    other = RecordedRun(tmp_path / "other", "optimizer.lr=0.5", "alerts.webhook=http://x/SECRET").start().steps(8)
    other.validate(1.0).stop().write()
    html = run_page([read_history(busy.run_dir), read_history(other.run_dir)], busy.time_s)
    outline = assert_self_contained(html)
    radios = [attributes for tag, attributes in outline.elements if attributes.get("type") == "radio"]
    assert len(radios) == 8 and sum("checked" in radio for radio in radios) == 2
    assert html.count('class="view"') == 8
    assert "optimizer.lr 0.0001 0.5" in outline.text and "SECRET" not in html and "(hidden)" in outline.text


def test_curves_of_ten_runs_differ(tmp_path):
    runs = [RecordedRun(tmp_path / f"run-{number}").start().steps(8).write() for number in range(10)]
    html = run_page([read_history(run) for run in runs], 2e9)
    assert len(set(re.findall(r'<li class="(\w+ s\d)"', html))) == 10


def test_equal_runs_have_no_differing_settings(busy):
    histories = [read_history(busy.run_dir)] * 2
    assert "<td>" not in settings_table(histories, ["a", "b"])


def test_axes_of_runs(tmp_path):
    from megatron_bipe.model import train_flops_per_token
    from megatron_bipe.monitor.run_page import _axis

    history = read_history(RecordedRun(tmp_path).start(setup_s=3600.0).steps(2, 1800.0).write())
    assert _axis(history, "tokens").tolist() == [256, 512]
    assert _axis(history, "FLOPs")[1] == 512 * train_flops_per_token(history.config.model, 32)
    assert _axis(history, "hours").tolist() == [2.0, 2.0]  # both lines were written after the second step


def test_names_distinguish_runs_and_repeated_ones_are_refused(tmp_path):
    paths = [tmp_path / "a" / "seed-1", tmp_path / "b" / "seed-1"]
    assert run_names(paths) == ["a/seed-1", "b/seed-1"]
    assert run_names(paths[:1]) == ["seed-1"]
    with raises(ConfigError, "twice", location=paths[0]):
        run_names([*paths, tmp_path / "b" / ".." / "a" / "seed-1"])


@pytest.mark.parametrize(
    ("events", "metrics"),
    [
        ("", ""),
        ('{"time": 1.0, "event": "start", "step": 0, "ranks": 1}\n', ""),
        ('{"time": 1.0, "event": "start", "step": 0, "ranks": 1}\n{"time": 2.', '{"step": 1, "tok'),
        ("[]\n5\n\x00\n", '{"step": 1, "time/step_s": 1.0}\n{"step": "x", "time/step_s": null}\nnull\n'),
        (
            '{"time": 1.0, "event": "start"}\n{"time": 2.0, "event": "return"}\n',
            '{"step": 3, "valid/a/8/nats": null}\n',
        ),
        ('{"time": "x", "event": "start", "step": 0}\n{"time": 2.0, "event": 5}\n', ""),
        ('{"time": 1.0, "event": "start", "step": 0, "ranks": 1, "versions": 3, "hosts": [], "before": 1}\n', ""),
    ],
)
def test_half_written_folders_have_a_page(tmp_path, events, metrics):
    run = RecordedRun(tmp_path)
    (run.run_dir / "events.jsonl").write_text(events)
    (run.run_dir / "metrics.jsonl").write_text(metrics)
    assert_self_contained(run_page([read_history(run.run_dir)], 1e9))
    assert_self_contained(run_page([read_history(run.run_dir), read_history(RecordedRun(tmp_path / "b").run_dir)], 1e9))


def test_runs_without_provenance_have_a_page(tmp_path):
    run = RecordedRun(tmp_path).start().steps(8)
    run.events = [{key: event[key] for key in ("time", "event", "step", "ranks")} for event in run.events]
    text = assert_self_contained(run_page([read_history(run.write())], run.time_s)).text
    assert "8 ranks" in text and "no provenance" in text


def test_missing_and_other_folders_are_one_error(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with raises(CheckpointError, folder, location=folder):
            read_history(folder)


def test_state_and_end_are_those_of_the_status_command(tmp_path):
    run = RecordedRun(tmp_path).start().steps(100, 7200.0)
    for line in run.lines:  # a line after each step
        line["time"] = 1.7e9 + line["step"] * 7200.0
    run_dir, now_s = run.write(), run.time_s + 5
    with locked(run_dir / "running", lambda: None):
        text = assert_self_contained(run_page([read_history(run_dir)], now_s)).text
        status = read_status(run_dir, Limits(), now_s)
        assert "training" in text and "5 s after" in text and moment(status.finish_at_s) in text
        assert "75 d left" in text
        pair = [read_history(run_dir), read_history(RecordedRun(tmp_path / "other").write())]
        assert "100 of 1,000" in assert_self_contained(run_page(pair, now_s)).text
    assert "killed" in assert_self_contained(run_page([read_history(run_dir)], now_s)).text


def test_long_curves_are_small_and_keep_spikes():
    x_N, y_N = np.arange(500_000.0), np.full(500_000, 2.0)
    y_N[123_456], y_N[400_001] = 9.0, np.nan
    html = draw(Plot(noisy("a", x_N, y_N), "step", "loss"))
    assert len(html) < 60_000 and extremes_by_column(x_N, y_N)[1][~np.isnan(extremes_by_column(x_N, y_N)[1])].max() == 9
    assert "NaN" not in html and "nan" not in html


def test_long_run_is_small(tmp_path):
    run = RecordedRun(tmp_path, "train.steps=40000")
    for start in range(0, 30_000, 1000):
        run.start(1.0).steps(1000, 0.25 + start / 1e6).validate(1.0, losses(1, {32: 3.0, 64: 4.0})).save().stop()
    assert len(run_page([read_history(run.write())], run.time_s)) < 500_000


@pytest.mark.parametrize("log", [True, False])
def test_charts_of_odd_values(log):
    x_N = np.array([1.0, 2.0, 3.0])
    for y_N in (x_N * 0, x_N * np.nan, np.array([np.inf, 1.0, -1.0]), x_N * 1e300, x_N[:1]):
        html = draw(
            Plot([Series("a", x_N[: y_N.size], y_N)], "x", "y", [Mark(2, "start", "<m>")], log_x=log, log_y=log)
        )
        assert "nan" not in html.lower() and "inf" not in html.lower() and "<m>" not in html
    assert not draw(Plot([], "x", "y"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (59, "59 s"), (125, "2 min 5 s"), (7200, "2 h"), (1e5, "1 d 4 h"), (-60, "-1 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_numbers_of_ticks():
    numbers = (0, 2.5e-4, 0.25, 3000, 25_000, 1.5e9, 3e18)
    assert [short(number) for number in numbers] == ["0", "2.5e-4", "0.25", "3,000", "25k", "1.5B", "3e18"]


def test_incomplete_events_are_listed_with_their_keys():
    assert event_text({"time": 1.0, "event": "failed", "rank": 3}) == "failed: rank 3"
    supervisor = {
        "event": "failed",
        "by": "supervisor",
        "exit_code": 1,
        "signal": "SIGKILL",
        "attempt": 2,
        "wait_s": 60,
    }
    assert "launch 2 end with SIGKILL; the next launch follows in 1 min. out" in event_text(
        supervisor | {"reason": "out"}
    )


def test_report_command(busy, tmp_path):
    page = tmp_path / "page.html"
    call_tool("report", busy.run_dir, "--output", page)
    assert_self_contained(page.read_text())
    before = page.read_bytes()
    assert_refuses("report", [busy.run_dir, "--output", page], DataError, location=page)
    refused = [busy.run_dir, tmp_path, "--output", page, "--overwrite"]
    assert_refuses("report", refused, CheckpointError, "config.yaml", location=tmp_path)
    assert page.read_bytes() == before


def test_settings_of_old_versions_name_the_file(tmp_path):
    run = RecordedRun(tmp_path)
    (run.run_dir / "config.yaml").write_text("model: {depth: 3}\n")
    with raises(ConfigError, "depth", location=run.run_dir / "config.yaml"):
        read_history(run.run_dir)
    assert load_run_config(None).model.num_layers > 0


def evaluation(step, kind, values, **facts):
    return {"time": 1.0, "step": step, "fingerprint": "f", "kind": kind, "values": values, "dtype": "fp32"} | facts


def test_evaluations_are_told_apart_by_data_length_and_options(tmp_path):
    run = RecordedRun(tmp_path).start().steps(8)
    run.write()
    lines = [
        evaluation(
            step,
            "perplexity",
            {"perplexity": 9.0, "nats_per_token": number + step / 10, "num_predictions": 7},
            data=data,
            length_tokens=length,
            max_tokens=None,
        )
        for step in (4, 8)
        for number, (data, length) in enumerate([("pile", 32), ("pile", 64), ("code <c>", 32)], 1)
    ]
    lines += [evaluation(8, "generate", {"text": f"{prompt} end"}, prompt=prompt) for prompt in ("one", "two")]
    lines.append(evaluation(8, "harness", {"acc": 0.25, "acc_stderr": None}, task="lambada", num_fewshot=5))
    (tmp_path / "evaluations.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    html = run_page([read_history(tmp_path)], run.time_s)
    text = assert_self_contained(html).text
    for row in ("pile, 32 tokens: nats_per_token 1.4 1.8", "pile, 64 tokens: nats_per_token 2.4 2.8"):
        assert row in text
    for row in ("code <c>, 32 tokens: nats_per_token 3.4 3.8", "one end", "two end", "lambada: acc 0.25"):
        assert row in text
    assert text.count("perplexity: nats_per_token") == 1 and "perplexity: num_predictions" not in text


def test_marks_are_branches_where_the_start_has_one(tmp_path):
    run = RecordedRun(tmp_path, "train.branch_from=trunk@40")
    run.step = 40
    trunk = {"run": "trunk", "step": 40, "fingerprint": "f"}
    run.start(branch_from=trunk).steps(8).fail(40).start(branch_from=trunk).steps(8).save().stop().start().steps(8)
    history = read_history(run.write())
    marks = event_marks(history)
    assert [(mark.x, mark.kind) for mark in marks] == [(41, "branch"), (41, "branch"), (48, "start")]
    assert 'class="mark branch"' in training_section(history)
    assert "branch from step 40 of trunk" in marks[0].text
    assert "branch_from" not in provenance_section(history)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"event": "after save failed", "step": 9, "reason": "exit code 3"}, "checkpoint.after_save failed"),
        ({"event": "tracker failed", "tracker": "wandb", "reason": "no disk"}, "tracker wandb failed"),
        ({"event": "average", "sources": [{"run": "a", "step": 9, "fingerprint": "f"}]}, "mean of step 9 of a"),
    ],
)
def test_events_of_commands_trackers_and_averages_are_sentences(event, words):
    text = event_text({"time": 1.0} | event)
    assert words in text and ": step 9" not in text
    assert event.get("reason", "") in text
