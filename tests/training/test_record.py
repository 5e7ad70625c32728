"""The record of a run: breaks of its chain, traces of a kill, and the entries that count after a start from an earlier step."""

import hashlib
import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from common.errors import UserError
from common.sha256 import sha256
from data.batches import StepBatch
from data.sources import Corpus
from distributed.checkpoint_directory import write_manifest
from training.checkpointer import Record, RunRecord, not_given_up, plan_after


def written(directory: Path) -> list[bytes]:
    record = Record(directory)
    head = [record.append("checkpoint", step=step, manifest=f"{step}" * 64) for step in range(1, 5)][-1]
    lines = record.path.read_bytes().splitlines()
    assert head == record.head() == hashlib.sha256(lines[-1]).hexdigest()
    second = json.loads(lines[1])
    assert (second["previous"], second["entry"]) == (hashlib.sha256(lines[0]).hexdigest(), 2)
    return lines


BROKEN = {
    "a changed byte": lambda a, b, c, d: [a.replace(b'"time": "2', b'"time": "3'), b, c, d],
    "one dropped": lambda a, b, c, d: [a, c, d],
    "the first dropped": lambda a, b, c, d: [b, c, d],
    "one twice": lambda a, b, c, d: [a, b, b, c, d],
    "two swapped": lambda a, b, c, d: [a, c, b, d],
    "one inserted": lambda a, b, c, d: [a, b, b"{}", c, d],
    "a cut line": lambda a, b, c, d: [a, b, c[:-1], d],
}


@pytest.mark.parametrize("change", BROKEN)
def test_a_broken_chain_is_one_sentence(change, tmp_path) -> None:
    lines = written(tmp_path)
    (tmp_path / "record.jsonl").write_bytes(b"\n".join(BROKEN[change](*lines)) + b"\n")
    with pytest.raises(UserError, match="record.jsonl(: entry . in line . does not follow|, line . is not an entry)"):
        Record(tmp_path).read()


def test_record_of_another_format_is_refused(tmp_path) -> None:
    record = Record(tmp_path)
    record.append("start", step=0)
    record.path.write_text(record.path.read_text().replace('"format": 1', '"format": 0'))
    with pytest.raises(UserError, match="record.jsonl has format 0, and this version of the code reads format 1"):
        record.read()


def test_kill_inside_a_line_loses_only_it(tmp_path) -> None:
    written(tmp_path)
    record = Record(tmp_path)
    before = record.read()
    with record.path.open("ab") as file:
        file.write(b'{"entry": 5, "prev')
    assert record.torn() and record.read() == before
    record.append("stop", step=4)
    assert not record.torn() and [entry.kind for entry in record.read()][3:] == ["checkpoint", "stop"]
    record.path.write_bytes(b'{"entr')  # in the first line
    assert record.read() == []
    record.append("start", step=0)
    assert len(record.read()) == 1


def test_start_from_earlier_step_drops_later_entries(tmp_path) -> None:
    record = Record(tmp_path)
    for entry in ("start 0", "checkpoint 2", "checkpoint 4", "start 2", "checkpoint 3", "stop 3"):
        record.append(entry.split()[0], step=int(entry.split()[1]))
    assert [entry.number for entry in not_given_up(record.read())] == [1, 2, 4, 5, 6]


def test_plan_hash_covers_history_sources_and_documents() -> None:
    known = ("", 1, ["a"], (1, 2))
    changed = [("before", *known[1:]), ("", 2, ["a"], (1, 2)), ("", 1, ["b"], (1, 2)), ("", 1, ["a"], (2, 1))]
    assert len({plan_after(*arguments) for arguments in (known, *changed)}) == 5


