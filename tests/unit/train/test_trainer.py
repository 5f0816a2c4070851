"""One start of a run: its training state, and whether it is finished."""

import pytest

from megatron_bipe.checkpoint.find import step_folder
from megatron_bipe.config.load import load_run_config
from megatron_bipe.run_files import read_events
from megatron_bipe.runtime.preemption import StopRequest
from megatron_bipe.train.profile import Profile
from megatron_bipe.train.train_state import TrainState
from megatron_bipe.train.trainer import Trainer
from tests.helpers.loop import MAIN, Notes

BF16 = ["train.precision=bf16"]  # tests mean the same on every machine


def test_save_that_ends_after_the_last_step_is_recorded_before_the_end_of_the_run(tmp_path):
    class Saving(Notes):
        def observe(self, observer):
            self.finish_save = lambda: observer.saved(1, num_bytes=10, seconds=0.5)

    step_folder(tmp_path, 1).mkdir(parents=True)
    settings = f"run_dir={tmp_path}", "train.steps=2", f"checkpoint.after_save='echo $BIPE_STEP > {tmp_path}/uploaded'"
    run, notes = load_run_config(None, [*BF16, *settings]), Saving(tmp_path)
    assert Trainer(run, MAIN, notes, notes, notes, StopRequest(), Profile(0, tmp_path, MAIN)).run(2)
    assert [event["event"] for event in read_events(tmp_path)][-2:] == ["saved", "done"]
    assert (tmp_path / "uploaded").read_text() == "1\n"


def test_goodput_counts_from_the_first_start(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"time": 0, "event": "average", "sources": []}\n')
    run, notes = load_run_config(None, [*BF16, f"run_dir={tmp_path}", "train.steps=2"]), Notes(tmp_path)
    assert Trainer(run, MAIN, notes, notes, notes, StopRequest(), Profile(0, tmp_path, MAIN)).run(2)
    assert read_events(tmp_path)[-1]["goodput"] > 1e-6


@pytest.mark.parametrize(("stop", "steps"), [(4, 0), (6, 0), (8, 2)])
def test_run_past_its_last_step_is_finished_and_nothing_is_done(tmp_path, stop, steps, caplog):
    run, notes = load_run_config(None, [*BF16, f"run_dir={tmp_path}", "train.steps=8"]), Notes(tmp_path)
    notes.save(tmp_path, 6, loop_state=TrainState(step=6, samples=6 * 256).model_dump(mode="json"), final=True)
    with caplog.at_level("INFO"):
        assert Trainer(run, MAIN, notes, notes, notes, StopRequest(), Profile(0, tmp_path, MAIN)).run(stop)
    assert notes.names.count("step") == steps
    assert read_events(tmp_path)[-1]["event"] == "done"
    assert any("step 6" in line and " 4" in line for line in caplog.messages) == (stop == 4)
