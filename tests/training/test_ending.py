"""The contents of an export, and when a finished run is satisfied with them."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.durable_files import start_directory
from common.errors import NotMet, UserError
from common.sha256 import sha256
from configs.config import Batch, Config, Data, Forgetting, LoRA, Model, Optimizer, Run
from data.sources import Corpus
from distributed.checkpoint_directory import write_manifest
from distributed.process_group import Ranks
from training import ending
from training.checkpointer import Record, RunRecord
from training.ending import (
    EXPORT,
    check_budget,
    contents_of_export,
    damage_of_export,
    export_run,
    is_finished,
    lines_of_export,
    read_certificate,
    sums_of,
)
from training.evaluations import SAVED, Evaluations
from training.start import TrainingRun

CONFIG = Config(Model("m"), Data(("d",)), Batch(1), Optimizer(1e-3), Run("r"))
BEST = replace(CONFIG, run=Run("r", export="best"))
MODEL = SimpleNamespace(dtype=torch.float32)


def run_of(folder: Path, ranks: Ranks, config: Config = CONFIG) -> TrainingRun:
    """A run of 8 steps in `folder`."""
    data = SimpleNamespace(total_steps=8, plan=SimpleNamespace(steps_per_epoch=[8]), chats=None, stop_ids=(), kept="")
    parts = {"model": None, "model_config": MODEL, "tokenizer": None}
    return SimpleNamespace(config=config, data=data, ranks=ranks, directory=folder, **parts)  # type: ignore[return-value]


def found(**saved) -> Evaluations:
    evaluations = Evaluations(CONFIG, None)
    evaluations.load_state_dict({name: getattr(evaluations, name) for name in SAVED} | saved)
    return evaluations


def checkpoint(folder: Path, step: int, crc: str, identity: str = "i") -> None:
    (folder / f"step-{step:06d}").mkdir(parents=True, exist_ok=True)
    state = {"step": step, "identity": {"settings": {"name": identity}}}
    write_manifest(folder / f"step-{step:06d}", state, {"__0_0.distcp": {"size": 1, "sha256": [crc]}}, {})


def write_export(folder: Path, record: dict) -> None:
    adapter = folder.with_name("adapter")
    for part in (folder, adapter):
        part.mkdir(exist_ok=True)
        (part / "model.safetensors").write_bytes(b"12345")
    sums = {"format": 1, "files": sums_of(folder), "adapter": sums_of(adapter), "head": "the head before it"}
    (folder / EXPORT).write_text(json.dumps(record | sums))


def test_export_names_checkpoint_choice_and_dtype(tmp_path, ranks) -> None:
    checkpoints, export = tmp_path / "checkpoints", tmp_path / "export"

    def is_exported(record: dict) -> bool:
        return damage_of_export(export, record, ranks) == []

    checkpoint(checkpoints, 4, "aa")
    checkpoint(checkpoints, 8, "bb")
    best_of_4 = found(best_step=4, best_loss=0.5)
    last = contents_of_export(CONFIG, 8, best_of_4, MODEL, checkpoints)
    best = contents_of_export(BEST, 8, best_of_4, MODEL, checkpoints)
    assert (last["weights"], last["step"], last["validation_loss"], last["dtype"]) == ("last", 8, None, "float32")
    assert (best["weights"], best["step"], best["validation_loss"]) == ("best", 4, 0.5)
    without = contents_of_export(BEST, 8, found(), MODEL, checkpoints)  # no trained model was evaluated
    assert without["weights"] == "last" and damage_of_export(export, last, ranks) is None
    write_export(export, last)
    assert is_exported(last) and not is_exported(best)
    assert not is_exported(contents_of_export(CONFIG, 8, best_of_4, SimpleNamespace(dtype=torch.bfloat16), checkpoints))
    for change in (("cc",), ("bb", "j")):  # the same step, trained again; the same bits of another identity
        checkpoint(checkpoints, 8, *change)
        assert not is_exported(contents_of_export(CONFIG, 8, best_of_4, MODEL, checkpoints))
    checkpoint(checkpoints, 8, "bb")
    assert is_exported(contents_of_export(CONFIG, 8, best_of_4, MODEL, checkpoints))


def test_missing_and_changed_files_are_named(tmp_path, ranks) -> None:
    export, record = tmp_path / "export", contents_of_export(CONFIG, 8, found(), MODEL, tmp_path)
    write_export(export, record)
    (export / "README.md").write_text("a card")
    (export / "notes.txt").write_text("of the user")
    assert damage_of_export(export, record, ranks) == []
    (export / "model.safetensors").write_bytes(b"12344")  # one bit
    (tmp_path / "adapter" / "model.safetensors").unlink()
    assert damage_of_export(export, record, ranks) == [
        f"{tmp_path}/adapter/model.safetensors is missing",
        f"{export}/model.safetensors has changed: its SHA-256 is not that of export.json",
    ]
    (export / EXPORT).write_text("[]")  # damaged
    assert damage_of_export(export, record, ranks) is None
    (export / EXPORT).write_text(json.dumps(record | {"format": 0}))
    with pytest.raises(
        UserError, match="export.json has format 0, and this version of the code reads format 1; remove"
    ):
        damage_of_export(export, record, ranks)


def test_export_edited_with_its_certificate_is_refused(tmp_path, ranks) -> None:
    """Every sum of export.json holds; the record knows another export.json."""
    export, contents = tmp_path / "export", contents_of_export(CONFIG, 8, found(), MODEL, tmp_path)
    write_export(export, contents)

    def finished() -> bool:
        return is_finished(run_of(tmp_path, ranks), 8, found(), False)

    Record(tmp_path).append("export", sha256=sha256(export / EXPORT))
    assert finished()
    (export / "certificate.json").write_text('{"met": true}')
    write_export(export, contents)
    assert damage_of_export(export, contents, ranks) == []
    with pytest.raises(UserError, match="export is not what .*/record.jsonl says of an export; remove it, and export"):
        finished()


def test_certificate_of_another_budget_is_ignored(tmp_path, ranks) -> None:
    kl = {"mean": 0.3, "bound": 0.4, "count": 80, "above_cap": 1}
    text = {"kl": {"prose": kl}, "file": "f", "left_out": 0}
    certificate = {
        "max_kl": 0.1,
        "max_drop": None,
        "met": False,
        "min_gain": 0.0,
        "misses": ["its KL is too large"],
        "bound": 0.4,
        "gain": 0.5,
        "level": 0.95,
        "method": "a bet",
        "cap": 0.4,
        "start": "<s>",
        "alpha": 1.0,
        "step": 8,
        "low": None,
        "high": None,
        "value": 2.0,
    }
    certificate |= {
        "means": [],
        "readings": 1,
        "texts": [text],
        "curve": "validation/loss:min",
        "dtype": "float32",
    }
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "certificate.json").write_text(json.dumps(certificate))
    check_budget(run_of(tmp_path, ranks, replace(CONFIG, forgetting=Forgetting(max_kl=0.5, strict=True))))
    with pytest.raises(
        NotMet, match="forgetting.max_kl=0.1 is NOT met: its KL is too large; the KL to the base is below 0.4"
    ):
        check_budget(run_of(tmp_path, ranks, replace(CONFIG, forgetting=Forgetting(max_kl=0.1, strict=True))))


def test_certificate_of_unreleased_version_is_refused(tmp_path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "certificate.json").write_text(json.dumps({"max_kl": 0.1, "met": True, "worst": 0.1}))
    with pytest.raises(UserError, match="certificate.json has no level of confidence: .*; start the run again"):
        read_certificate(tmp_path)


def test_log_names_the_weights_of_a_budget(tmp_path, ranks) -> None:
    contents = contents_of_export(CONFIG, 8, found(), MODEL, tmp_path)
    for share, words in (
        (0.0, "exported the base's weights: no other meet the budget (step 8"),
        (0.25, "the last weights (step 8, alpha 0.250 of"),
    ):
        averaged = contents | {"averaged": {"share_of_tuned": share, "base": "0123"}}
        lines = lines_of_export(run_of(tmp_path, ranks), {"step": 8, "updates": 8}, found(), averaged)
        assert sum(words in line for line in lines) == 1, lines


def test_export_cut_off_by_a_kill_is_repeated(tmp_path, ranks, capsys) -> None:
    """Else verify.py would compare neither: it waits for the newest entry's export to get its name."""
    export, contents = tmp_path / "export", contents_of_export(CONFIG, 8, found(), MODEL, tmp_path)
    write_export(export, contents)
    digest = sha256(export / EXPORT)

    def is_finished_after(directory: str, sha256: str) -> bool:
        Record(tmp_path).append("export", step=8, directory=directory, sha256=sha256)
        return is_finished(run_of(tmp_path, ranks), 8, found(), False)

    assert is_finished_after("export", digest) and is_finished_after("/by/export.py", "0" * 64)
    assert not is_finished_after("export", "1" * 64)
    assert "warning: a kill has cut off the export of entry 3 (export, step 8) of" in capsys.readouterr().out
    assert is_finished_after("export", digest)


