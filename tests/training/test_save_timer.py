"""A save by time is due by rank 0's clock, on all ranks."""

from dataclasses import replace

from training import save_timer
from training.save_timer import SaveTimer


def test_a_save_is_due_so_many_minutes_after_the_last_one_and_never_with_0(ranks, monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(save_timer.time, "monotonic", lambda: now[0])
    timer, never = SaveTimer(0.5, ranks), SaveTimer(0, ranks)
    due = []
    for now[0] in (100.0, 129.0, 130.0, 170.0, 199.0, 200.0):
        due.append(timer.is_due())
        if now[0] == 170.0:
            timer.restart()
    assert due == [False, False, True, True, False, True]
    assert not never.is_due()


def test_the_clock_of_another_rank_decides_nothing_but_it_takes_part(ranks, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(save_timer, "agree_any", lambda flag, ranks: asked.append(flag) or True)
    timer = SaveTimer(1e-9, replace(ranks, rank=1))
    assert timer.is_due() and asked == [False]
    assert not SaveTimer(0, ranks).is_due() and asked == [False]  # no collective
