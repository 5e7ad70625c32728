"""verify.py on runs that a kill left half written or that train meanwhile, and on unknown and forged files.

The runs here are made by hand. tests/distributed/test_record.py verifies runs that train.py has made.
"""

import hashlib
import json
import os
import runpy
import shutil
import signal
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.sha256 import sha256
from configs.config import Data
from data.sources import Windows
from distributed.checkpoint_directory import checkpoint_name, replace_state, write_manifest
from scripts.chaos.launch import ROOT
from scripts.check import data as check_data
from scripts.verify import files, replay
from scripts.verify import seen as seen_module
from scripts.verify.files import Differs, compare
from scripts.verify.replay import EXACT, NOT_EXACT, Segment, compare_segment, rows_of
from scripts.verify.seen import seen
from tests.processes import run_python
from training.checkpointer import Entry, Record, plan_after

IDENTITY = {part: {} for part in ("settings", "config.json", "versions", "the data", "the weights")}
IDENTITY |= {part: {} for part in ("the tokenizer", "the code", "the scores' code")}
CONFIG = {"run": {"deterministic": False, "log_every": 1}, "model": {"path": "not here"}, "lora": {"rank": 2}}
CONFIG |= {"forgetting": {"max_kl": None}}
START = {"written": {}, "files": {}, "started_by": "me", "approved_by": None, "world_size": 1, "processor": "p"}
START |= {"threads": 1, "identity": IDENTITY, "devices": [{"device": "cpu"}], "config": CONFIG, "directory": "."}
START |= {"step": 0, "total_steps": 12}
CHANGED = CONFIG | {"run": CONFIG["run"] | {"resume": "changed"}}


def start(run: Path, rows: bytes = b"", **content: object) -> Record:
    run.mkdir()
    (run / "metrics.jsonl").write_bytes(rows)
    record = Record(run)
    record.append("start", **START | content)
    return record


def save(record: Record, step: int, is_published: bool = True) -> Path:
    """Write a checkpoint and its entry, as a save does."""
    path = record.directory / "checkpoints" / f"{checkpoint_name(step)}{'' if is_published else '.tmp'}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"tensors %d" % step)
    content = (path / "__0_0.distcp").read_bytes()
    files = {"__0_0.distcp": {"size": len(content), "block": 100, "sha256": [hashlib.sha256(content).hexdigest()]}}
    record.append(
        "checkpoint", step=step, plan="", **write_manifest(path, {"step": step, "identity": IDENTITY}, files, {})
    )
    return path


