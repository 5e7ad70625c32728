"""The times of a start: their sum, the line, the curves, and the age of a process."""

import json
import subprocess
import sys
import time

import pytest

from training import start_times
from training.run_log import RunLog
from training.start_times import StartTimes, line, seconds_since_process_start


def test_every_second_is_in_one_phase_and_the_curves_add_up(tmp_path, ranks, monkeypatch, capsys) -> None:
    clock = iter([100.0, 100.5, 102.5, 103.0, 104.0, 111.0])
    monkeypatch.setattr(start_times.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(start_times, "seconds_since_process_start", lambda: 3.0)
    start = StartTimes()
    for phase in ("data", "model", "evaluations", "model"):
        start.lap(phase)
    monkeypatch.undo()
    log = RunLog(tmp_path, ranks, 4, {}, total_steps=9)
    monkeypatch.setattr(start_times.time, "perf_counter", lambda: next(clock))
    start.finish(5, log, ranks)
    monkeypatch.undo()
    start.lap("evaluations")  # no-op: it would find no time on the clock
    log.close()
    rows = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    phases = {"imports": 3.0, "data": 0.5, "model": 3.0, "evaluations": 0.5, "first_step": 7.0}
    assert rows == [{"step": 5} | {f"start/{name}": value for name, value in phases.items()} | {"start/total": 14.0}]
    said = "imports 3.0 s, data 0.5 s, model 3.0 s, evaluations 0.5 s, first step 7.0 s: 14.0 s after the process began"
    assert capsys.readouterr().out == f"start: {said}\n"
    assert not start.is_running


def test_the_slowest_rank_is_named_if_it_differs() -> None:
    assert line({"data": 2.0}, [2.0, 2.04]) == "start: data 2.0 s: 2.0 s after the process began"
    assert line({"data": 2.0}, [2.0, 2.5, 2.2]).endswith(" began (2.5 s on rank 1, the slowest)")


@pytest.mark.slow
def test_the_age_of_a_process_is_at_most_the_time_since_it_was_asked_for() -> None:
    program = "from training.start_times import seconds_since_process_start as age; print(age())"
    begin = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    waited = time.monotonic() - begin
    assert 0 < age <= waited + 0.02  # the kernel counts in hundredths
    if sys.platform == "linux":
        assert age > waited / 2  # the interpreter and torch are nearly all of it


@pytest.mark.parametrize("text", ["", "1 (python) R", f"1 (a) b) R {'9' * 30} " + "0 " * 30])
def test_without_a_start_time_of_the_kernel_processor_time_counts(monkeypatch, text) -> None:
    monkeypatch.setattr(start_times.Path, "read_text", lambda *_, **__: text)
    monkeypatch.setattr(start_times.time, "process_time", lambda: 7.5)
    monkeypatch.setattr(start_times.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(start_times.time, "clock_gettime", lambda clock: 5.0, raising=False)
    assert seconds_since_process_start() == 7.5
