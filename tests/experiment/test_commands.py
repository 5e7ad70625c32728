"""An experiment is a list of commands: what is done is not run again, and what waits is run when its file is there."""

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from common.errors import UserError
from experiment import commands
from experiment.commands import (
    Command,
    check_options,
    chosen_of,
    list_commands,
    owned,
    parse_until,
    run_commands,
    tuned_grid,
)
from experiment.launch import Ended


@pytest.fixture
def started(monkeypatch):
    """The names of all jobs that were started. A job writes the file that its option names, as a script would."""
    names = []

    def run_jobs(jobs, parallel, on_end):
        for job in jobs:
            names.append(job.log.stem)
            fails = job.options[0] in ("fails", "diverges")
            job.log.parent.mkdir(exist_ok=True)
            words = "the loss was not finite in 5 steps" if job.options[0] == "diverges" else "no memory"
            job.log.write_text(f"\n$ {job.script}\nerror: {words}\n")
            if not fails:
                Path(job.options[0]).write_text("done")
            on_end(Ended(job, int(fails), stopped=False, seconds=2.0))

    monkeypatch.setattr(commands, "run_jobs", run_jobs)
    return names


def command(folder, name, *needs, frees=(), options=None):
    output = folder / name
    options = options or (str(output),)
    return Command(name, "a kind", "train.py", options, output, tuple(folder / need for need in needs), frees)


def test_commands_run_in_order_once_and_free_what_nobody_needs(tmp_path, started):
    (tmp_path / "weights").mkdir()
    (tmp_path / "file").write_text("x")
    frees = (tmp_path / "weights", tmp_path / "file")
    listed = [command(tmp_path, "second", "first", frees=frees), command(tmp_path, "first"), command(tmp_path, "third")]
    run_commands(lambda: listed, tmp_path)
    assert started == ["first", "second", "third"]
    assert not any(path.exists() for path in frees)
    run_commands(lambda: listed, tmp_path)
    assert len(started) == 3  # nothing is left
    lines = list_commands([*listed, command(tmp_path, "fourth")], tmp_path, 1).splitlines()
    states = [line.partition(":")[0] for line in lines[:4]]
    assert states == ["done  second", "done  first", "done  third", "to do fourth"]
    assert lines[3] == f"to do fourth: train.py {tmp_path / 'fourth'}"
    assert lines[4].startswith("left: about 2")  # the mean of its kind


def test_a_list_may_grow_by_what_is_found(tmp_path, started):
    first = command(tmp_path, "first")
    run_commands(lambda: [first, command(tmp_path, "chosen")] if first.is_done else [first], tmp_path)
    assert started == ["first", "chosen"]


def test_what_runs_is_waited_for_and_its_file_does_not_count_before_it_has_ended(tmp_path, monkeypatch):
    seen = []

    def run_jobs(jobs, parallel, on_end):
        first = next(jobs)
        Path(first.options[0]).write_text("is being written")
        second = next(jobs)  # needs nothing
        seen.extend([first.log.stem, second.log.stem, next(jobs)])  # the third needs the first
        on_end(Ended(first, 0, stopped=False, seconds=2.0))
        third = next(jobs)
        seen.append(third.log.stem)
        for job in (second, third):
            Path(job.options[0]).write_text("done")
            on_end(Ended(job, 0, stopped=False, seconds=2.0))
        assert next(jobs, "nothing") == "nothing"

    monkeypatch.setattr(commands, "run_jobs", run_jobs)
    listed = [command(tmp_path, "first"), command(tmp_path, "third", "first"), command(tmp_path, "second")]
    run_commands(lambda: listed, tmp_path, parallel=2)
    assert seen == ["first", "second", None, "third"]


def test_what_fails_or_waits_for_nothing_is_one_sentence(tmp_path, started):
    fails = command(tmp_path, "never", options=("fails",))
    with pytest.raises(UserError, match="never failed: no memory; its log is"):
        run_commands(lambda: [fails, command(tmp_path, "next")], tmp_path)
    assert started == ["never"]  # nothing is started after a failure
    with pytest.raises(UserError, match="waits needs .*nothing, which no command writes"):
        run_commands(lambda: [command(tmp_path, "waits", "nothing")], tmp_path)
    with owned(tmp_path), pytest.raises(UserError, match="another process is running in"):
        run_commands(lambda: [], tmp_path)


def test_a_training_that_diverges_is_a_result_only_where_the_list_says_so(tmp_path, started):
    one = command(tmp_path, "run", options=("diverges",))
    with pytest.raises(UserError, match="run failed: the loss was not finite in 5 steps"):
        run_commands(lambda: [one], tmp_path)
    tried = Command(**vars(one) | {"diverged": tmp_path / "folder" / "diverged.txt"})
    run_commands(lambda: [tried], tmp_path)
    assert tried.is_done and tried.diverged.read_text() == "the loss was not finite in 5 steps\n"


def test_what_was_done_with_other_options_is_refused(tmp_path, started):
    run_commands(lambda: [command(tmp_path, "run")], tmp_path)
    other = command(tmp_path, "run", options=(str(tmp_path / "run"), "optimizer.epochs=2"))
    with pytest.raises(UserError, match=r"run was done with fewer options, now it is optimizer.epochs=2; remove"):
        check_options([other], tmp_path)


def test_nothing_is_started_after_the_time_that_was_named(tmp_path, started, capsys):
    run_commands(lambda: [command(tmp_path, "run")], tmp_path, until=datetime.now() - timedelta(seconds=1))
    assert not started and "no other command is started; start again to continue" in capsys.readouterr().out
    now = datetime.now()
    late, early = (parse_until(f"{now + timedelta(minutes=sign * 90):%H:%M}") for sign in (1, -1))
    assert timedelta(minutes=88) < late - now < timedelta(minutes=91)
    assert timedelta(hours=22) < early - now < timedelta(hours=23)  # tomorrow
    with pytest.raises(UserError, match="--until noon: write the time as HH:MM"):
        parse_until("noon")


def test_a_grid_grows_until_its_best_value_is_inside():
    assert tuned_grid((1.0, 2.0, 4.0), lambda value: -abs(value - 2), 3) == [1.0, 2.0, 4.0]
    assert tuned_grid((1.0, 2.0, 4.0), lambda value: -abs(value - 0.5), 3) == [0.25, 0.5, 1.0, 2.0, 4.0]
    assert tuned_grid((1.0, 2.0), lambda value: -abs(value - 7), 3) == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert tuned_grid((1.0, 2.0), lambda value: value, 2) == [1.0, 2.0, 4.0, 8.0]  # no more than two
    assert tuned_grid((1.0, 2.0), lambda value: 0.0, 2) == [0.25, 0.5, 1.0, 2.0]  # where all are equal, too
    known = {1.0: 0.1, 2.0: 0.3}
    assert tuned_grid((1.0, 2.0), known.get, 3) == [1.0, 2.0, 4.0]  # 4 is to be tried next
    assert chosen_of([1.0, 2.0, 4.0], known.get) is None
    assert chosen_of([1.0, 2.0], known.get) == 2.0
