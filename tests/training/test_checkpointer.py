"""From which checkpoint a run continues, when it saves, and which checkpoint is known to be good."""

import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import UserError
from configs.config import Batch, Config, Data, Model, Optimizer, Run
from distributed.checkpoint_directory import write_manifest
from distributed.process_group import Ranks
from training.checkpointer import Checkpointer, plan_after
from training.evaluations import Evaluations

CONFIG = Config(Model("m"), Data(("d",)), Batch(1), Optimizer(1e-3), Run("r"))
IDENTITY = dict.fromkeys(("config.json", "versions", "the data", "the tokenizer", "the code", "the scores' code"), {})
IDENTITY |= {"settings": {"run.seed": 1}, "the weights": {"model.safetensors": "123"}, "the data": {"data.mix": None}}


def made(folder: Path, ranks: Ranks, identity: dict = IDENTITY, settings: dict | None = None, **run) -> Checkpointer:
    config = dataclasses.replace(CONFIG.run, **run)
    log = SimpleNamespace(sync=lambda: None, save=lambda times: None)
    stop = SimpleNamespace(ranks=ranks, clock=0.0, saving=contextlib.nullcontext)  # a signal never comes
    record = SimpleNamespace(so_far=dict, append=lambda kind, **content: "", continue_from=lambda *arguments: [])
    made = Checkpointer(folder, config, identity, settings or {}, Evaluations(CONFIG, None), stop, log, record)
    made.saver = SimpleNamespace(save=lambda *arguments: saves.append(arguments[0]), poll=lambda: [], wait=lambda: None)
    saves: list[dict] = []
    made.saves = saves
    return made


def counted(step: int, updates: int | None = None, bad: int = 0) -> dict:
    return {"step": step, "updates": step if updates is None else updates, "targets": [step], "bad_steps_in_a_row": bad}


def write(folder: Path, step: int, ranks: Ranks, **others) -> None:
    """A checkpoint of a step, without tensors."""
    checkpointer = made(folder, ranks, **others)
    checkpointer.save(counted(step, bad=2))
    (folder / f"step-{step:06d}").mkdir(parents=True, exist_ok=True)
    write_manifest(folder / f"step-{step:06d}", checkpointer.saves[-1], {}, {})


def test_an_export_without_checkpoints_is_not_trained_over(tmp_path, ranks) -> None:
    (tmp_path / "export").mkdir()
    with pytest.raises(UserError, match="export exists, but the checkpoints of its run are gone; to train again"):
        made(tmp_path / "checkpoints", ranks).find(counted(0), 10)


def test_after_an_exclusion_a_finished_run_starts_from_the_base_also_after_a_kill(tmp_path, ranks) -> None:
    folder = tmp_path / "checkpoints"
    write(folder, 4, ranks)
    (tmp_path / "export").mkdir()
    exclusion = SimpleNamespace(fingerprint="f", digests=["d"], first_step=lambda steps: 1, lines=("5 examples",))

    def found() -> list[str]:
        checkpointer = made(folder, ranks)
        checkpointer.record.read = list
        lines = checkpointer.find(counted(0), 10, exclusion)
        assert checkpointer.resume_from is None and not (folder / "step-000004").exists()
        return lines

    seen = "warning: step 2 has seen an example of data.exclude: the run continues from the base model; step-000004.bad are"
    assert found() == ["5 examples", f"{seen} not used any more"]
    assert found() == ["5 examples"]  # killed before its first checkpoint


def test_a_checkpoint_of_another_plan_may_have_seen_what_is_excluded(tmp_path, ranks) -> None:
    """Trained with another seed or other data, and continued with run.resume=changed."""
    folder, batches, plan = tmp_path / "checkpoints", [(1, 2), (3, 4), (5, 6)], ""
    for step in (2, 3):
        write(folder, step, ranks)
    for step in (1, 2):
        plan = plan_after(plan, step, ["s"], batches[step - 1])
    whole = SimpleNamespace(items=batches.__getitem__)
    exclusion = SimpleNamespace(fingerprint="f", digests=["d"], first_step=lambda steps: 2, lines=(), whole=whole)

    def found(trained: str) -> Checkpointer:
        checkpointer = made(folder, ranks)
        checkpointer.record.sources, checkpointer.record.read = ["s"], list
        checkpointer.record.named = lambda step, manifest: SimpleNamespace(content={"plan": trained})
        with contextlib.suppress(KeyError):  # the identity here has no first step
            checkpointer.find(counted(0), 10, exclusion)
        return checkpointer

    with pytest.raises(
        UserError, match="step-000002 was trained on other documents, or in another order, than what is"
    ):
        found("of another seed")
    assert (folder / "step-000003").is_dir()
    assert found(plan)._newest_without(exclusion, folder / "step-000003") == (folder / "step-000002", 3)


