"""A profile of chosen steps, a snapshot where memory runs out, and a line about a slow rank, without a GPU."""

from pathlib import Path

import pytest
import torch

from common.errors import UserError
from distributed.process_group import Ranks
from training import observe
from training.observe import PATIENCE, Pace, Profile, memory_snapshot

CPU = Ranks(0, 1, 0, torch.device("cpu"), None)  # type: ignore[arg-type]
GPU = Ranks(3, 8, 3, torch.device("cuda", 3), None)  # type: ignore[arg-type]


def test_out_of_memory_error_names_the_snapshot(tmp_path, monkeypatch) -> None:
    recorded = []
    monkeypatch.setattr(observe, "record_memory_history", lambda *a, **options: recorded.append(options))
    monkeypatch.setattr(observe, "dump_snapshot", lambda path: Path(path).write_text("blocks"))

    def step() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(torch.OutOfMemoryError) as caught, memory_snapshot(tmp_path, GPU):
        step()
    snapshot = tmp_path / "memory_rank_3.pickle"
    assert snapshot.read_text() == "blocks" and str(caught.value).startswith("CUDA out of memory")
    assert caught.traceback[-1].name == "step"
    (note,) = caught.value.__notes__
    assert note.startswith(f"rank 3 has no memory left: {snapshot} has what filled it")
    assert "try a smaller batch.micro_batch, model.activation_checkpointing=full, more ranks or" in note
    assert recorded[0]["max_entries"] == 100_000 and recorded[-1] == {"enabled": None}  # on, and off again


def test_profile_outside_the_run_is_reported(tmp_path) -> None:
    with pytest.raises(UserError, match="run.profile=9:2: the run has only 8 steps; choose an earlier one"):
        Profile("9:2", 8, tmp_path, CPU, print)
    lines: list[str] = []
    profile = Profile("2:3", 8, tmp_path, CPU, lines.append)
    for step in (6, 7, 8):  # a resume
        profile.step(step)
    profile.close(8)
    assert lines == ["run.profile=2:3: this start had none of these steps"] and not list(tmp_path.iterdir())


class Stop:
    """A StopSignal of four ranks that tells injected times."""

    ranks = Ranks(0, 4, 0, torch.device("cpu"), None)  # type: ignore[arg-type]
    told = (0.0, 0.0)
    told_by_ranks = torch.zeros(4, 2)


def test_straggler_is_slow_in_total_and_per_token(monkeypatch) -> None:
    monkeypatch.setattr("training.observe.gather_objects", lambda value, ranks: ["a", "a", "b", "b"])
    stop, lines = Stop(), []
    pace = Pace([], stop, 0)  # type: ignore[arg-type]
    assert pace.row(1, lines.append) == {}  # no rank has told a time yet
    usual, dealt_more, slow = [1.0, 100.0], [2.0, 200.0], [1.8, 100.0]
    for step in range(2, 2 + 3 * PATIENCE):
        stop.told_by_ranks = torch.tensor([usual, dealt_more, usual, slow])
        row = pace.row(step, lines.append)
    assert row == {"time/slowest_rank_seconds": 2.0, "time/median_rank_seconds": 1.0}
    assert len(lines) == 1 and lines[0].startswith(
        "warning: rank 3 on host b takes 1.8 times as long as the median rank"
    )
    stop.told_by_ranks = torch.tensor([usual] * 4)
    pace.row(100, lines.append)
    stop.told_by_ranks = torch.tensor([usual, usual, usual, slow])
    for step in range(101, 101 + PATIENCE - 1):
        pace.row(step, lines.append)
    assert len(lines) == 1  # slow again, but not for long enough
