"""Steps, samples and skipped samples of the training state."""

import json

import pytest
from pydantic import ValidationError

from megatron_bipe.train.train_state import TrainState


def test_train_state_advances_batch_by_batch():
    state = TrainState()
    assert [state.next_batch_range(8) for _ in range(3)] == [(0, 8), (8, 16), (16, 24)]
    assert (state.step, state.samples) == (3, 24)


def test_train_state_skips_the_requested_samples_once():
    state = TrainState(pass_over=[(8, 16), (16, 24), (40, 48), (32, 40)])
    assert [state.next_batch_range(8)[0] for _ in range(4)] == [0, 24, 48, 56]
    assert state.pass_over == [] and state.step == 4


def test_train_state_survives_json():
    state = TrainState(step=3, samples=40, pass_over=[(48, 56)], valid_owed=True, good_losses=[0.1 + 0.2, 1e-30])
    stored = json.loads(json.dumps(state.model_dump(mode="json")))
    assert TrainState.at(3, 8, stored) == state


def test_train_state_of_a_checkpoint_without_it_is_steps_times_batch():
    assert TrainState.at(5, 8, {}) == TrainState(step=5, samples=40)


def test_train_state_with_unknown_fields_is_refused():
    with pytest.raises(ValidationError):
        TrainState.at(5, 8, {"step": 5, "samples": 40, "surprise": 1})
