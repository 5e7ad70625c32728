"""The curves of a window of steps: speed without pauses, losses by source, and MFU."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.batches import StepBatch
from data.dealing import Deal
from model.flops import Work
from model.loss import LossSums
from training import log as room
from training.log import Meter

CPU = torch.device("cpu")
WORK = Work(per_token=100.0, per_target=0.0, per_pair=0.0, windows=())
ONE_SOURCE = SimpleNamespace(sources=["main"], names=["main"], anchored=())


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(room.time, "perf_counter", lambda: clock.now)
    return clock


def state(targets: list[int], tokens: int) -> dict:
    return {"targets": targets, "tokens": tokens, "skipped_steps": 0}


def step(
    lengths: tuple[int, ...], targets: tuple[int, ...], losses: list[float], costs: tuple = ((1,),)
) -> tuple[StepBatch, Deal, LossSums]:
    sums = LossSums(len(targets), CPU)
    sums.values.copy_(torch.tensor(losses))
    batch = StepBatch(tuple(range(len(lengths))), sum(targets), targets, lengths)
    return batch, Deal((), np.array(costs)), sums


def test_speed_excludes_pauses(clock) -> None:
    meter = Meter(ONE_SOURCE, WORK, peak_flops=20_000.0, device=CPU)
    for _ in range(2):
        with meter.paused():
            clock.now += 50.0
        clock.now += 2.0
        meter.add(*step((60, 40), (10,), [5.0]))
    row = meter.row(state([20], 200), epoch=0.5)
    assert row["train/tokens_per_second"] == 200 / 4.0
    assert row["train/mfu"] == pytest.approx(200 * 100.0 / 4.0 / 20_000.0) == 0.25
    assert row["train/epoch"] == 0.5 and row["train/tokens"] == 200
    assert meter.seconds_per_step == 2.0
    row |= {"train/loss": 0.5, "train/grad_norm": 1.0, "train/learning_rate": 1e-4}
    line = meter.line(row, 2, 32, was_skipped=False, is_finite=True)
    assert "| 50 tok/s | MFU 25.0% |" in line and line.endswith("ETA 1.0 min")
    clock.now += 1.0  # the next row covers only the steps after the last one, and weighs them by their time
    meter.add(*step((10,), (1,), [1.0], ((9, 1), (4, 4))))  # two micro-batches on two ranks: 9 of 13 busy
    meter.add(*step((10,), (1,), [1.0], ((27, 27),)))
    row = meter.row(state([22], 220), epoch=0.6)
    assert row["train/tokens_per_second"] == 20.0
    assert row["train/balance"] == pytest.approx((9 + 27) / (9 + 4 + 27)) == 0.9


def test_utilization_above_the_peak_is_shown(clock) -> None:
    meter = Meter(ONE_SOURCE, WORK, peak_flops=1e12, device=CPU)
    lines, curves = [], []
    for number, seconds in enumerate((2.0, 0.5, 1.0, 0.25, 0.5), 1):  # reaches 0.5, 2, 1, 4 and 2 TFLOP/s
        clock.now += seconds
        meter.add(*step((10**10,), (10,), [5.0]))
        row = meter.row(state([10], 100), epoch=0.1)
        curves.append(row["train/mfu"])
        row |= {"train/loss": math.nan, "train/grad_norm": 1.0, "train/learning_rate": 1e-4}
        lines.append(meter.line(row, number, 5, was_skipped=True, is_finite=number < 3))
    assert curves == [0.5, 2.0, 1.0, 4.0, 2.0]
    assert "| MFU 50.0% |" in lines[0] and "| MFU 200.0% |" in lines[1] and "| MFU 400.0% |" in lines[3]
    assert lines[0].endswith("SKIPPED, a spike of the gradient norm (0 so far)")
    assert lines[2].endswith("SKIPPED, not finite (0 so far)")
