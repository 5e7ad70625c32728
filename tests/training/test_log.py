"""Rows exactly once, in metrics.jsonl and in TensorBoard."""

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import UserError
from distributed.checkpoint import SaveTimes
from training.log import Log


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_tensorboard(run: Path) -> None:
    """TensorBoard shows exactly the values of metrics.jsonl, the losses in a group of their own."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    shown = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    expected: dict[str, list] = {}
    for row in rows(run):
        for name, value in row.items():
            if name != "step":
                tag = {"train/loss": "Loss/train", "validation/loss": "Loss/validation"}.get(name, name)
                expected.setdefault(tag, []).append((row["step"], value))
    assert {name: points for name, points in shown.items() if points} == expected


def write(run: Path, ranks, start_step: int, evaluated: dict[str, int], steps: dict[int, dict], *log_to) -> None:
    """A run that logs rows and evaluations; the keys are steps."""
    log = Log(run, ranks, *log_to).open(start_step, evaluated, total_steps=9)
    for step, row in steps.items():
        for figures in row if isinstance(row, tuple) else (row,):
            log.row(step, figures)
    log.sync()
    log.close()


def test_resume_drops_rows_of_lost_steps(tmp_path, ranks) -> None:
    write(tmp_path, ranks, 0, {}, {step: {"train/loss": float(step)} for step in (1, 2, 3)})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "train/lo\xc3')  # killed while writing a line
    write(tmp_path, ranks, 2, {}, {3: {"train/loss": 33.0}})
    assert rows(tmp_path) == [{"step": s, "train/loss": loss} for s, loss in ((1, 1.0), (2, 2.0), (3, 33.0))]
    check_tensorboard(tmp_path)


def test_full_disk_error_names_metrics_file(tmp_path, ranks) -> None:
    log = Log(tmp_path, ranks, ()).open(0, {}, total_steps=9)
    log.file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/metrics.jsonl'"):
        log.row(1, {"train/loss": 1.0})


def test_run_continues_without_a_terminal(tmp_path, ranks, monkeypatch) -> None:
    """The terminal was closed, or `tee` was killed: only files are left."""
    reader, writer = os.pipe()
    os.close(reader)
    log = Log(tmp_path, ranks, ()).open(0, {}, total_steps=9)
    with monkeypatch.context() as patch, suppress(BrokenPipeError), open(writer, "w", encoding="utf-8") as pipe:
        patch.setattr("sys.stdout", pipe)
        log.evaluation(1, 9, {"validation/loss": 1.0}, " (best)")
        log.row(2, {"train/loss": 2.0})
    log.close()
    assert rows(tmp_path) == [{"step": 1, "validation/loss": 1.0}, {"step": 2, "train/loss": 2.0}]


def test_run_continues_without_tensorboard(tmp_path, ranks, capfd) -> None:
    """Also after a save, which flushes; the thread of TensorBoard's writer prints no traceback."""
    log = Log(tmp_path, ranks).open(0, {}, total_steps=9)
    shutil.rmtree(tmp_path / "tensorboard")
    for step in range(1, 99):
        log.row(step, {"train/loss": 1.0, "validation/sample": "text"})
        log.sync()
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 99))
    said = capfd.readouterr()
    assert said.out.count("warning: the run goes on without tensorboard, which has failed (FileNotFoundError") == 1
    assert "Traceback" not in said.err


def test_fresh_start_removes_all_rows(tmp_path, ranks, capsys) -> None:
    write(tmp_path, ranks, 0, {}, {0: ({"validation/loss": 9.0}, {"model/size": 1.0}), 2: {"train/loss": 2.0}})
    assert "removed" not in capsys.readouterr().out
    (tmp_path / "tensorboard" / "notes.txt").write_text("mine")
    write(tmp_path, ranks, 0, {}, {0: {"validation/loss": 8.0}, 1: {"train/loss": 0.5}})
    assert "the rows of an earlier start, which left no checkpoint, are removed" in capsys.readouterr().out
    assert rows(tmp_path) == [{"step": 0, "validation/loss": 8.0}, {"step": 1, "train/loss": 0.5}]
    check_tensorboard(tmp_path)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2  # one event file, and files of others


