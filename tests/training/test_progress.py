"""A run's position: what is due at a step, which evaluation was the best, which checkpoint is good, and the saved state."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common.errors import UserError
from data.batches import StepBatch
from distributed.checkpoint_directory import write_manifest
from distributed.process_group import Ranks
from training.progress import Progress, find_progress

CPU = torch.device("cpu")


@pytest.fixture
def ranks():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, CPU, dist.group.WORLD)
    dist.destroy_process_group()


def test_an_evaluation_is_due_first_last_and_every_so_many_steps_and_once_at_each() -> None:
    def due_steps(every: int) -> list[int]:
        progress, steps = Progress({}, {}, [0]), []
        for progress.step in range(8):
            if progress.is_due("validation", every, total_steps=7):
                steps.append(progress.step)
                progress.finish_evaluation("validation", {})
                assert not progress.is_due("validation", every, total_steps=7)
                assert progress.is_due("forgetting", every, total_steps=7)  # each evaluation for itself
        return steps

    assert due_steps(3) == [0, 3, 6, 7]
    assert due_steps(0) == [0, 7]


def test_the_best_evaluation_has_the_lowest_finite_validation_loss_of_a_trained_model() -> None:
    progress, improved = Progress({}, {}, [0]), []
    for progress.step, loss in enumerate((1.0, math.nan, 2.0, 2.0, math.inf, 1.5)):
        progress.updates = progress.step
        improved.append(progress.finish_evaluation("validation", {"validation/loss": loss}))
    assert improved == [False, False, True, False, False, True]
    # The base model, of step 0, is never the best, even if it is better.
    assert (progress.base_loss, progress.best_loss, progress.best_step) == (1.0, 1.5, 5)
    assert not progress.finish_evaluation("forgetting", {"forgetting/kl": 0.1})


def test_a_model_that_no_step_has_changed_is_the_base_model_at_any_step() -> None:
    progress = Progress({}, {}, [0], step=3)  # three steps without a target token, or skipped
    assert not progress.finish_evaluation("validation", {"validation/loss": 1.0})
    assert (progress.base_loss, progress.best_step) == (1.0, None)


def test_the_best_by_a_score_is_the_highest_and_an_evaluation_without_it_does_not_count() -> None:
    progress, improved = Progress({}, {}, [0], best_by="validation/f1:max of 8 answers"), []
    figures = [{"validation/f1": 0.9}, {"validation/f1": 0.2}, {}, {"validation/f1": 0.2}, {"validation/f1": 0.5}]
    for progress.step, scores in enumerate(figures):
        progress.updates = progress.step
        improved.append(progress.finish_evaluation("validation", {"validation/loss": 1.0 - progress.step / 8} | scores))
        assert not progress.finish_evaluation("forgetting", {"forgetting/kl": 0.1})
    assert improved == [False, True, False, False, True]
    best = (progress.base_value, progress.best_value, progress.best_step, progress.best_loss, progress.base_loss)
    assert best == (0.9, 0.5, 4, 0.5, 1.0)


def test_a_run_is_finished_after_so_many_evaluations_without_gain_and_says_so_in_its_state() -> None:
    progress, finished = Progress({}, {}, [0]), []
    for progress.step, loss in enumerate((9.0, 3.0, 4.0, 2.0, 2.0, math.nan, 2.5, 2.5)):
        progress.updates = progress.step
        progress.finish_evaluation("validation", {"validation/loss": loss})
        again = Progress(**json.loads(json.dumps(progress.as_json())))
        finished.append([again.is_finished(7, without) for without in (0, 1, 2, 3)])
    assert [row[0] for row in finished] == [False] * 7 + [True]  # all steps are taken
    assert [row[1] for row in finished] == [False, False, True, False, True, True, True, True]
    assert [row[2] for row in finished] == [False] * 6 + [True, True]
    assert [row[3] for row in finished] == [False] * 7 + [True]


def test_an_export_without_checkpoints_is_not_trained_over(tmp_path, ranks) -> None:
    (tmp_path / "export").mkdir()
    with pytest.raises(UserError, match="export exists, but the checkpoints of its run are gone; to train again"):
        find_progress(tmp_path / "checkpoints", Progress({}, {}, [0]), "auto", 10, ranks)


def test_a_checkpoint_is_good_once_an_update_has_started_from_it() -> None:
    progress = Progress({}, {}, [0])

    def step(updates: int) -> None:
        progress.step += 1
        progress.updates += updates

    step(1)
    assert progress.good_checkpoint() == 0  # nothing is saved: the base model
    progress.finish_save({})  # of step 1
    step(0)
    assert progress.good_checkpoint() == 0  # step 2 was skipped, so the weights of step 1 may be bad
    assert progress.finish_save({})["proven_step"] == 0  # a checkpoint of the same weights proves nothing about them
    progress.saved_step = 1
    step(1)
    assert progress.good_checkpoint() == 1
    assert progress.finish_save({})["proven_step"] == 1  # saved with step 3
    step(0)
    assert progress.good_checkpoint() == 1
    step(1)
    assert progress.good_checkpoint() == 3


def test_a_periodic_save_stays_due_until_it_is_done() -> None:
    progress, due = Progress({}, {}, [0]), []
    for progress.step in range(1, 10):
        due.append(progress.is_save_due(4))
        if progress.step == 6:  # steps 4 and 5 were skipped
            progress.finish_save({})
    assert due == [False, False, False, True, True, True, False, True, True]
    assert not progress.is_save_due(0)


def test_steps_are_counted_and_the_saved_state_is_read_as_it_is() -> None:
    progress = Progress({"settings": {}}, {}, [0, 0])
    progress.finish_step(StepBatch((), 5, 2, (4, 1), (10, 7)))
    progress.finish_step(StepBatch((), 3, 1, (0, 3), (6,)))
    assert (progress.step, progress.tokens, progress.targets) == (2, 23, [4, 4])
    assert Progress(**json.loads(json.dumps(progress.as_json()))) == progress


def saved(folder: Path, **state: object) -> None:
    (folder / "step-000004").mkdir(exist_ok=True)
    write_manifest(folder / "step-000004", state, {})


def identity(**settings: object) -> dict:
    names = ("the data", "config.json", "the weights", "the tokenizer", "versions", "the code", "the scores' code")
    return {"settings": {f"optimizer.{name}": value for name, value in settings.items()}} | {name: {} for name in names}


def test_a_checkpoint_of_another_identity_version_or_length_is_refused(tmp_path, ranks) -> None:
    fresh = Progress(identity(eps=1), {}, [0])
    saved(tmp_path, **Progress(identity(eps=1), {}, [7], step=4).as_json())
    progress, checkpoint, lines = find_progress(tmp_path, fresh, "auto", 10, ranks)
    assert (progress.step, progress.targets, checkpoint, lines) == (4, [7], tmp_path / "step-000004", lines[:1])
    with pytest.raises(UserError, match="step-000004 was made with optimizer.eps=1, now it is 2; set it back"):
        find_progress(tmp_path, Progress(identity(eps=2), {}, [0]), "auto", 10, ranks)
    with pytest.raises(UserError, match="is at step 4, beyond the 3 steps of this config"):
        find_progress(tmp_path, fresh, "auto", 3, ranks)
    saved(tmp_path, step=4, skipped=0, evaluated=-1, identity=identity(eps=1), settings={})
    with pytest.raises(UserError, match="another version of this code wrote its manifest.json"):
        find_progress(tmp_path, fresh, "auto", 10, ranks)


def test_a_changed_run_has_its_new_identity_after_a_step_and_a_clean_record(tmp_path, ranks) -> None:
    bad = Progress(identity(eps=1), {}, [7], step=4, saved_step=4, bad_steps_in_a_row=3)
    saved(tmp_path, **bad.as_json())
    same, _, _ = find_progress(tmp_path, Progress(identity(eps=1), {"ranks": 2}, [0]), "changed", 10, ranks)
    assert same.bad_steps_in_a_row == 3 and same.settings == {"ranks": 2}
    fresh = Progress(identity(eps=2), {}, [0, 0])
    progress, _, lines = find_progress(tmp_path, fresh, "changed", 10, ranks)
    assert "was made with optimizer.eps=1, now it is 2; run.resume=changed continues" in lines[1]
    assert (progress.bad_steps_in_a_row, progress.targets) == (0, [0, 0])
    assert progress.as_json()["identity"] == identity(eps=1)  # of an evaluation before the first step
    assert progress.finish_save(fresh.identity)["identity"] == fresh.identity
    assert fresh.identity["settings"] == {"optimizer.eps": 2} and fresh.identity["changed"][0]["step"] == 4