def test_a_checkpoint_is_good_once_an_update_has_started_from_it(tmp_path, ranks) -> None:
    checkpointer = made(tmp_path, ranks)

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


def test_a_periodic_save_stays_due_until_it_is_done_and_a_step_is_saved_once(tmp_path, ranks) -> None:
    """By steps, or by the clock of rank 0 since the last one."""
    checkpointer, due = made(tmp_path, ranks, save_every=4), []
    for step in range(1, 10):
        due.append(checkpointer.is_due(step))
        if step == 6:  # steps 4 and 5 were skipped
            checkpointer.save(counted(step))
            checkpointer.save(counted(step))
    assert due == [False, False, False, True, True, True, False, True, True]
    assert [state["step"] for state in checkpointer.saves] == [6]
    checkpointer, due = made(tmp_path, ranks, save_minutes=2.0), []
    for step, clock in enumerate((0.0, 1000.0, 1060.0, 1119.0, 1120.0, 1200.0, 1239.0, 1240.0), 1):
        checkpointer.stop.clock = clock  # 0: no poll has been answered yet
        due.append(checkpointer.is_due(step))
        if due[-1]:
            checkpointer.save(counted(step))
    assert due == [False, False, False, False, True, False, False, True]
    never = made(tmp_path, ranks, save_minutes=0.0)
    for never.stop.clock in (1.0, 1e9):
        assert not never.is_due(4)


def other(rate: float) -> dict:
    return IDENTITY | {"settings": {"run.seed": 1, "optimizer.learning_rate": rate}}


def test_a_resume_continues_with_what_was_counted_and_another_identity_is_that_of_the_next_step(
    tmp_path, ranks
) -> None:
    write(tmp_path, 4, ranks, identity=other(1.0), settings={"run.export": "last"})
    state = counted(0)
    same = made(tmp_path, ranks, other(1.0), {"run.export": "best"})
    lines = same.find(state, 10)
    assert state == counted(4, bad=2) and same.resume_from == tmp_path / "step-000004" and not same.is_changed
    assert lines == ["changed since step 4 was saved:", "    run.export: last -> best"]
    with pytest.raises(UserError, match="is at step 4, beyond the 3 steps of this config; raise optimizer.max_steps"):
        made(tmp_path, ranks, other(1.0)).find(counted(0), 3)
    with pytest.raises(UserError, match="optimizer.learning_rate=1.0, now it is 0.5; set it back"):
        made(tmp_path, ranks, other(0.5)).find(counted(0), 10)
    state, changed = counted(0), made(tmp_path, ranks, other(0.5), {"run.export": "last"}, resume="changed")
    lines = changed.find(state, 10)
    assert "optimizer.learning_rate=1.0, now it is 0.5" in lines[0] and changed.is_changed
    assert state == counted(4)  # another learning rate starts with a clean record
    # What is evaluated before the first step is of the old weights.
    assert changed._manifest(state)["identity"] == other(1.0)
    changed.save(counted(5))
    assert changed.saves[-1]["identity"]["settings"] == other(0.5)["settings"] and not changed.is_changed
    mixed = other(1.0) | {"the data": {"data.mix": ["other"]}}
    made(tmp_path, ranks, mixed, resume="changed").find(state := counted(0), 10)
    assert state["targets"] == [0]  # those of step 4 are of other sources


def test_the_rows_of_a_step_are_on_the_disk_before_its_checkpoint_is(tmp_path, ranks) -> None:
    checkpointer, order = made(tmp_path, ranks), []
    checkpointer.log.sync = lambda: order.append("rows")
    checkpointer.saver.save = checkpointer.saver.update_state = lambda *state: order.append("checkpoint")
    checkpointer.save(counted(3))
    checkpointer.update(counted(3))  # an evaluation that finished later
    assert order == ["rows", "checkpoint"] * 2


def test_what_the_loop_counts_has_a_name_of_its_own_and_must_be_plain(tmp_path, ranks) -> None:
    checkpointer = made(tmp_path, ranks)
    checkpointer.save(counted(4) | {"loss": 7.0, "best_step": 1})
    saved = checkpointer.saves[-1]
    assert saved["loop"]["loss"] == 7.0 and saved["loss"] is None and saved["best_step"] is None
    (tmp_path / "step-000004").mkdir()
    write_manifest(tmp_path / "step-000004", saved, {}, {})
    state = counted(0) | {"loss": 0.0, "best_step": 0, "mine": 3}  # of which one is newer than the checkpoint
    made(tmp_path, ranks).find(state, 10)
    assert (state["step"], state["loss"], state["best_step"], state["mine"]) == (4, 7.0, 1, 3)
    with pytest.raises(UserError, match=r"state\['mine'\] is a set; use numbers"):
        checkpointer.load(state | {"mine": {1}})
