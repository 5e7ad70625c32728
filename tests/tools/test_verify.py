"""What verify.py says of a run that a kill has left half written, or that trains meanwhile, and of files that nobody names.

The runs here are made by hand. tests/distributed/test_record.py verifies runs that train.py has made.
"""

import hashlib
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.sha256 import sha256
from distributed.checkpoint_directory import checkpoint_name, write_manifest
from tools import check_step, verify
from tools.verify import EXACT, Differs, Segment, _compare_segment, _rows_of, compare, seen
from training.record import Entry, Record, plan_after

IDENTITY = {part: {} for part in ("settings", "config.json", "versions", "the data", "the weights")}
IDENTITY |= {part: {} for part in ("the tokenizer", "the code", "the scores' code")}
START = {
    "written": {},
    "files": {},
    "started_by": "me",
    "approved_by": None,
    "world_size": 1,
    "processor": "p",
    "threads": 1,
}
START |= {
    "identity": IDENTITY,
    "devices": [{"device": "cpu"}],
    "config": {"run": {"deterministic": False, "log_every": 1}},
    "step": 0,
}


def start(run: Path, rows: bytes = b"") -> Record:
    run.mkdir()
    (run / "metrics.jsonl").write_bytes(rows)
    record = Record(run)
    record.append("start", **START)
    return record


def save(record: Record, step: int, is_published: bool = True) -> Path:
    """A checkpoint with its entry, as a save makes it."""
    path = record.directory / "checkpoints" / f"{checkpoint_name(step)}{'' if is_published else '.tmp'}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"tensors %d" % step)
    content = (path / "__0_0.distcp").read_bytes()
    files = {"__0_0.distcp": {"size": len(content), "block": 100, "sha256": [hashlib.sha256(content).hexdigest()]}}
    record.append("checkpoint", step=step, plan="", **write_manifest(path, {"step": step}, files, {}))
    return path


def export(record: Record, weights: bytes, is_published: bool = True) -> Path:
    folder = record.directory / f"export{'' if is_published else '.tmp'}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    files = {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    (folder / "export.json").write_text(json.dumps({"files": files, "weights": "last"}))
    record.append("export", step=2, directory="export", sha256=sha256(folder / "export.json"))
    return folder


def said(run: Path) -> str:
    lines: list[str] = []
    compare(run, None, lines.append)
    return "\n".join(lines)


def problem(run: Path) -> str:
    with pytest.raises(Differs) as raised:
        compare(run, None, lambda line: None)
    return str(raised.value)


def test_a_kill_between_an_entry_and_the_name_of_its_checkpoint_is_no_difference(tmp_path) -> None:
    record = start(tmp_path / "run")
    save(record, 2)
    path = save(record, 4, is_published=False)
    assert "checkpoints: 1 whole, 0 removed; step-000004 has its temporary name: the run is writing it" in said(
        tmp_path / "run"
    )
    (path / "manifest.json").write_text((path / "manifest.json").read_text() + " ")
    assert "step-000004 is missing: entry 3 (checkpoint, step 4) names it" in problem(tmp_path / "run")


def test_a_kill_between_an_entry_and_the_name_of_its_export_is_no_difference(tmp_path) -> None:
    record = start(tmp_path / "run")
    first = export(record, b"old")
    second = export(record, b"new", is_published=False)
    assert "the one of entry 3 (export, step 2) has its temporary name" in said(tmp_path / "run")
    shutil.rmtree(first)
    assert "the one of entry 3 (export, step 2) has its temporary name" in said(tmp_path / "run")
    shutil.rmtree(second)
    assert "export/export.json is missing: entry 3 (export, step 2) names it" in problem(tmp_path / "run")


def test_a_file_that_nobody_names_is_found_in_an_export_and_in_a_checkpoint(tmp_path) -> None:
    record = start(tmp_path / "run")
    path, folder = save(record, 2), export(record, b"weights")
    for name in ("README.md", "bom.json", "model.sig", ".gitattributes"):
        (folder / name).write_text("")
    assert "export: 1 files, the last weights of step 2" in said(tmp_path / "run")
    for part, name in ((folder, "chat_template.jinja"), (folder, "more/modeling.py"), (path, "__1_0.distcp")):
        (part / name).parent.mkdir(exist_ok=True)
        (part / name).write_text("")
        assert f"{part / name} is named by nothing that entry" in problem(tmp_path / "run")
        (part / name).unlink()
    verdict = said(tmp_path / "run")
    assert "on 1 rank of p\n" in verdict and verdict.endswith("\nnothing differs from the record")


def test_what_the_base_has_prepared_is_compared(tmp_path) -> None:
    record = start(tmp_path / "run")
    rows = tmp_path / "run" / "anchor" / "rows"
    rows.parent.mkdir()
    rows.write_bytes(b"1")
    assert "anchor: in no entry, so not compared" in said(tmp_path / "run")
    record.append("prepared", step=0, folder="anchor", files={"rows": sha256(rows)})
    assert "anchor: 1 files" in said(tmp_path / "run")
    rows.write_bytes(b"2")
    assert "anchor/rows is not what entry 2 (prepared, step 0) says" in problem(tmp_path / "run")
    rows.write_bytes(b"1")
    rows.with_name("documents.npy").write_bytes(b"")
    assert "anchor/documents.npy is named by nothing that entry 2" in problem(tmp_path / "run")


