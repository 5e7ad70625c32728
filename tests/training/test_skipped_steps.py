"""Which steps are skipped, how they are counted, and spikes of the gradient norm, also across a resume."""

import json
import math

import numpy as np
import torch

from training.progress import Progress
from training.skipped_steps import MIN_HISTORY, WINDOW, SkippedSteps

CPU = torch.device("cpu")


def judge(steps: SkippedSteps, norms: list[float], loss: float = 1.0) -> list[bool]:
    return [bool(steps.judge(torch.tensor(loss), torch.tensor(norm))) for norm in norms]


def test_bad_steps_in_a_row_are_seen_even_if_good_ones_follow_before_the_next_look() -> None:
    progress = Progress({}, {}, [0])
    steps = SkippedSteps(progress, limit=3, spikes=None, device=CPU)
    assert judge(steps, [math.nan, math.inf, 1.0, math.nan, math.nan]) == [True, True, False, True, True]
    assert not steps.update(progress)
    assert (progress.updates, progress.skipped_steps, progress.bad_steps_in_a_row) == (1, 4, 2)
    assert judge(steps, [1.0], loss=math.nan) == [True] and judge(steps, [1.0]) == [False]
    assert steps.update(progress) and progress.skipped_steps == 5 and progress.updates == 2


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
    values, steps = with_spikes(), SkippedSteps(Progress({}, {}, [0]), 5, 6.0, CPU)
    skipped = judge(steps, values)
    assert skipped == expected_spikes(values, 6.0)
    assert [i for i, skip in enumerate(skipped) if skip] == [80, 200, 390]
    progress = Progress({}, {}, [0])
    assert not steps.update(progress)
    # A spike is not a bad step: only the NaN counts for the five in a row, and it was long ago.
    assert (progress.skipped_steps, progress.bad_steps_in_a_row, len(progress.norms)) == (3, 0, WINDOW)


def test_a_lasting_change_of_the_norm_is_followed() -> None:
    steps = SkippedSteps(Progress({}, {}, [0]), 5, 4.0, CPU)
    judge(steps, norms(128))
    assert sum(judge(steps, [20.0 + n for n in norms(200)])) < 20


def test_spikes_are_the_same_after_a_resume_at_any_step() -> None:
    values = with_spikes()
    straight = judge(SkippedSteps(Progress({}, {}, [0]), 5, 6.0, CPU), values)
    for stop in (0, 5, 63, 64, 100, 200, 389):
        progress = Progress({}, {}, [0])
        steps = SkippedSteps(progress, 5, 6.0, CPU)
        first = judge(steps, values[:stop])
        steps.update(progress)
        resumed = Progress(**json.loads(json.dumps(progress.as_json())))
        assert first + judge(SkippedSteps(resumed, 5, 6.0, CPU), values[stop:]) == straight
