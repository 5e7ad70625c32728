"""Which steps are skipped as spikes of the gradient norm: as train.py judges them, also across a resume."""

import math

import numpy as np

from distributed.gradients import MIN_HISTORY, WINDOW, is_spike


def judge(history: list[float], norms: list[float], limit: float | None = 6.0) -> list[bool]:
    """Take a step with each norm, as the loop does. Returns whether it was skipped."""
    skipped = []
    for norm in norms:
        skipped.append(not math.isfinite(norm) or is_spike(history, norm, limit))
        history[:] = [*history, norm][-WINDOW:] if math.isfinite(norm) else history
    return skipped


def norms(count: int) -> list[float]:
    return np.random.default_rng(0).normal(2.0, 0.1, count).astype(np.float32).tolist()


def expected_spikes(values: list[float], sigma: float) -> list[bool]:
    spikes, history = [], []
    for value in values:
        window = history[-WINDOW:]
        spikes.append(len(window) >= MIN_HISTORY and value > np.mean(window) + sigma * np.std(window))
        history += [value] if math.isfinite(value) else []
    return [spike or not math.isfinite(value) for spike, value in zip(spikes, values, strict=True)]


def with_spikes() -> list[float]:
    values = norms(400)
    values[10] = 50.0  # too early: the history is too short
    values[80] = math.nan
    values[200], values[201], values[390] = 9.0, 2.7, 4.0
    return values


def test_a_spike_is_told_from_the_history_of_norms() -> None:
    values, history = with_spikes(), []
    skipped = judge(history, values)
    assert skipped == expected_spikes(values, 6.0)
    assert [i for i, skip in enumerate(skipped) if skip] == [80, 200, 390] and len(history) == WINDOW
    assert sum(judge([], values, limit=None)) == 1  # only the NaN


def test_a_lasting_change_of_the_norm_is_followed() -> None:
    history = []
    judge(history, norms(128), 4.0)
    assert sum(judge(history, [20.0 + n for n in norms(200)], 4.0)) < 20
