"""From which checkpoint a run continues, when it saves, and which checkpoint is known to be good."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from configs.config import Batch, Config, Data, Model, Optimizer, Run
from data.sources import Corpus
from distributed.checkpoint_directory import checksum, write_manifest
from distributed.process_group import Ranks
from model.language_model import BUFFERS
from training.checkpointer import Checkpointer
from training.evaluations import Evaluations

CONFIG = Config(Model("m"), Data(("d",)), Batch(1), Optimizer(1e-3), Run("r"))
IDENTITY = dict.fromkeys(("config.json", "versions", "the data", "the tokenizer", "the code", "the scores' code"), {})
IDENTITY |= {"settings": {"run.seed": 1}, "the weights": {"model.safetensors": "123"}, "the data": {"data.mix": None}}


def checkpointer_of(
    folder: Path, ranks: Ranks, identity: dict = IDENTITY, settings: dict | None = None, **options
) -> Checkpointer:
    """A checkpointer of `folder`/checkpoints whose saver and record only note their calls. options: of config.run."""
    config = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, **options))
    stop = SimpleNamespace(ranks=ranks, clock=0.0)  # a signal never comes
    run = SimpleNamespace(config=config, identity=identity, settings=settings or {}, stop=stop, directory=folder)
    run.data, run.model = SimpleNamespace(train=Corpus(())), SimpleNamespace(causal_lm=None)
    checkpointer = Checkpointer(run, Evaluations(CONFIG, None))  # type: ignore[arg-type]
    entries = {"so_far": dict, "append": lambda kind, **content: "", "continue_from": lambda *arguments: []}
    checkpointer.record = SimpleNamespace(**entries)
    saves: list[dict] = []
    checkpointer.saver = SimpleNamespace(save=lambda state: saves.append(state), wait=lambda: None)
    checkpointer.saves = saves
    return checkpointer


def find(checkpointer: Checkpointer, state: dict, total_steps: int = 10) -> list[str]:
    return checkpointer.find(state, total_steps, lambda step, evaluated: b"")


def counted(step: int, updates: int | None = None, bad: int = 0) -> dict:
    return {"step": step, "updates": step if updates is None else updates, "targets": [step], "bad_steps_in_a_row": bad}


def write(folder: Path, step: int, ranks: Ranks, **options) -> Path:
    """Write the manifest of a checkpoint without tensors, and return its directory."""
    checkpointer = checkpointer_of(folder, ranks, **options)
    checkpointer.save(counted(step, bad=2))
    (path := folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    write_manifest(path, checkpointer.saves[-1], {}, {})
    return path


def test_persistent_buffers_are_part_of_checkpoints(tmp_path, ranks) -> None:
    checkpointer, model = checkpointer_of(tmp_path, ranks), torch.nn.BatchNorm1d(2)
    checkpointer.causal_lm = model  # type: ignore[assignment]
    checkpointer.save_from(dict(model.named_parameters()), torch.optim.SGD(model.parameters(), 0.1))
    assert f"registered.{BUFFERS}.running_mean" in checkpointer.saver.contents()[0]


def test_export_without_checkpoints_is_not_trained_over(tmp_path, ranks) -> None:
    (tmp_path / "export").mkdir()
    with pytest.raises(UserError, match="export exists, but the checkpoints of its run are gone; to train again"):
        find(checkpointer_of(tmp_path, ranks), counted(0))


@pytest.mark.parametrize("resume", ["auto", "previous"])
def test_checkpoint_of_another_format_is_refused(resume, tmp_path, ranks) -> None:
    """It is not damaged, so run.resume=previous neither passes it over nor renames it."""
    write(tmp_path, 2, ranks)
    path = write(tmp_path, 4, ranks) / "manifest.json"
    content = json.loads(path.read_text()) | {"format": 0}
    del content["checksum"]
    path.write_text(json.dumps(content | {"checksum": checksum(content)}))
    with pytest.raises(UserError, match=r"manifest.json has format 0, and this version of the code reads format 1"):
        find(checkpointer_of(tmp_path, ranks, resume=resume), counted(0))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


def test_checkpoint_is_good_after_an_update_from_it(tmp_path, ranks) -> None:
    checkpointer = checkpointer_of(tmp_path, ranks)

    def good(updates: int) -> str:
        with pytest.raises(UserError, match="NaN; lower") as error:
            checkpointer.give_up("NaN", updates)
        return str(error.value).partition("continues from ")[2]

    def saved(step: int, updates: int) -> int:
        checkpointer.save(counted(step, updates))
        return checkpointer.saves[-1]["proven_step"]

    assert good(1) == "the base model"  # nothing is saved
    assert saved(1, 1) == 0
    assert good(1) == "the base model"  # step 2 was skipped, so the weights of step 1 may be bad
    assert saved(2, 1) == 0  # a checkpoint of the same weights proves nothing about them
    assert good(2) == "the checkpoint of step 2, which is good"
    assert saved(3, 2) == 2
    assert good(2) == "the checkpoint of step 2, which is good"
    assert good(3) == "the checkpoint of step 3, which is good"


def test_periodic_save_stays_due_until_done(tmp_path, ranks) -> None:
    """By steps, or by the clock of rank 0 since the last one."""
    checkpointer, due = checkpointer_of(tmp_path, ranks, save_every=4), []
    for step in range(1, 10):
        due.append(checkpointer.is_due(step))
        if step == 6:  # steps 4 and 5 were skipped
            checkpointer.save(counted(step))
            checkpointer.save(counted(step))
    assert due == [False, False, False, True, True, True, False, True, True]
    assert [state["step"] for state in checkpointer.saves] == [6]
    checkpointer, due = checkpointer_of(tmp_path, ranks, save_minutes=2.0), []
    for step, clock in enumerate((0.0, 1000.0, 1060.0, 1119.0, 1120.0, 1200.0, 1239.0, 1240.0), 1):
        checkpointer.stop.clock = clock  # 0: no poll has been answered yet
        due.append(checkpointer.is_due(step))
        if due[-1]:
            checkpointer.save(counted(step))
    assert due == [False, False, False, False, True, False, False, True]
    never = checkpointer_of(tmp_path, ranks, save_minutes=0.0)
    for never.stop.clock in (1.0, 1e9):
        assert not never.is_due(4)


def identity_with(rate: float) -> dict:
    return IDENTITY | {"settings": {"run.seed": 1, "optimizer.learning_rate": rate}}


def test_resume_continues_with_the_counts(tmp_path, ranks) -> None:
    """Another identity counts from the next step on."""
    old, new = identity_with(1.0), identity_with(0.5)
    path = write(tmp_path, 4, ranks, identity=old, settings={"run.export": "last"})
    state = counted(0)
    same = checkpointer_of(tmp_path, ranks, old, {"run.export": "best"})
    lines = find(same, state)
    assert state == counted(4, bad=2) and same.resume_from == path and not same.is_changed
    assert lines == ["changed since step 4 was saved:", "    run.export: last -> best"]
    with pytest.raises(UserError, match="is at step 4, beyond the 3 steps of this config; raise optimizer.max_steps"):
        find(checkpointer_of(tmp_path, ranks, old), counted(0), 3)
    with pytest.raises(UserError, match="optimizer.learning_rate=1.0, now it is 0.5; set it back"):
        find(checkpointer_of(tmp_path, ranks, new), counted(0))
    state, changed = counted(0), checkpointer_of(tmp_path, ranks, new, {"run.export": "last"}, resume="changed")
    lines = find(changed, state)
    assert "optimizer.learning_rate=1.0, now it is 0.5" in lines[0] and changed.is_changed
    assert state == counted(4)  # another learning rate starts with a clean record
    # An evaluation before the first step is of the old weights.
    assert changed._manifest(state)["identity"] == old
    changed.save(counted(5))
    assert changed.saves[-1]["identity"]["settings"] == new["settings"] and not changed.is_changed
    mixed = old | {"the data": {"data.mix": ["other"]}}
    find(checkpointer_of(tmp_path, ranks, mixed, resume="changed"), state := counted(0))
    assert state["targets"] == [0]  # the counts of step 4 belong to other sources


def test_loop_state_has_its_own_names(tmp_path, ranks) -> None:
    checkpointer = checkpointer_of(tmp_path, ranks)
    checkpointer.save(counted(4) | {"loss": 7.0, "best_step": 1})
    saved = checkpointer.saves[-1]
    assert saved["loop"]["loss"] == 7.0 and saved["loss"] is None and saved["best_step"] is None
    (path := tmp_path / "checkpoints" / "step-000004").mkdir(parents=True)
    write_manifest(path, saved, {}, {})
    state = counted(0) | {"loss": 0.0, "best_step": 0, "mine": 3}  # one key is newer than the checkpoint
    find(checkpointer_of(tmp_path, ranks), state)
    assert (state["step"], state["loss"], state["best_step"], state["mine"]) == (4, 7.0, 1, 3)
    with pytest.raises(UserError, match=r"state\['mine'\] is a set; use numbers"):
        checkpointer.load(state | {"mine": {1}})