@pytest.mark.parametrize("export_mtp", [True, False])
def test_ignored_tensors_are_exported_unless_switched_off(tmp_path, ranks, monkeypatch, export_mtp) -> None:
    exports = []
    for name in ("tensors_in_files", "merged", "stored_form"):
        monkeypatch.setattr(ending, name, lambda *arguments: {})
    monkeypatch.setattr(
        ending, "untrained_tensors", lambda model, path, with_ignored: {"mtp.weight": path} if with_ignored else {}
    )
    monkeypatch.setattr(ending, "export_model", lambda *arguments, **options: exports.append(options["copied"]))
    run = run_of(tmp_path, ranks, replace(CONFIG, run=replace(CONFIG.run, export_mtp=export_mtp)))
    export_run(run, {"step": 8, "updates": 8}, Evaluations(CONFIG, None), RunRecord(tmp_path, Corpus(()), ranks))
    assert exports == [{"mtp.weight": CONFIG.model.path} if export_mtp else {}]


def test_adapter_gets_its_name_after_its_entry(tmp_path, ranks, monkeypatch) -> None:
    """A kill before it leaves the older adapter beside the older export, which the record knows."""
    (adapter := tmp_path / "adapter").mkdir()
    (adapter / "weights").write_text("old")

    def write(directory: Path, model: object, config: object, ranks: object) -> None:
        (start_directory(directory) / "weights").write_text("new")

    def export_model(directory: Path, *arguments: object, **options: object) -> None:
        arguments[3](start_directory(directory))  # type: ignore[operator]  (write_rest)

    monkeypatch.setattr("model.lora.save_adapter", write)
    for name in ("write_files", "tensors_in_files", "untrained_tensors", "merged", "stored_form"):
        monkeypatch.setattr(ending, name, lambda *arguments: {})
    monkeypatch.setattr(ending, "export_model", export_model)
    record, weights_at_entry = RunRecord(tmp_path, Corpus(()), ranks), []
    append = record.append
    monkeypatch.setattr(
        record, "append", lambda *a, **o: weights_at_entry.append((adapter / "weights").read_text()) or append(*a, **o)
    )
    config = replace(CONFIG, lora=LoRA(rank=2))
    export_run(run_of(tmp_path, ranks, config), {"step": 8, "updates": 8}, Evaluations(CONFIG, None), record)
    assert weights_at_entry == ["old"] and (adapter / "weights").read_text() == "new"
    written = json.loads((tmp_path / "export.tmp" / EXPORT).read_text())
    assert written["adapter"] == {"weights": sha256(adapter / "weights")}
