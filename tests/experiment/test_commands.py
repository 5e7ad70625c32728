"""An experiment is a list of commands: what is done is not run again, and what waits is run when its file is there."""

from pathlib import Path

import pytest

from common.errors import UserError
from experiment import commands
from experiment.commands import Command, list_commands, run_commands
from experiment.launch import Ended


@pytest.fixture
def started(monkeypatch):
    """The names of all jobs that were started. A job writes the file that its option names, as a script would."""
    names = []

    def run_jobs(jobs, parallel, on_end):
        for job in jobs:
            names.append(job.log.stem)
            if job.options != ("fails",):
                Path(job.options[0]).write_text("done")
            on_end(Ended(job, int(job.options == ("fails",)), stopped=False, seconds=2.0))

    monkeypatch.setattr(commands, "run_jobs", run_jobs)
    return names


def command(folder, name, *needs, frees=()):
    output = folder / name
    return Command(name, "a kind", "train.py", (str(output),), output, tuple(folder / need for need in needs), frees)


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
    assert lines[:4] == ["done  second", "done  first", "done  third", "to do fourth"]
    assert lines[4].startswith("left: about 2")  # the mean of its kind


def test_a_list_may_grow_by_what_is_found(tmp_path, started):
    first = command(tmp_path, "first")
    run_commands(lambda: [first, command(tmp_path, "chosen")] if first.is_done else [first], tmp_path)
    assert started == ["first", "chosen"]


def test_what_fails_or_waits_for_nothing_is_one_sentence(tmp_path, started):
    fails = Command("fails", "a kind", "train.py", ("fails",), tmp_path / "never")
    with pytest.raises(UserError, match="fails failed: .*its log is"):
        run_commands(lambda: [fails], tmp_path)
    with pytest.raises(UserError, match="waits needs .*nothing, which no command writes"):
        run_commands(lambda: [command(tmp_path, "waits", "nothing")], tmp_path)