def export(record: Record, weights: bytes, is_published: bool = True, place: str = "export", **more: object) -> Path:
    """Write an export of the checkpoint of step 2 with merged adapters, as a run does. `more` replaces keys of export.json."""
    folder = record.directory / f"export{'' if is_published else '.tmp'}"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    tensors = next(entry.content["tensors"] for entry in record.read() if entry.kind == "checkpoint")
    files = {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    written = {"files": files, "weights": "last", "step": 2, "kind": "merged", "head": record.head()}
    written |= {"checkpoint": tensors} | more
    (folder / "export.json").write_text(json.dumps(written))
    digest = sha256(folder / "export.json")
    record.append("export", step=2, directory=place, sha256=digest, checkpoint=written["checkpoint"])
    return folder


def said(run: Path) -> str:
    lines: list[str] = []
    compare(run, None, lines.append)
    return "\n".join(lines)


def problem(run: Path) -> str:
    with pytest.raises(Differs) as raised:
        compare(run, None, lambda line: None)
    return str(raised.value)


def test_a_kill_before_a_rename_is_no_difference(tmp_path) -> None:
    record = start(run := tmp_path / "run")
    save(record, 2)
    first, second = export(record, b"old"), export(record, b"new", is_published=False)
    assert "the one of entry 4 (export, step 2) has its temporary name" in said(run)
    shutil.rmtree(first)
    assert "the one of entry 4 (export, step 2) has its temporary name" in said(run)
    path = save(record, 4, is_published=False)
    assert "checkpoints: 1 whole, 0 removed; step-000004 has its temporary name: the run is writing it" in said(run)
    (path / "manifest.json").write_text((path / "manifest.json").read_text() + " ")
    assert "step-000004 is missing: entry 5 (checkpoint, step 4) names it" in problem(run)
    shutil.rmtree(path)
    path = save(record, 4)
    shutil.rmtree(second)
    assert "export/export.json is missing: entry 4 (export, step 2) names it" in problem(run)


def test_a_kill_after_an_entry_is_no_difference(tmp_path) -> None:
    """The kill comes before config.json, before a checkpoint is set aside, or before an evaluation replaces a manifest."""
    (run := tmp_path / "run").mkdir()
    record, config = Record(run), run / "config.json"
    for text in ("one", "two"):
        record.append("start", **START | {"written": {"config.json": hashlib.sha256(text.encode()).hexdigest()}})
        assert said(run).endswith("nothing differs from the record")  # it is missing, or belongs to the start before
        config.write_text("changed")
        assert "config.json is not what entry" in problem(run)
        config.write_text(text)
    for step in (2, 4):
        save(record, step)
    record.append("pruning", set_aside=["step-000004"], why="NaN")
    assert "checkpoints: 2 whole" in said(run)
    manifest = save(record, 6) / "manifest.json"
    before = manifest.read_bytes()
    replace_state(manifest.parent, {"step": 6, "best_step": 6}, record.append, step=6, plan="")
    manifest.with_name("manifest.json.tmp").write_bytes(manifest.read_bytes()[:9])
    manifest.write_bytes(before)
    assert "checkpoints: 3 whole" in said(run)
    record.append("stop", step=2, why="finished")
    config.write_text("one")
    assert "config.json is not what entry 2 (start, step 0) says" in problem(run)


def test_two_names_of_an_export_are_one_place(tmp_path) -> None:
    record = start(run := tmp_path / "run")
    save(record, 2)
    for place in ("export", str(run / "export"), f"{tmp_path}/other/../run/export"):
        export(record, b"weights", place=place)
        assert said(run).count("export ") == 1
    (run / "export").rename(run / "away")
    assert "export/export.json is missing: entry 5 (export, step 2) names it" in problem(run)


def test_an_unknown_file_is_named(tmp_path) -> None:
    record = start(tmp_path / "run")
    path, folder = save(record, 2), export(record, b"weights")
    for name in ("README.md", "bom.json", "model.sig", ".gitattributes"):
        (folder / name).write_text("")
    assert "export: 1 files, the last weights of step 2, not compared with the tensors" in said(tmp_path / "run")
    folder = export(record, b"weights", adapter={"adapter_model.safetensors": hashlib.sha256(b"").hexdigest()})
    (adapter := tmp_path / "run" / "adapter").mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    places = (folder, "chat_template.jinja"), (folder, "more/modeling.py"), (path, "__1_0.distcp"), (adapter, "m.py")
    for part, name in (*places, (folder, "templates")):
        (part / name).parent.mkdir(exist_ok=True)
        (part / name).symlink_to(tmp_path) if name == "templates" else (part / name).write_text("")
        assert f"{part / name} is named by nothing that entry" in problem(tmp_path / "run")
        (part / name).unlink()
    (adapter / "adapter_model.safetensors").write_bytes(b"changed")
    assert "adapter/adapter_model.safetensors is not what entry" in problem(tmp_path / "run")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    verdict = said(tmp_path / "run")
    assert "on 1 rank of p\n" in verdict and verdict.endswith("\nnothing differs from the record")


def test_an_export_follows_its_checkpoint_and_head(tmp_path) -> None:
    record = start(tmp_path / "run")
    save(record, 2)
    for wrong, words in (
        ({"head": "f" * 64}, "export.json names the head ffff"),
        ({"checkpoint": "0" * 64}, "export.json is of no checkpoint of step 2 that record.jsonl has"),
        ({"files": []}, "is not what a run writes"),
    ):
        export(record, b"weights", **wrong)
        assert words in problem(tmp_path / "run")
    export(record, b"weights")
    assert said(tmp_path / "run").endswith("nothing differs from the record")


def twice(record: Record) -> None:
    """A false row before the true one: a plot shows it, and a replay compares the last one."""
    rows = b'{"step": 2, "train/loss": 0.001}\n{"step": 2, "train/loss": 5.0}\n'
    (record.directory / "metrics.jsonl").write_bytes(rows)
    save(record, 4)
    record.append("pruning", metrics={"bytes": len(rows), "sha256": hashlib.sha256(rows).hexdigest()})


def exports_another(record: Record, budget: float | None = None, **certificate: object) -> None:
    """Export step 2 as the last weights of a run that has saved step 4, or with a certificate of another budget."""
    config = CONFIG | {"forgetting": {"max_kl": budget, "min_gain": 0.0}}
    record.append("start", **START | {"step": 2, "config": config})
    record.append("certificate", step=2, files={"texts": "1"})
    save(record, 4) if budget is None else None
    averaged = {"share_of_tuned": 0.5}
    tensors = next(entry.content["tensors"] for entry in record.read() if entry.kind == "checkpoint")
    content = {"step": 2, "checkpoint": tensors, "averaged": averaged, "max_kl": 0.4, "min_gain": 0.0}
    content |= {"texts": [{"file": "texts", "sha256": "1"}]} | certificate
    (record.directory / "export").mkdir()
    (path := record.directory / "export" / "certificate.json").write_text(json.dumps(content))
    files = {name: hashlib.sha256(b"weights").hexdigest() for name in ("model.safetensors",)}
    files |= {path.name: sha256(path)} if budget else {}
    path.unlink() if budget is None else None
    export(record, b"weights", files=files, averaged=averaged if budget else None)


def test_certificate_is_of_export_and_settings(tmp_path) -> None:
    for number, wrong in enumerate(({}, {"max_kl": 0.5}, {"step": 4}, {"checkpoint": "0"}, {"texts": []})):
        record = start(run := tmp_path / str(number))
        save(record, 2)
        exports_another(record, 0.4, **wrong)
        if wrong:
            assert "export: the last weights of step 2 are not those that entry 3 (start, step 2) exports" in problem(
                run
            )
        else:
            assert "certificate" in said(run)


def with_adapter(record: Record) -> None:
    export(record, b"weights")
    (path := record.directory / "adapter" / "adapter_config.json").parent.mkdir()
    path.write_text("{}")


def rolled_back(record: Record) -> None:
    path = save(record, 4)
    old = (path / "manifest.json").read_bytes()
    replace_state(path, {"step": 4, "best": 4}, record.append, step=4, plan="")
    (path / "manifest.json").write_bytes(old)
    compare(record.directory, None, lambda line: None)  # a kill may have come before the file was replaced


def planted(record: Record) -> None:
    shutil.copytree(save(record, 4), record.directory / "checkpoints" / "step-000004.bad")


def read_before(record: Record) -> None:
    """Change the data of a start whose steps count. A file that a later start read otherwise is not compared."""
    first, second = record.directory / "one", record.directory / "two"
    first.write_text("1")
    for step, paths in ((2, (first, second)), (3, (second,))):
        second.write_text(str(step))
        read = {str(path): sha256(path) for path in paths}
        save(record, step) if step == 3 else None
        record.append("start", **START | {"step": step, "files": {"the data": read}, "config": CHANGED})
    assert "base and data: 2 files; 1 are not here, so not compared" in said(record.directory)
    first.write_text("changed")


def replaced_diff(record: Record) -> None:
    (patch := record.directory / "diffs" / "0001.diff").parent.mkdir()
    patch.write_text("+x")
    record.append("start", **START | {"step": 2, "written": {"diffs/0001.diff": sha256(patch)}})
    patch.write_text("+y")


def without_row(record: Record) -> None:
    rows = b'{"step": 2, "validation/loss": 0.9}\n'
    (record.directory / "metrics.jsonl").write_bytes(rows)
    metrics = {"bytes": len(rows), "sha256": hashlib.sha256(rows).hexdigest()}
    record.append("evaluation", step=2, metrics=metrics, figures={"validation/loss": 0.9})
    compare(record.directory, None, lambda line: None)
    record.append("evaluation", step=2, metrics=metrics, figures={"validation/loss": 0.001})


def with_a_row(record: Record) -> None:
    save(record, 4)
    (record.directory / "metrics.jsonl").write_bytes(b'{"step": 4, "validation/loss": 0.001}')  # and no line end


FORGED = {
    exports_another: "the last weights of step 2 are not those that entry 3 (start, step 2) exports",
    with_adapter: "adapter/adapter_config.json is named by nothing that entry 3",
    twice: "metrics.jsonl has two rows of step 2 (train)",
    with_a_row: "metrics.jsonl: 1 rows at its end are in no entry, and the run had ended at entry 4 (stop, step 4)",
    rolled_back: "step-000004/manifest.json is not the one of entry 4 (checkpoint, step 4)",
    planted: "step-000004.bad is named by no entry",
    read_before: "one (the data) is not what entry 3 (start, step 2) has read",
    replaced_diff: "diffs/0001.diff is not what entry 3 (start, step 2) says",
    without_row: "metrics.jsonl has not the figures of entry 4 (evaluation, step 2) in its row of step 2 (validation)",
}


@pytest.mark.parametrize("forge", FORGED, ids=lambda forge: forge.__name__)
def test_a_forgery_is_named(forge, tmp_path) -> None:
    record = start(tmp_path / "run")
    save(record, 2)
    forge(record)
    record.append("stop", step=4, why="finished")
    assert FORGED[forge] in problem(tmp_path / "run")


def of_another_identity(record: Record) -> None:
    record.append("start", **START | {"step": 2, "identity": IDENTITY | {"the data": {"data.train": "another"}}})


def of_other_data(record: Record) -> None:
    shutil.rmtree(record.directory)
    start(record.directory, files={"the data": {"train.jsonl": "1"}})
    save(record, 2)
    record.append("start", **START | {"step": 2, "files": {"the data": {"train.jsonl": "2"}}})


def from_the_base_again(record: Record) -> None:
    """Without the rule every checkpoint of the run is given up, and none is compared."""
    record.append("start", **START)


def finished_twice(record: Record) -> None:
    record.append("stop", step=2, why="finished")
    record.append("start", **START)


def saved_after_the_end(record: Record) -> None:
    record.append("stop", step=2, why="finished")
    save(record, 4)


def beyond_the_plan(record: Record) -> None:
    save(record, 15)


def without_checkpoint(record: Record) -> None:
    record.append("start", **START | {"step": 1})


def with_other_tensors(record: Record) -> None:
    record.append("checkpoint", step=2, plan="", tensors="0" * 64, manifest="0" * 64)


def without_plan(record: Record) -> None:
    """An old record has no total_steps, with which any step would be within the plan."""
    content = {name: value for name, value in START.items() if name != "total_steps"}
    record.append("start", **content | {"step": 2})
    save(record, 15)


def of_no_kind(record: Record) -> None:
    record.append("audit", step=2)


UNGRAMMATICAL = {
    of_another_identity: "entry 3 (start, step 2) changes what entry 1 (start, step 0) fixed (other data in data.train), and",
    of_other_data: "(start, step 2) changes what entry 1 (start, step 0) fixed (other bytes in train.jsonl), and run.resume=",
    from_the_base_again: "step-000002 is here, but a later start of record.jsonl continued from an earlier step",
    finished_twice: "entry 4 (start, step 0) trains steps again that entry 3 (stop, step 2) had finished",
    saved_after_the_end: "entry 4 (checkpoint, step 4) follows entry 3 (stop, step 2), after which only exports and a start",
    beyond_the_plan: "entry 3 (checkpoint, step 15) is of a step outside of those that entry 1 (start, step 0) trains, which "
    "end at 12",
    without_checkpoint: "entry 3 (start, step 1) continues from a step of which no entry has a checkpoint",
    with_other_tensors: "entry 3 (checkpoint, step 2) has other tensors than entry 2 (checkpoint, step 2), and no start has",
    without_plan: "is not what a run writes: KeyError('total_steps')",
    of_no_kind: "entry 3 (audit, step 2) is of a kind that no run writes",
}


@pytest.mark.parametrize("forge", UNGRAMMATICAL, ids=lambda forge: forge.__name__)
def test_record_keeps_a_grammar(forge, tmp_path) -> None:
    record = start(tmp_path / "run")
    save(record, 2)
    forge(record)
    assert UNGRAMMATICAL[forge] in problem(tmp_path / "run")


def test_kills_and_later_starts_keep_the_grammar(tmp_path) -> None:
    """A kill loses the first checkpoint after its entry; then a new config, a damaged checkpoint, a finish, more epochs."""
    record = start(run := tmp_path / "run")
    shutil.rmtree(save(record, 2))
    other = START | {"identity": IDENTITY | {"the data": {"data.train": "another"}}}
    record.append("start", **other)
    for step in (2, 4):
        save(record, step)
    record.append("pruning", set_aside=["step-000004"], why="damaged")
    (run / "checkpoints" / "step-000004").rename(run / "checkpoints" / "step-000004.bad")
    record.append("start", **other | {"step": 2})
    save(record, 4)
    record.append("stop", step=4, why="finished")
    record.append("start", **other | {"step": 4, "total_steps": 16})
    save(record, 15)
    assert "not compared, because the run has given them up: step-000004.bad" in said(run)


def test_entries_after_a_trusted_head_fail(tmp_path) -> None:
    record = start(run := tmp_path / "run")
    save(record, 2)
    head = record.head()
    assert compare(run, head, lambda line: None)
    record.append("pruning", removed=[])
    save(record, 4)
    with pytest.raises(
        Differs, match=r"entry 3 \(pruning\) and 1 more follow entry 2 \(checkpoint, step 2\), whose head"
    ):
        compare(run, head, lambda line: None)
    left: list[str] = []
    compare(run, head, lambda line: None, allow_later=True, left=left)
    assert [line.partition(" follows the head")[0] for line in left] == [
        "entry 3 (pruning)",
        "entry 4 (checkpoint, step 4)",
    ]


def test_last_line_counts_what_was_not_compared(tmp_path) -> None:
    record = start(run := tmp_path / "run")
    save(record, 2)

    def last_line() -> tuple[int, str]:
        done = run_python(ROOT / "scripts" / "verify.py", run)
        return done.returncode, done.stdout.splitlines()[-1]

    assert last_line() == (0, "everything was compared and is equal")
    unknown = run / "checkpoints" / "notes", run / "eval" / "results.json", run / "config.json"
    for path in unknown:
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    assert last_line() == (3, "equal as far as compared; not compared: 3 of the lines above")
    assert all(f"{path}: no entry names it, so not compared" in said(run) for path in unknown)


def test_a_record_begins_with_a_start(tmp_path) -> None:
    Record(tmp_path).append("stop", step=0, why="finished")
    assert "record.jsonl: entry 1 (stop, step 0) comes before the first start" in problem(tmp_path)
    record = start(tmp_path / "run")
    record.append("checkpoint", step=2)
    save(record, 4)
    (tmp_path / "run" / "checkpoints" / "step-000002").mkdir()
    assert "is not what a run writes: KeyError('manifest')" in problem(tmp_path / "run")


@pytest.mark.parametrize("file", ["record.jsonl", "checkpoints/step-000002/manifest.json"])
def test_another_format_is_no_difference(file, tmp_path, monkeypatch, capsys) -> None:
    """Another version of the code wrote the run, so this one cannot compare it."""
    module = "training.checkpointer" if file == "record.jsonl" else "distributed.checkpoint_directory"
    with monkeypatch.context() as patched:
        patched.setattr(f"{module}.FORMAT", 2)
        save(start(run := tmp_path / "run"), 2)
    monkeypatch.setattr(sys, "argv", ["verify.py", str(run)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "verify.py"), run_name="__main__")
    signal.signal(signal.SIGTERM, handler)
    problem = capsys.readouterr().err
    assert problem.startswith(f"error: {run / file} has format 2, and this version of the code reads format 1")
    assert (ended.value.code, problem.count("\n")) == (2, 1)


def test_prepared_files_are_compared(tmp_path) -> None:
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


def test_a_run_that_trains_is_compared_again(tmp_path) -> None:
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
    with record.path.open("ab") as file:
        file.write(b'{"entry": 5')
    assert ", after which a line was cut off by a kill" in said(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    assert "step-000004 is missing" in problem(tmp_path / "run")


def test_an_export_by_hand_ends_no_run(tmp_path) -> None:
    """The rows since the run's last save are in no entry yet."""
    record = start(run := tmp_path / "run")
    save(record, 2)
    export(record, b"weights", place=str(tmp_path / "release")).rename(tmp_path / "release")
    (run / "metrics.jsonl").write_bytes(b'{"step": 3, "train/loss": 1.0}\n')
    assert said(run).endswith("nothing differs from the record")
    record.append("stop", step=2, why="SIGTERM")
    assert "metrics.jsonl: 1 rows at its end are in no entry, and the run had ended at entry 4 (stop" in problem(run)


@pytest.mark.parametrize(
    ("began", "first", "compared"), [(0, 0, [3, 6, 7]), (4, 4, [6, 7]), (0, 4, [7]), (0, 3, [6, 7])]
)
def test_rows_of_means_need_all_their_steps(began, first, compared, tmp_path) -> None:
    """run.log_every=3, and a last row after step 7. After a start at step 4 the row of step 6 has only the steps 5 and 6."""
    kinds = {"train/loss": (3, 6, 7), "validation/loss": (0, 4, 7)}
    rows = [json.dumps({"step": step, name: 1.0}) for name, steps in kinds.items() for step in steps]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    of_start = {"config": {"run": {"log_every": 3}}, "step": began}
    segment = Segment(Entry(1, "start", "", of_start), first, [Entry(2, "checkpoint", "", {"step": 7})])
    rows = rows_of(tmp_path, segment)
    assert [step for step, kind in rows if kind == "train"] == compared
    validated = [step for step, kind in rows if kind == "validation"]
    assert validated == [0] * (first == 0) + [4] * (first < 4) + [7]


def test_a_nan_loss_is_replayed(tmp_path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    for folder in (run, again):
        save(start(folder, b'{"step": 1, "train/loss": NaN}\n{"step": 2, "train/loss": 0.5}\n'), 2)
    first, checkpoint = Record(run).read()
    lines: list[str] = []
    assert compare_segment(Segment(first, 0, [checkpoint]), run, again, lines.append) == EXACT
    assert lines == ["steps 1 to 2: the tensors of 1 checkpoints and 2 rows of curves are equal to the bit"]
    changed = START | {"identity": IDENTITY | {"versions": {"torch": "0"}}}
    with pytest.raises(Differs, match=r"entry 1 \(start, step 0\) cannot be replayed here: it was made with torch=0"):
        compare_segment(Segment(replace(first, content=changed), 0, [checkpoint]), run, again, lines.append)
    rows = (again / "metrics.jsonl").read_text()
    (again / "metrics.jsonl").write_text(rows + '{"step": 2, "validation/loss": 7.0}\n')
    with pytest.raises(Differs, match="the validation curves of step 2 in .* are not those that the replay gives"):
        compare_segment(Segment(first, 0, [checkpoint]), run, again, lines.append)
    Record(run).append("stop", step=2, why="SIGTERM")  # the signal cut the last evaluation short
    assert compare_segment(Segment(first, 0, [checkpoint]), run, again, lines.append) == EXACT
    (again / "metrics.jsonl").write_text(rows.replace("NaN", "1.0"))
    with pytest.raises(Differs, match="the train curves of step 1 in .* are not those that the replay gives"):
        compare_segment(Segment(first, 0, [checkpoint]), run, again, lines.append)


@pytest.mark.parametrize(
    "loss", [b'"train/loss": NaN', b'"train/loss": Infinity', b'"train/loss": 1e999', b'"train/lr": 1']
)
def test_losses_that_are_no_numbers_have_no_bound(loss, tmp_path) -> None:
    """On another processor only the losses are compared: hidden ones must not count as equal."""
    run, again, row = tmp_path / "run", tmp_path / "again", b'{"step": 1, "train/loss": 5.0}\n'
    config = CONFIG | {"model": {"path": "not here", "compute_dtype": "fp32"}}
    save(start(run, b'{"step": 1, %b}\n{"step": 2, "train/loss": NaN}\n' % loss, processor="q", config=config), 2)
    save(start(again, row + b'{"step": 2, "train/loss": NaN}\n', config=config), 2)
    first, checkpoint = Record(run).read()
    with pytest.raises(Differs, match="losses of step 1 differ by inf, "):
        compare_segment(Segment(first, 0, [checkpoint]), run, again, lambda line: None)
    (run / "metrics.jsonl").write_bytes((again / "metrics.jsonl").read_bytes().replace(b"5.0", b"5.001"))
    assert compare_segment(Segment(first, 0, [checkpoint]), run, again, lambda line: None) == NOT_EXACT


def test_seen_refuses_changed_data(monkeypatch, tmp_path) -> None:
    """The recorded plan belongs to the data of then. With another fingerprint or order, `--seen` proves nothing."""
    example = SimpleNamespace(digest="0123", where="data.jsonl, line 1", items=[5], names={"example", "known"})
    batches = {0: (4, 5), 1: (6, 7)}
    train = SimpleNamespace(sources=[SimpleNamespace(fingerprint="of the data")], names=("main",))
    inputs = SimpleNamespace(local=SimpleNamespace(data=Data(())), train=train)
    inputs.plan = SimpleNamespace(items=batches.__getitem__)
    inputs.deal = lambda step: SimpleNamespace(items=[[batches[step]]], ranks_of=lambda group: f"rank {group}")
    monkeypatch.setattr(check_data, "read_run", lambda *arguments: SimpleNamespace(inputs=inputs))
    monkeypatch.setattr(seen_module, "config_of", lambda config: SimpleNamespace(data=Data(())))
    monkeypatch.setattr(seen_module, "find_examples", lambda *arguments: [example])
    first = plan_after("", 1, ["of the data"], batches[0])
    plan = plan_after(first, 2, ["of the data"], batches[1])
    of_start = {"step": 0, "plan": "", "directory": "/of/another machine", "config": {}, "world_size": 1}
    entries = [Entry(1, "start", "", of_start), Entry(2, "checkpoint", "", {"step": 2, "plan": plan})]
    assert list(seen(entries, "example"))[0] == "0123 | data.jsonl, line 1 | steps 1 (rank 0)"
    # Names of no example are reported.
    (ids := tmp_path / "ids.txt").write_text("known\nmisspelt\n")
    monkeypatch.setattr(train, "sources", [Windows(SimpleNamespace(fingerprint="of the data"), 8)])  # pyright: ignore
    output = list(seen(entries, str(ids)))
    assert output[1].startswith("1 examples of the training") and output[2:] == [
        "warning: 1 names are of no example: misspelt",
        "warning: the token store of source main keeps no examples: none can be found in it",
    ]
    monkeypatch.setattr(train, "sources", [SimpleNamespace(fingerprint="of the data")])
    for change in ({"fingerprint": "of others"}, {1: (7, 6)}):
        monkeypatch.setitem(batches, 1, change.get(1, batches[1]))
        monkeypatch.setattr(inputs.train.sources[0], "fingerprint", change.get("fingerprint", "of the data"))
        output = r"the documents of the steps up to 2 are not those of entry 2 .*: the data changed"
        with pytest.raises(Differs, match=output):
            list(seen(entries, "example"))


def test_entries_may_come_after_later_rows(tmp_path) -> None:
    """The entry of a save in the background comes after the entries of later rows."""
    rows = [b'{"step": %d, "train/loss": 1.5}\n' % step for step in (1, 2, 3)]
    record = start(run := tmp_path / "run", b"".join(rows))
    for count in (3, 1, 2, 2):
        content = b"".join(rows[:count])
        record.append("stop", step=3, metrics={"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    entries = record.read()
    assert files._check_metrics(run, entries, entries[0]) == "metrics.jsonl: 3 rows"
    (run / "metrics.jsonl").write_bytes(rows[0] + rows[2] + rows[2])
    with pytest.raises(Differs, match=r"metrics.jsonl is not what entry 4 \(stop, step 3\) says"):
        files._check_metrics(run, entries, entries[0])


def test_an_unreadable_file_is_no_difference(tmp_path, monkeypatch) -> None:
    start(tmp_path / "run")

    def refused(*arguments: object) -> str:
        raise PermissionError(13, "Permission denied", "metrics.jsonl")

    monkeypatch.setattr(files, "_check_metrics", refused)
    with pytest.raises(PermissionError):
        said(tmp_path / "run")


TORCHRUN = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
with open("child.tmp", "w") as file:
    file.write(str(child.pid))
os.rename("child.tmp", "child")
time.sleep(600)
"""


def test_an_interrupted_replay_leaves_no_process(tmp_path) -> None:
    """Ranks have sessions of their own, which Ctrl-C does not reach."""

    def interrupted() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a process of pytest-xdist ignores SIGINT
        replay.run_train([sys.executable, "-c", TORCHRUN], str(tmp_path), {})

    replaying = get_context("fork").Process(target=interrupted)
    replaying.start()
    while not (tmp_path / "child").exists():
        assert replaying.is_alive()
        time.sleep(0.01)
    os.kill(replaying.pid or 0, signal.SIGINT)
    replaying.join()
    status = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")  # gone, or a zombie that init has not reaped yet
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_replay_needs_no_start_directory(tmp_path, monkeypatch) -> None:
    (tmp_path / "train.py").touch()
    content = START | {
        "config": {"run": {"resume": "auto"}, "data": {"cache": None}},
        "directory": str(tmp_path / "gone"),
    }
    content |= {"command": [str(tmp_path / "train.py")]}
    recorded = SimpleNamespace(content=content, step=0)
    started: list[str] = []
    monkeypatch.setattr(replay, "run_train", lambda command, directory, _: (started.append(directory) or 0, ""))
    replay.train_again(Segment(recorded, 0, [SimpleNamespace(step=2)]), tmp_path / "run", lambda line: None)
    assert started == [str(Path.cwd())]


def test_key_refuses_other_options(monkeypatch, capsys) -> None:
    for option in ("--head", "--replay", "--seen"):
        monkeypatch.setattr(sys, "argv", ["verify.py", "release/model", "--key", "release.pub", option, "0" * 32])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "scripts" / "verify.py"), run_name="__main__")
        assert left.value.code == 2 and "error: --key looks at an export alone; name the run" in capsys.readouterr().err
