"""The GPU check: how parts end, verdicts, output and the page; and all of its parts on a CPU at toy size."""

import importlib
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from megatron_bipe.errors import ConfigError
from tests.helpers.errors import raises
from tests.helpers.paths import ROOT
from tests.helpers.tools import call_tool

FAKES = """
import os
import signal
import time

def good(check):
    check.report("figure", 1)

def interrupts(check):
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(30)

def imports(check):
    check.report("first", os.environ["PYTHONPATH"].split(os.pathsep)[0])

def crashes(check):
    check.report("figure", 1)
    raise ValueError("of this part")

def overruns(check):
    time.sleep(30)

def rubbish(check):
    check.report("figure", 1)
    with (check.folder / "figures.jsonl").open("a") as file:
        file.write("Warning: of a library")

def silent(check):
    print("figure: 1")
"""


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Return modules of tools/gpu by name; parts may be functions of the module `fakes`."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    (tmp_path / "fakes.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    return lambda name: importlib.import_module(f"gpu.{name}")


@pytest.fixture
def check(gpu, monkeypatch, tmp_path):
    """Return a function that runs a check of these parts; it returns the exit code and results by part."""

    def run(*parts, total_s=720.0):
        monkeypatch.setattr(gpu("parts"), "PARTS", parts)
        monkeypatch.setattr(gpu("parts"), "TOTAL_S", total_s)
        ended = call_tool("gpu_check", "--output", tmp_path / "out", code=None)
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        return ended, {part["part"]: part for part in results["parts"]}

    return run


def test_part_that_crashes_overruns_or_reports_rubbish_fails_and_the_others_run(check, gpu):
    part, kinds = gpu("check").Part, ("crashes", "overruns", "rubbish", "silent", "good")
    ended, found = check(*(part(kind, 0.5 if kind == "overruns" else 60, f"fakes:{kind}") for kind in kinds))
    assert ended.code == 1
    assert [name for name, result in found.items() if result["failed"]] == list(kinds[:-1])
    assert "of this part" in found["crashes"]["failure"]
    assert "limit" in found["overruns"]["failure"]
    assert "Warning: of a library" in found["rubbish"]["failure"]
    assert found["crashes"]["figures"] == found["good"]["figures"] == {"figure": 1.0}  # those of before the crash, too
    assert "crashes" in ended.output and "toy" in ended.output


@pytest.mark.parametrize(
    ("comparison", "limit", "more", "code", "verdict"),
    [
        ("<=", 1, {}, 0, "met"),
        ("<=", 0.5, {}, 1, "missed"),
        (">=", 2, {"is_aim": True}, 0, "missed"),
        ("==", 2, {"gpu_only": True}, 0, "not applicable on CPU"),
    ],
)
def test_criterion_decides_the_exit_code_unless_it_is_an_aim_or_for_gpus(
    check, gpu, comparison, limit, more, code, verdict
):
    tools = gpu("check")
    ended, found = check(tools.Part("good", 60, "fakes:good", (tools.Criterion("figure", comparison, limit, **more),)))
    assert ended.code == code
    assert found["good"]["criteria"][0]["verdict"] == verdict and verdict in ended.output


@pytest.mark.parametrize(("value", "verdict"), [(math.nan, "missed"), ("text", "not measured"), (None, "not measured")])
def test_criterion_without_a_number_is_not_met(gpu, value, verdict):
    criterion = gpu("check").Criterion("figure", "<=", 1.0)
    figures = {} if value is None else {"figure": value}
    found = criterion.judge(figures, on_gpu=True)
    assert found == verdict
    assert gpu("check").Outcome("part", "", 1.0, figures, (criterion,), (found,)).is_failed


def test_part_without_time_left_is_not_run_and_fails(check, gpu):
    ended, found = check(gpu("check").Part("good", 60, "fakes:good"), total_s=0.0)
    assert ended.code == 1 and "no time" in found["good"]["failure"] and not found["good"]["figures"]


def test_interrupted_check_has_the_results_of_the_parts_that_ended(check, gpu):
    part = gpu("check").Part
    ended, found = check(*(part(kind, 60, f"fakes:{kind}") for kind in ("good", "interrupts", "silent")))
    assert ended.code == 1 and "Interrupted" in ended.output
    assert list(found) == ["good"] and found["good"]["figures"] == {"figure": 1.0}


def test_selection_without_parts_is_refused(gpu, tmp_path):
    ended = call_tool("gpu_check", "--output", tmp_path / "out", "--only", "tests", "--skip", "tests", code=2)
    assert "no part" in ended.output and not (tmp_path / "out").exists()


def test_page_without_markers_is_refused_before_the_parts_run(gpu, monkeypatch, tmp_path):
    hardware = importlib.import_module("megatron_bipe.runtime.hardware")
    monkeypatch.setattr(hardware, "device_type", lambda: "cuda")
    page = tmp_path / "missing.md"
    ended = call_tool("gpu_check", "--output", tmp_path / "out", "--write-docs", page, code=2)
    assert str(page) in ended.output and not (tmp_path / "out").exists()


def test_check_is_repeated_in_its_folder_and_refuses_a_folder_with_other_files(check, gpu, tmp_path):
    part = gpu("check").Part("good", 60, "fakes:good")
    assert check(part)[0].code == check(part)[0].code == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("")
    ended = call_tool("gpu_check", "--output", other, code=2)
    assert "other" in ended.output and (other / "mine").exists()