def test_resume_keeps_only_recorded_evaluations(tmp_path, ranks) -> None:
    done = ({"train/loss": 4.0, "train/mfu": 0.5}, {"validation/loss": 3.0, "validation/loss/mix": 2.0})
    done += ({"forgetting/kl": 0.25}, {"save/seconds": 1.5})
    write(tmp_path, ranks, 0, {}, {2: ({"train/loss": 5.0}, {"validation/loss": 5.0}), 4: done, 6: {"train/loss": 1.0}})
    evaluated = {"forgetting": 4, "validation": 2}
    write(tmp_path, ranks, 4, evaluated, {4: {"validation/loss": 3.25}, 6: {"train/loss": 0.5}})
    assert rows(tmp_path) == [
        {"step": 2, "train/loss": 5.0},
        {"step": 2, "validation/loss": 5.0},
        {"step": 4, "train/loss": 4.0, "train/mfu": 0.5},
        {"step": 4, "forgetting/kl": 0.25},
        {"step": 4, "save/seconds": 1.5},
        {"step": 4, "validation/loss": 3.25},
        {"step": 6, "train/loss": 0.5},
    ]
    check_tensorboard(tmp_path)
    before = rows(tmp_path)
    write(tmp_path, ranks, 6, {}, {})  # nothing to drop
    assert rows(tmp_path) == before
    check_tensorboard(tmp_path)


def test_damaged_line_before_kept_row_is_refused(tmp_path, ranks) -> None:
    lines = ['{"step": 1}', "[1]", '{"step": 2}', "\0\0\0\0", '{"step": 3}', '{"other": 1}']
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(
        UserError, match=re.escape(f"{path}, line 2 is not a row of curves; restore the file, or choose another")
    ):
        Log(tmp_path, ranks).open(2, {}, 9)
    assert path.read_text().splitlines() == lines  # nothing is changed
    for text, kept in (("\n".join([lines[0], *lines[2:]]), 2), (lines[0], 1)):  # the last row has no line end
        path.write_text(text)
        write(tmp_path, ranks, kept, {}, {3: {"train/loss": 1.0}}, ())
        assert rows(tmp_path) == [*({"step": step + 1} for step in range(kept)), {"step": 3, "train/loss": 1.0}]


def test_sync_flushes_rows_and_events(tmp_path, ranks, monkeypatch) -> None:
    log = Log(tmp_path, ranks).open(0, {}, 9)
    log.row(1, {"train/loss": 1.0})
    flushed, fsync = {}, os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda d: flushed.update({os.readlink(f"/proc/self/fd/{d}"): os.fstat(d).st_size}) or fsync(d)
    )
    log.sync()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert flushed == {str(path): path.stat().st_size for path in (tmp_path / "metrics.jsonl", events)}
    assert rows(tmp_path) == [{"step": 1, "train/loss": 1.0}]
    check_tensorboard(tmp_path)  # before it is closed
    log.close()


def test_slow_save_gives_a_warning(tmp_path, ranks, monkeypatch, capsys) -> None:
    log = Log(tmp_path, ranks, ()).open(0, {}, 9)
    for grace in (None, 40.0, 41.5):
        monkeypatch.setattr("training.log.torchrun_grace", lambda grace=grace: grace)
        log.save(SaveTimes(7, 2.0, 41.0))
    log.close()
    sentence = "saved step 7 in 41.0 s; training waited 2.0 s"
    warning = f"warning: {sentence}: longer than the 40 s that torchrun grants after a signal; start torchrun with "
    assert capsys.readouterr().out.splitlines() == [sentence, f"{warning}--shutdown-timeout=62", sentence]
    assert rows(tmp_path) == [{"step": 7, "save/pause_seconds": 2.0, "save/total_seconds": 41.0}] * 3