def test_a_run_that_trains_meanwhile_is_compared_again(tmp_path) -> None:
    record = start(tmp_path / "run")
    old, lines = save(record, 2), list[str]()

    def goes_on(line: str) -> None:
        lines.append(line)
        if len(lines) == 1:  # the record is read, its checkpoint is not
            save(record, 4)
            record.append("pruning", removed=[old.name])
            shutil.rmtree(old)

    assert len(compare(tmp_path / "run", None, goes_on)) == 4
    assert lines.count("the run has gone on meanwhile: once more from the beginning") == 1
    assert "checkpoints: 1 whole, 1 removed" in lines
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    assert "step-000004 is missing" in problem(tmp_path / "run")


def test_a_head_of_another_record_and_a_line_that_a_kill_cut_off_are_said(tmp_path) -> None:
    record = start(tmp_path / "run")
    with pytest.raises(Differs, match="no entry has the head 00000"):
        compare(tmp_path / "run", "0" * 32, print)
    assert len(compare(tmp_path / "run", record.head()[:16], print)) == 1
    with record.path.open("ab") as file:
        file.write(b'{"entry": 2')
    assert ", after which a line was cut off by a kill" in said(tmp_path / "run")


@pytest.mark.parametrize(
    ("began", "first", "compared"), [(0, 0, [3, 6, 7]), (4, 4, [6, 7]), (0, 4, [7]), (0, 3, [6, 7])]
)
def test_rows_of_means_are_compared_if_all_of_their_steps_are_trained_again(began, first, compared, tmp_path) -> None:
    """run.log_every=3, and a last row after step 7. A start closes no row: that of step 6 has steps 5 and 6 after a start at 4."""
    kinds = {"train/loss": (3, 6, 7), "validation/loss": (0, 4, 7)}
    rows = [json.dumps({"step": step, name: 1.0}) for name, steps in kinds.items() for step in steps]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    of_start = {"config": {"run": {"log_every": 3}}, "step": began}
    segment = Segment(Entry(1, "start", "", of_start), first, [Entry(2, "checkpoint", "", {"step": 7})])
    found = _rows_of(tmp_path, segment)
    assert [step for step, kind in found if kind == "train"] == compared
    assert [step for step, kind in found if kind == "validation"] == ([0] if first == 0 else []) + [4] * (first < 4) + [
        7
    ]


def test_a_step_without_a_finite_loss_is_replayed_like_any_other(tmp_path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    for folder in (run, again):
        save(start(folder, b'{"step": 1, "train/loss": NaN}\n{"step": 2, "train/loss": 0.5}\n'), 2)
    first, checkpoint = Record(run).read()
    lines: list[str] = []
    assert _compare_segment(Segment(first, 0, [checkpoint]), run, again, lines.append) == EXACT
    assert lines == ["steps 1 to 2: the tensors of 1 checkpoints and 2 rows of curves are equal to the bit"]
    other = START | {"identity": IDENTITY | {"versions": {"torch": "0"}}}
    with pytest.raises(Differs, match=r"entry 1 \(start, step 0\) cannot be replayed here: it was made with torch=0"):
        _compare_segment(Segment(replace(first, content=other), 0, [checkpoint]), run, again, lines.append)
    for part, words in (
        ("tensors", "the tensors after step 2 are not those"),
        ("plan", "the documents of the steps up to 2"),
    ):
        changed = replace(checkpoint, content=checkpoint.content | {part: "0" * 64})
        with pytest.raises(Differs, match=words):
            _compare_segment(Segment(first, 0, [changed]), run, again, lines.append)
    (again / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n{"step": 2, "train/loss": 0.5}\n')
    with pytest.raises(Differs, match="the train curves of step 1 in .* are not those that the replay gives"):
        _compare_segment(Segment(first, 0, [checkpoint]), run, again, lines.append)


def test_what_was_seen_is_not_said_of_data_that_have_changed(monkeypatch) -> None:
    """The plan of the record is that of the data as they were: another fingerprint, or another order, is no proof."""
    found = SimpleNamespace(digest="0123", where="data.jsonl, line 1", items=[5])
    batches = {0: (4, 5), 1: (6, 7)}
    inputs = SimpleNamespace(local=None, train=SimpleNamespace(sources=[SimpleNamespace(fingerprint="of the data")]))
    inputs.plan = SimpleNamespace(batch=lambda step: SimpleNamespace(items=batches[step]))
    inputs.deal = lambda step: SimpleNamespace(items=[[batches[step]]], ranks_of=lambda group: f"rank {group}")
    monkeypatch.setattr(check_step, "read_run", lambda *arguments: SimpleNamespace(inputs=inputs))
    monkeypatch.setattr(verify, "config_of", lambda config: SimpleNamespace(data=None))
    monkeypatch.setattr(verify, "find", lambda *arguments: [found])
    monkeypatch.setattr(verify.contextlib, "chdir", nullcontext)
    first = plan_after("", 1, ["of the data"], batches[0])
    plan = plan_after(first, 2, ["of the data"], batches[1])
    of_start = {"step": 0, "plan": "", "directory": "", "config": {}, "world_size": 1}
    entries = [Entry(1, "start", "", of_start), Entry(2, "checkpoint", "", {"step": 2, "plan": plan})]
    assert list(seen(entries, "example"))[0] == "0123 | data.jsonl, line 1 | steps 1 (rank 0)"
    for change in ({"fingerprint": "of others"}, {1: (7, 6)}):
        monkeypatch.setitem(batches, 1, change.get(1, batches[1]))
        monkeypatch.setattr(inputs.train.sources[0], "fingerprint", change.get("fingerprint", "of the data"))
        with pytest.raises(
            Differs, match=r"the documents of the steps up to 2 are not those of entry 2 .*: the data changed"
        ):
            list(seen(entries, "example"))
