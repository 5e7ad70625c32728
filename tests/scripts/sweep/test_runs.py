"""The trainings of a sweep run in order and once; failures and divergence end in one sentence."""

from pathlib import Path

import pytest

from common.errors import UserError
from scripts.sweep import runs
from scripts.sweep.runs import Training, list_trainings, owned, run_trainings


class Ended:
    """A process that has ended, with the part of subprocess.Popen that the sweep uses."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code


@pytest.fixture
def started(monkeypatch):
    """The names of all started trainings. Each writes its export.json, unless its option is a word for a failure."""
    names = []
    errors = {"fails": "no memory", "diverges": "the loss was not finite in 5 steps"}

    def start(script, options, log, processes, slot, parallel):
        names.append(log.stem)
        log.parent.mkdir(exist_ok=True)
        log.write_text(f"\n$ {script}\nerror: {errors.get(options[0], '')}\n")
        if options[0] in errors:
            return Ended(1)
        Path(options[0]).parent.mkdir(parents=True, exist_ok=True)
        Path(options[0]).write_text("{}")
        return Ended(0)

    monkeypatch.setattr(runs, "start", start)
    return names


def training(folder, name, option=None, keeps_checkpoints=True):
    directory = folder / name
    options = (option or str(directory / "export" / "export.json"),)
    return Training(name, options, directory, keeps_checkpoints=keeps_checkpoints)


def test_trainings_run_in_order_and_once(tmp_path, started):
    listed = [training(tmp_path, "second"), training(tmp_path, "first", keeps_checkpoints=False)]
    for name in ("first", "second"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    run_trainings(listed, tmp_path)
    assert started == ["second", "first"]
    kept = [name for name in ("first", "second") if (tmp_path / name / "checkpoints").exists()]
    assert kept == ["second"]
    run_trainings(listed, tmp_path)
    assert len(started) == 2  # nothing is left
    lines = list_trainings([*listed, training(tmp_path, "third")]).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["done  second", "done  first", "to do third"]
    assert lines[2] == f"to do third: train.py {tmp_path / 'third' / 'export' / 'export.json'}"


def test_a_failure_ends_the_sweep(tmp_path, started):
    with pytest.raises(UserError, match="never failed: no memory; its log is"):
        run_trainings([training(tmp_path, "never", "fails"), training(tmp_path, "next")], tmp_path)
    assert started == ["never"]  # nothing is started after a failure
    with owned(tmp_path), pytest.raises(UserError, match="another process is running in"):
        run_trainings([], tmp_path)


def test_a_diverged_training_is_a_result(tmp_path, started):
    diverges = training(tmp_path, "run", "diverges")
    run_trainings([diverges, training(tmp_path, "next")], tmp_path)
    assert diverges.is_done and diverges.diverged.read_text() == "the loss was not finite in 5 steps\n"
    assert started == ["run", "next"]
