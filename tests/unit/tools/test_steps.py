"""Commands that are run one after the other: not twice, with their output kept, and with one error where they fail."""

import sys
from pathlib import Path

import pytest

from megatron_bipe.errors import BipeError
from tests.scripts import script


@pytest.fixture(scope="module")
def steps():
    with script("_steps") as module:
        yield module


def test_fill_repeats_what_is_for_each(steps):
    patterns = [("One", "echo {out} {n}", "one"), ("Do {each}", "echo {each}", "{each}/done")]
    filled = steps.fill(patterns, Path("some where"), {"n": 3}, ["a", "b"])
    assert filled[0] == steps.Step("One", ["echo", "some where", "3"], Path("some where/one"))
    assert [(step.title, step.result) for step in filled[1:]] == [
        ("Do a", Path("some where/a/done")),
        ("Do b", Path("some where/b/done")),
    ]


def test_run_steps_stops_at_the_first_that_fails(steps, tmp_path):
    def step(name, code):
        return steps.Step(name, [sys.executable, "-c", code], tmp_path / name)

    planned = [step("a", f"open({str(tmp_path / 'a')!r}, 'w')"), step("b", "1/0"), step("c", "1/0")]
    with pytest.raises(BipeError, match="exit code 1") as error:
        steps.run_steps(planned, tmp_path)
    assert error.value.place.endswith("b.log") and (tmp_path / "a").exists()


def test_run_step_finished_before_is_not_run_again(steps, tmp_path, capsys):
    (tmp_path / "result").touch()
    steps.run_step(steps.Step("Fail", ["false"], tmp_path / "result"), tmp_path)
    assert "done before" in capsys.readouterr().out


def test_run_step_result_of_another_command_is_refused(steps, tmp_path, monkeypatch):
    def step(*options, folder=tmp_path):
        return steps.Step("Do it", ["touch", f"{folder}/result", *options], folder / "result")

    steps.run_step(step(), tmp_path)
    steps.run_step(step(), tmp_path)
    with pytest.raises(BipeError, match=r"result was made by '\$ touch OUTPUT/result', and now it is .*--no-create"):
        steps.run_step(step("--no-create"), tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    relative = Path(tmp_path.name)
    steps.run_step(step(folder=relative), relative)  # the same, from elsewhere


def test_run_step_keeps_all_output_and_shows_what_matters(steps, tmp_path, capsys):
    code = "print('[2026-01-01] noise'); print('step 1'); open('result', 'w')".replace(
        "result", str(tmp_path / "result")
    )
    step = steps.Step("Do it", [sys.executable, "-c", code], tmp_path / "result")
    steps.run_step(step, tmp_path)
    shown = capsys.readouterr().out
    assert "    step 1\n" in shown and "    [2026" not in shown
    assert "noise" in (tmp_path / "logs" / "Do_it.log").read_text()


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "pass"])
def test_run_step_failing_or_without_result_names_its_log(steps, tmp_path, code):
    step = steps.Step("Do it", [sys.executable, "-c", code], tmp_path / "result")
    with pytest.raises(BipeError, match="did not make") as error:
        steps.run_step(step, tmp_path)
    assert error.value.place == str(tmp_path / "logs" / "Do_it.log")
