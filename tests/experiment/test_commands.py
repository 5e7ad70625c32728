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
    keep,
    list_commands,
    owned,
    parse_until,
    restore,
    run_commands,
    tuned_grid,
)
from tests.forked_jobs import Ended


@pytest.fixture
def started(monkeypatch):
    """The names of all commands that were started. Each writes the file that its option names, as a script would."""
    names = []

    def start(script, options, log, processes, slot, parallel):
        names.append(log.stem)
        fails = options[0] in ("fails", "diverges")
        log.parent.mkdir(exist_ok=True)
        words = "the loss was not finite in 5 steps" if options[0] == "diverges" else "no memory"
        log.write_text(f"\n$ {script}\nerror: {words}\n")
        if not fails:
            Path(options[0]).parent.mkdir(exist_ok=True)
            Path(options[0]).write_text("done")
        return Ended(int(fails))

    monkeypatch.setattr(commands, "start", start)
    return names


def command(folder, name, *needs, frees=(), options=None, results=()):
    output = folder / name
    options = options or (str(output),)
    needs, results = (tuple(folder / one for one in some) for some in (needs, results))
    return Command(name, "a kind", "train.py", options, output, needs, frees, results=results)


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
    assert lines[4] == "left: about 0 s"  # the mean of its kind


def test_a_list_may_grow_by_what_is_found(tmp_path, started):
    first = command(tmp_path, "first")
    run_commands(lambda: [first, command(tmp_path, "chosen")] if first.is_done else [first], tmp_path)
    assert started == ["first", "chosen"]


def test_what_runs_is_waited_for_and_its_file_does_not_count_before_it_has_ended(tmp_path, monkeypatch):
    order, running = [], {}

    class Runs:
        def __init__(self, name):
            self.name, self.looks = name, 0
            running[name] = self

        def poll(self):
            self.looks += 1
            return 0 if self.looks > (3 if self.name == "first" else 0) else None

    def start(script, options, log, *more):
        order.append((log.stem, [name for name, one in running.items() if one.looks <= 3]))
        Path(options[0]).write_text("is being written")
        return Runs(log.stem)

    monkeypatch.setattr(commands, "start", start)
    monkeypatch.setattr(commands, "POLL", 0.0)
    listed = [command(tmp_path, "first"), command(tmp_path, "third", "first"), command(tmp_path, "second")]
    run_commands(lambda: listed, tmp_path, parallel=2)
    assert [name for name, _ in order] == ["first", "second", "third"] and "first" in order[1][1]
    assert "first" not in order[2][1]  # which needs it


def test_what_is_kept_goes_on_elsewhere_with_what_is_left(tmp_path, started):
    """Of two trainings with two scores each, one is scored: its weights are not made again, and those of the other are."""

    def listed(folder):
        found = [command(folder, "pool")]
        for seed in (0, 1):
            found.append(command(folder, f"train{seed}", "pool"))
            needs = (f"train{seed}",)
            found += [command(folder, f"score{seed}{one}", *needs, results=(f"score{seed}{one}",)) for one in "ab"]
        return found

    here, there, kept = (tmp_path / name for name in ("here", "there", "kept"))
    here.mkdir()
    run_commands(lambda: listed(here)[:5], here, on_change=lambda: keep(listed(here), here, kept))
    assert started == ["pool", "train0", "score0a", "score0b", "train1"]
    assert sorted(path.name for path in kept.iterdir()) == ["score0a", "score0b", "times.jsonl"]
    started.clear()
    for _ in range(2):  # also where all is there
        restore(kept, there)
        check_options(listed(here), there)
    lines = list_commands(listed(there), there, 1).splitlines()
    assert [line.split()[1].strip(":") for line in lines if line.startswith("done")] == ["train0", "score0a", "score0b"]
    run_commands(lambda: listed(there), there, on_change=lambda: keep(listed(there), there, kept))
    assert started == ["pool", "train1", "score1a", "score1b"]
    assert len((kept / "times.jsonl").read_text().splitlines()) == 9  # of both machines
    run_commands(lambda: listed(there), there)
    assert len(started) == 4
    (here / "pool").unlink()
    run_commands(lambda: listed(here)[:4], here)
    assert len(started) == 4  # nobody needs it


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
