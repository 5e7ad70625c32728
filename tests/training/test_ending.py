"""What an export says it holds, and when that is what a finished run asks for."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from configs.config import Batch, Config, Data, Model, Optimizer, Run
from distributed.checkpoint_directory import write_manifest
from training.ending import RECORD, export_record, is_exported
from training.evaluations import Evaluations

CONFIG = Config(Model("m"), Data(("d",)), Batch(1), Optimizer(1e-3), Run("r"))
BEST = replace(CONFIG, run=Run("r", export="best"))
MODEL = SimpleNamespace(dtype=torch.float32)


def found(**saved) -> Evaluations:
    evaluations = Evaluations(CONFIG, None)
    evaluations.load_state_dict(evaluations.state_dict() | saved)
    return evaluations


def checkpoint(folder: Path, step: int, crc: str) -> None:
    (folder / f"step-{step:06d}").mkdir(parents=True, exist_ok=True)
    write_manifest(folder / f"step-{step:06d}", {"step": step}, {"__0_0.distcp": {"size": 1, "crc32": crc}}, {})


def write_export(folder: Path, record: dict) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"12345")
    (folder / RECORD).write_text(json.dumps(record | {"files": {"model.safetensors": 5}}))


def test_an_export_is_that_of_a_checkpoint_a_choice_and_a_dtype(tmp_path) -> None:
    checkpoints, export = tmp_path / "checkpoints", tmp_path / "export"
    checkpoint(checkpoints, 4, "aa")
    checkpoint(checkpoints, 8, "bb")
    best_of_4 = found(best_step=4, best_loss=0.5)
    last = export_record(CONFIG, 8, best_of_4, MODEL, checkpoints)
    best = export_record(BEST, 8, best_of_4, MODEL, checkpoints)
    assert (last["weights"], last["step"], last["validation_loss"], last["dtype"]) == ("last", 8, None, "float32")
    assert (best["weights"], best["step"], best["validation_loss"]) == ("best", 4, 0.5)
    assert not is_exported(export, last)
    write_export(export, last)
    assert is_exported(export, last) and not is_exported(export, best)
    assert not is_exported(
        export, export_record(CONFIG, 8, best_of_4, SimpleNamespace(dtype=torch.bfloat16), checkpoints)
    )
    checkpoint(checkpoints, 8, "cc")  # the same step, trained again with another learning rate
    assert not is_exported(export, export_record(CONFIG, 8, best_of_4, MODEL, checkpoints))


def test_an_export_with_a_missing_or_cut_file_does_not_count(tmp_path) -> None:
    record = export_record(CONFIG, 8, found(), MODEL, tmp_path)
    write_export(tmp_path / "export", record)
    assert is_exported(tmp_path / "export", record)
    (tmp_path / "export" / "model.safetensors").write_bytes(b"1234")
    assert not is_exported(tmp_path / "export", record)
    (tmp_path / "export" / "model.safetensors").unlink()
    assert not is_exported(tmp_path / "export", record)
    (tmp_path / "export" / RECORD).write_text("[]")
    assert not is_exported(tmp_path / "export", record)


def test_without_an_evaluation_of_a_trained_model_the_last_weights_stand_in_for_the_best(tmp_path) -> None:
    assert export_record(BEST, 8, found(), MODEL, tmp_path)["weights"] == "last"
