"""Detection of bad steps, and of too many of them."""

import math

import pytest

from megatron_bipe.config import HealthConfig
from megatron_bipe.train.rollback import AnomalyDetector, Reading

CALM = [3.0 + 0.01 * (-1) ** number for number in range(10)]


def _readings(losses, first=1, norm=1.0):
    return [Reading(step, (step, step + 1), loss, norm) for step, loss in enumerate(losses, first)]


def _health(**fields):
    return AnomalyDetector(HealthConfig(**({"patience": 2, "spike_window": 10} | fields)))


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_anomaly_detector_non_finite_values_are_bad(loss, norm):
    detector = _health()
    bad = detector.check_steps(_readings([loss], norm=norm))
    assert [step.reading.step for step in bad] == [1] and "nothing was updated" in bad[0].reason
    assert detector.good_losses == [] and not detector.needs_rollback


def test_anomaly_detector_reports_consecutive_bad_steps_only():
    detector = _health()
    detector.check_steps(_readings([math.nan, 3.0, math.nan]))
    assert not detector.needs_rollback and [step.reading.step for step in detector.bad_steps] == [3]
    detector.check_steps(_readings([math.nan, 3.0], first=4))
    assert detector.needs_rollback and [step.reading.step for step in detector.bad_steps] == [
        3,
        4,
    ]  # step 5 was not checked


def test_anomaly_detector_spike_depends_on_the_deviations_of_the_window():
    detector = _health(spike_deviations=5.0)
    assert detector.check_steps(_readings(CALM)) == []
    assert detector.check_steps(_readings([3.05], first=11)) == []  # 4.7 deviations
    bad = detector.check_steps(_readings([3.5], first=12))
    assert "standard deviations above" in bad[0].reason
    assert 3.5 not in detector.good_losses and len(detector.good_losses) == 10


def test_anomaly_detector_falling_loss_is_not_a_spike():
    detector = _health(spike_deviations=2.0)
    detector.check_steps(_readings(CALM))
    assert detector.check_steps(_readings([2.0], first=11)) == []


def test_anomaly_detector_reports_no_spike_before_its_window_is_full():
    detector = _health(spike_deviations=2.0)
    detector.check_steps(_readings(CALM[:9]))
    assert detector.check_steps(_readings([50.0], first=10)) == []


def test_anomaly_detector_spikes_can_be_disabled():
    detector = _health(spike_deviations=0.0)
    detector.check_steps(_readings(CALM))
    assert detector.check_steps(_readings([50.0], first=11)) == []


def test_anomaly_detector_small_change_after_constant_losses_is_not_a_spike():
    detector = _health(spike_deviations=8.0)
    detector.check_steps(_readings([3.0] * 10))
    assert detector.check_steps(_readings([3.01], first=11)) == []