def test_prepared_files_are_compared_at_each_start(tmp_path, ranks, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # digests are remembered in artifacts
    run = tmp_path / "run"
    for name in ("anchor/rows", "anchor/documents.npy", "ewc/fisher-1"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)

    def started() -> RunRecord:
        record = RunRecord(run, Corpus(()), ranks)
        assert record.continue_from(0, None, bytes) == []
        record.start(b"")
        for folder in ("anchor", "ewc"):
            record.add_prepared(folder)
        return record

    record = started()
    assert started().read()[-1].kind == "start"  # nothing new
    prepared = [entry.content for entry in record.read() if entry.kind == "prepared"]
    assert [(content["folder"], sorted(content["files"])) for content in prepared] == [
        ("anchor", ["documents.npy", "rows"]),
        ("ewc", ["fisher-1"]),
    ]
    for name in ("anchor/documents.npy", "ewc/more"):
        (run / name).write_text("changed")
        with pytest.raises(UserError, match=f"run/{name} is not what record.jsonl says; remove .*, and the base makes"):
            started()
        (run / name).unlink()
    (run / "anchor" / "rows").unlink()  # it was removed, and is made again
    record = RunRecord(run, Corpus(()), ranks)
    record.continue_from(0, None, bytes)
    (run / "anchor" / "rows").write_text("made again, with more steps")
    record.add_prepared("anchor")
    assert [entry.content.get("folder") for entry in record.read()].count("anchor") == 2


def test_missing_checkpoint_gives_a_warning(tmp_path, ranks) -> None:
    """Otherwise the run would silently train the steps after an older one, or all of them, again."""
    folder, record = tmp_path / "checkpoints", RunRecord(tmp_path, Corpus(()), ranks)
    record.start(b"")
    for step in (1, 2, 3):
        record.append("checkpoint", step=step, manifest="")
        (folder / f"step-00000{step}").mkdir(parents=True)
    record.append("pruning", removed=["step-000001"])
    (folder / "step-000001").rmdir()
    assert record.continue_from(0, None, bytes) == []
    for name in ("step-000003", "step-000002"):
        (folder / name).rmdir()
        (line,) = record.continue_from(0, None, bytes)
        assert line.startswith(f"warning: {folder}/step-000003, which record.jsonl names, is not there: its steps")
    record.append("start", step=0)  # a new start from the base gives up the later steps
    assert record.continue_from(0, None, bytes) == []


def test_unreadable_curves_are_one_sentence(tmp_path, ranks, monkeypatch) -> None:
    record = RunRecord(tmp_path, Corpus(()), ranks)
    (tmp_path / "metrics.jsonl").write_text("")

    def fails(*arguments: object) -> None:
        raise OSError(5, "Input/output error", "metrics.jsonl")

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(UserError, match="metrics.jsonl: Input/output error"):
        record.so_far()  # before the collectives of a save


def test_rows_are_durable_before_their_entry(tmp_path, ranks, monkeypatch) -> None:
    synced = []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    RunRecord(tmp_path, Corpus(()), ranks).add("stop", why="finished")
    assert synced[:2] == ["metrics.jsonl", "record.jsonl"]


def test_resume_verifies_checkpoint_rows_and_plan(tmp_path, ranks, monkeypatch) -> None:
    rows, batch = b'{"step": 1}\n{"step": 2}\n', StepBatch((1, 2), 3, (3,), (4,))
    record = RunRecord(tmp_path, Corpus(()), ranks)
    record.start(b"")
    (tmp_path / "metrics.jsonl").write_bytes(rows)
    for step in (1, 2):
        record.add_step(step, batch)
    record.append("checkpoint", manifest="a" * 64, tensors="", **record.so_far())
    record.evaluation({"validation/loss": 1.5, "validation/sample": "a text of a report"})
    assert "a text" not in record.path.read_text() and record.read()[-1].content["figures"] == {"validation/loss": 1.5}
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3}\n')  # of a step that is lost

    def resumed(manifest: str = "a" * 64, kept: bytes = rows) -> RunRecord:
        again = RunRecord(tmp_path, Corpus(()), ranks)
        again.continue_from(2, manifest, lambda: kept)
        return again

    again = resumed()
    assert (again.plan, again.step) == (record.plan, 2) and again.plan != ""
    again.add_step(3, batch)
    reordered = resumed()
    reordered.add_step(3, StepBatch((2, 1), 3, (3,), (4,)))
    assert again.plan != reordered.plan
    with pytest.raises(UserError, match="no entry about the checkpoint of step 2 as it is: another run has made it"):
        resumed("b" * 64)
    (tmp_path / "metrics.jsonl").write_bytes(rows.replace(b"1", b"7"))
    with pytest.raises(UserError, match=r"metrics.jsonl is not what entry 2 \(checkpoint, step 2\) of record.jsonl"):
        resumed(kept=rows.replace(b"1", b"7"))
    resumed(kept=rows)  # a start has said so before it cut the rows down
    # Rows that were added after the last entry, and would be kept.
    more = b'{"step": 1, "validation/f1": 1}\n'
    saved = b'{"step": 2, "save/pause_seconds": 0.1, "save/total_seconds": 2e-3}\n'
    for added, is_refused in ((saved, False), (b'{"step": 3}\n', False), (more, True)):
        (tmp_path / "metrics.jsonl").write_bytes(rows + added)
        with pytest.raises(UserError, match="row up to step 2 .* added") if is_refused else nullcontext():
            resumed(kept=rows if added == b'{"step": 3}\n' else rows + added)
    record.append("stop", why="finished", **record._state())
    record.append("export")
    (tmp_path / "metrics.jsonl").write_bytes(rows + saved)
    with pytest.raises(UserError, match=r"is not what entry 4 \(stop, step 2\) of record.jsonl says"):
        resumed(kept=rows + saved)
    # An older checkpoint may be exported.
    (tmp_path / "metrics.jsonl").write_bytes(rows)
    (older := tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    write_manifest(older, {"step": 1}, {}, {})
    with pytest.raises(UserError, match="has no entry about the checkpoint of step 1 as it is"):
        resumed()
    record.append("checkpoint", step=1, manifest=sha256(older / "manifest.json"))
    reads, read = [], Record.read
    monkeypatch.setattr(Record, "read", lambda record: reads.append(record) or read(record))
    resumed()
    assert len(reads) == 1  # and not once for each checkpoint
