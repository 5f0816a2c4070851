"""The report of `--profile` about a training step."""

import gzip
import json

import pytest
import torch
from torch import nn
from torch.profiler import record_function

from megatron_bipe.errors import ConfigError
from megatron_bipe.parallel.mesh import Mesh
from megatron_bipe.train.profile import PARTS, WARM_UP_STEPS, Profile, seconds_by_part, table
from tests.helpers.errors import assert_warned, raises

MAIN = Mesh(0, 0, 1, 1, torch.device("cpu"))


def train(profile, steps):
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(steps):
        with record_function("data"):
            inputs = torch.randn(512, 256)
        with record_function("forward"):
            loss = model(inputs).square().sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        profile.step_done()


@pytest.fixture
def said(caplog):
    caplog.set_level("INFO")
    return lambda: {line.split()[0]: line for record in caplog.records for line in record.getMessage().splitlines()}


def test_profile_reports_every_part_of_the_recorded_steps(tmp_path, said):
    train(Profile(3, tmp_path, MAIN), WARM_UP_STEPS + 3)
    seconds = {part: float(said()[part].split()[1]) for part in PARTS}
    assert said()["3"].startswith("3 updates")
    assert seconds.pop("communication") == 0
    assert all(own > 0 for own in seconds.values())


def test_profile_writes_a_trace_of_the_recorded_steps_only(tmp_path):
    train(Profile(2, tmp_path, MAIN), WARM_UP_STEPS + 4)
    trace = json.loads(gzip.decompress((tmp_path / "profile/rank_0.json.gz").read_bytes()))
    assert [event["name"] for event in trace["traceEvents"]].count("forward") == 2


def test_profile_of_a_run_that_ends_earlier_reports_the_steps_it_recorded(tmp_path, said):
    profile = Profile(5, tmp_path, MAIN)
    train(profile, WARM_UP_STEPS + 1)
    profile.close()
    assert said()["1"].startswith("1 updates") and (tmp_path / "profile/rank_0.json.gz").exists()


def test_profile_of_a_run_that_ends_with_the_warm_up_has_recorded_nothing(tmp_path, caplog):
    profile = Profile(5, tmp_path, MAIN)
    train(profile, WARM_UP_STEPS)
    profile.close()
    assert_warned(caplog, "--profile", "2 updates")
    assert not (tmp_path / "profile").exists()
    with torch.profiler.profile():  # there can be one at a time
        pass


def test_profile_of_a_run_that_ends_in_the_warm_up_says_so(tmp_path, said):
    profile = Profile(5, tmp_path, MAIN)
    train(profile, 1)
    profile.close()
    assert "1 updates" in said()["--profile:"] and not (tmp_path / "profile").exists()


def test_profile_of_no_steps_does_nothing(tmp_path, said):
    profile = Profile(0, tmp_path, MAIN)
    train(profile, WARM_UP_STEPS + 2)
    profile.close()
    assert said() == {} and list(tmp_path.iterdir()) == []


def test_profile_of_a_negative_number_of_steps_is_an_error(tmp_path):
    with raises(ConfigError, -1, location="--profile"):
        Profile(-1, tmp_path, MAIN)


def test_seconds_by_part_count_backward_and_its_calls_as_not_forward():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        with record_function("forward"):
            loss = (torch.randn(800, 800, requires_grad=True) @ torch.randn(800, 800)).sum()
        loss.backward()
    products = sorted((e for e in profiler.events() if e.name == "aten::mm"), key=lambda event: event.time_range.start)
    parts = [{part for part, own in seconds_by_part([e], on_gpu=False).items() if own} for e in products]
    assert parts == [{"forward"}, {"backward"}]


def test_table_has_a_line_for_time_that_no_operation_explains():
    lines = table({"forward": 1.0, "backward": 2.0}, wall_s=4.0, steps=2).splitlines()
    assert lines[0] == "2 updates of 2.0000 s under the profiler"
    assert lines[-1].split() == ["in", "no", "operation", "0.5000", "s", "25.0%"]
