"""Steps that train.py skips because their gradient norm is a spike."""

import math

import numpy as np

from distributed.gradients import MIN_HISTORY, NORM_HISTORY, is_spike


def judge(norms: list[float], limit: float | None) -> list[int]:
    """Return the steps that the loop would skip, given the gradient norm of each step."""
    history, skipped = [], []
    for step, norm in enumerate(norms):
        if not math.isfinite(norm) or is_spike(history, norm, limit):
            skipped.append(step)
        history = [*history, norm][-NORM_HISTORY:] if math.isfinite(norm) else history
    return skipped


def norms(count: int) -> list[float]:
    return np.random.default_rng(0).normal(2.0, 0.1, count).tolist()


def test_spike_is_detected_from_history_of_norms() -> None:
    values = norms(400)
    values[10] = 50.0  # too early: the history is too short
    values[80] = math.nan
    # The norm of step 200 makes the deviation so large that step 201 is no spike.
    values[200], values[201], values[390] = 9.0, 2.7, 4.0
    assert judge(values, 6.0) == [80, 200, 390]
    assert judge(values, None) == [80]
    assert [judge([*norms(count), 9.0], 6.0) for count in (MIN_HISTORY - 1, MIN_HISTORY)] == [[], [MIN_HISTORY]]


def test_a_lasting_change_of_the_norm_is_followed() -> None:
    assert len(judge(norms(128) + [20.0 + norm for norm in norms(200)], 4.0)) < 20


def test_the_limit_is_a_number_of_standard_deviations() -> None:
    history = norms(NORM_HISTORY)
    mean, deviation = np.mean(history), np.std(history)
    assert [is_spike(history, mean + times * deviation, 3.0) for times in (2.99, 3.01)] == [False, True]
    assert not is_spike([50.0, *history], mean + 2.99 * deviation, 3.0) and is_spike([50.0, *history], 2.5, 3.0)
