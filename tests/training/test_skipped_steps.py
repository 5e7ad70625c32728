"""Which steps are skipped, how they are counted, and spikes of the gradient norm, also across a resume."""

import json
import math
from types import SimpleNamespace

import numpy as np

from training.progress import Progress
from training.skipped_steps import MIN_HISTORY, WINDOW, is_spike

BATCH = SimpleNamespace(document_lengths=(3,), targets_by_source=(1,))


def judge(progress: Progress, norms: list[float], limit: float | None = 6.0) -> list[bool]:
    """Take a step with each norm, as the loop does. Returns whether it was skipped."""
    skipped = []
    for norm in norms:
        is_finite = math.isfinite(norm)
        skipped.append(not is_finite or is_spike(progress.norms, norm, limit))
        progress.finish_step(BATCH, norm, is_finite, skipped[-1])
    return skipped


def test_steps_that_are_not_finite_are_counted_in_a_row() -> None:
    progress = Progress({}, {}, [0])
    assert judge(progress, [math.nan, math.inf, 1.0, math.nan, math.nan]) == [True, True, False, True, True]
    assert (progress.updates, progress.skipped_steps, progress.bad_steps_in_a_row) == (1, 4, 2)
    assert judge(progress, [1.0]) == [False] and progress.bad_steps_in_a_row == 0 and progress.step == 6


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
    values, progress = with_spikes(), Progress({}, {}, [0])
    skipped = judge(progress, values)
    assert skipped == expected_spikes(values, 6.0)
    assert [i for i, skip in enumerate(skipped) if skip] == [80, 200, 390]
    # A spike is not a bad step: only the NaN counts for the five in a row, and it was long ago.
    assert (progress.skipped_steps, progress.bad_steps_in_a_row, len(progress.norms)) == (3, 0, WINDOW)
    assert sum(judge(Progress({}, {}, [0]), values, limit=None)) == 1  # only the NaN


def test_a_lasting_change_of_the_norm_is_followed() -> None:
    progress = Progress({}, {}, [0])
    judge(progress, norms(128), 4.0)
    assert sum(judge(progress, [20.0 + n for n in norms(200)], 4.0)) < 20


def test_spikes_are_the_same_after_a_resume_at_any_step() -> None:
    values = with_spikes()
    straight = judge(Progress({}, {}, [0]), values)
    for stop in (0, 5, 63, 64, 100, 200, 389):
        progress = Progress({}, {}, [0])
        first = judge(progress, values[:stop])
        resumed = Progress(**json.loads(json.dumps(progress.as_json())))
        assert first + judge(resumed, values[stop:]) == straight