def test_missing_package_is_named_with_the_ways_to_install_it(gpu, monkeypatch, capsys):
    tool = importlib.import_module("gpu_check")
    monkeypatch.setattr(tool, "REQUIRED", ("torch", "no-such-package"))
    assert tool.main([]) == 2
    shown = capsys.readouterr().err
    assert "no-such-package" in shown and "--find-links" in shown and "torch," not in shown


def test_rows_replace_what_is_between_the_markers_of_the_page(gpu, tmp_path):
    report, tools = gpu("report"), gpu("check")
    criterion = tools.Criterion("1.6B: MFU", ">=", 0.5, gpu_only=True, is_aim=True)
    figures = {"1.6B: MFU": 0.52, f"1.6B: MFU{tools.PREDICTED}": 0.55, "1.6B: tokens/s": 12345.6}
    outcomes = [
        tools.Outcome("versions", "", 1.0, {"device": "NVIDIA H200", "torch": "2.13.0"}, (), ()),
        tools.Outcome("speed-1.6b", "", 1.0, figures, (criterion,), ("met",)),
        tools.Outcome("peers", "it overran its limit of 90 s", 90.0, {}, (), ()),
    ]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\n\nold\n\n{report.END}\nafter\n")
    report.write_docs(page, report.docs_rows(outcomes, "python tools/gpu_check.py", "2026-01-02"))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| 1.6B: MFU | 0.52 | 0.55 | aim >= 0.5 | met |" in text and "| 1.6B: tokens/s | 12,346 |" in text
    assert all(word in text for word in ("    python tools/gpu_check.py", "NVIDIA H200", "torch 2.13.0", "2026-01-02"))
    assert "peers" in text and "overran" in text
    page.write_text("no markers")
    with raises(ConfigError, location=page):
        report.write_docs(page, "rows")
    assert page.read_text() == "no markers"


def test_performance_page_has_the_markers_once(gpu):
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    assert text.count(gpu("report").BEGIN) == text.count(gpu("report").END) == 1


def test_kernels_are_listed_without_the_ranges_that_contain_them(gpu):
    from torch.autograd import DeviceType

    def event(name, device, us, is_range=False):
        times = {"self_device_time_total": us, "self_cpu_time_total": us}
        return SimpleNamespace(key=name, count=2, device_type=device, is_user_annotation=is_range, **times)

    cuda, cpu = DeviceType.CUDA, DeviceType.CPU
    events = [event("gemm", cuda, 5.0), event("Optimizer.step", cuda, 9.0, is_range=True), event("mm", cpu, 1.0)]
    profiler = SimpleNamespace(key_averages=lambda: events)
    assert gpu("kernels").kernel_times(profiler, on_gpu=True) == [(5.0, 2, "gemm")]
    assert gpu("kernels").kernel_times(profiler, on_gpu=False) == [(1.0, 2, "mm")]


def test_waits_are_counted_with_their_location(gpu, monkeypatch):
    import warnings

    import torch

    correctness = gpu("correctness")
    with correctness.watched() as waits:
        torch.cuda.synchronize()
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    found = waits.take()
    assert sum(found.values()) == 2 and all("test_gpu_check.py:" in location for location in found)
    assert not waits.take()


def test_waits_are_those_of_a_micro_batch_and_of_the_update(gpu):
    correctness = gpu("correctness")
    import torch

    class Engine:
        def train_step(self, micro_batches, lr):
            for _ in micro_batches:
                torch.cuda.synchronize()
            for _ in range(2):
                torch.cuda.synchronize()

    per_micro_batch, per_update = correctness._train_watched(Engine(), None)
    assert sum(per_micro_batch.values()) == 1 and sum(per_update.values()) == 2


def run_on_cpu(folder, *options, cwd=ROOT):
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--output", str(folder), *options]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def test_parts_import_the_package_next_to_the_tool(check, gpu):
    ended, found = check(gpu("check").Part("imports", 60, "fakes:imports"))
    assert ended.code == 0 and found["imports"]["figures"] == {"first": str(ROOT)}


def test_parts_with_criteria_precede_those_that_only_report(gpu):
    is_judged = [any(not c.is_aim for c in part.criteria) for part in gpu("parts").PARTS[1:]]
    assert is_judged == sorted(is_judged, reverse=True)


def test_two_parts_run_on_a_cpu_from_another_folder(tmp_path):
    ended = run_on_cpu("out", "--only", "versions", "attention", cwd=tmp_path)
    assert ended.returncode == 0 and "toy" in ended.stdout, ended.stdout
    parts = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
    assert [part["part"] for part in parts] == ["versions", "attention"]
    assert 0 < parts[1]["figures"]["heads 64, 256 tokens: largest ratio of errors"] < 1.5


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path, gpu):
    names = [part.name for part in gpu("parts").PARTS]
    halves = names[:6], names[6:]
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(run_on_cpu, tmp_path / half[0], "--only", *half) for half in halves]
    for future, half in zip(futures, halves, strict=True):
        ended = future.result()
        parts = json.loads((tmp_path / half[0] / "results.json").read_text())["parts"]
        assert [part["part"] for part in parts] == half
        assert ended.returncode == 0 and not any(part["failed"] for part in parts), ended.stdout
