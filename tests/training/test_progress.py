"""A run's position: what is due at a step, which evaluation was the best, bad steps in a row, and the saved state."""

import json
import math

import pytest
import torch
import torch.distributed as dist

from common.errors import UserError
from data.batches import StepBatch
from distributed.process_group import Ranks
from training.progress import BadSteps, Progress, find_progress

CPU = torch.device("cpu")


@pytest.fixture
def ranks():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, CPU, dist.group.WORLD)
    dist.destroy_process_group()


def test_an_evaluation_is_due_first_last_and_every_so_many_steps_and_once_at_each() -> None:
    def due_steps(every: int) -> list[int]:
        progress, steps = Progress({}, [0]), []
        for progress.step in range(8):
            if progress.is_due("validation", every, total_steps=7):
                steps.append(progress.step)
                progress.finish_evaluation("validation", {})
                assert not progress.is_due("validation", every, total_steps=7)
                assert progress.is_due("forgetting", every, total_steps=7)  # each evaluation for itself
        return steps

    assert due_steps(3) == [0, 3, 6, 7]
    assert due_steps(0) == [0, 7]


def test_the_best_evaluation_has_the_lowest_finite_validation_loss() -> None:
    progress = Progress({}, [0])
    losses = (math.nan, 2.0, 2.0, math.inf, 1.5)
    improved = [progress.finish_evaluation("validation", {"validation/loss": loss}) for loss in losses]
    assert improved == [False, True, False, False, True] and progress.best_loss == 1.5
    assert not progress.finish_evaluation("forgetting", {"forgetting/kl": 0.1})


def test_steps_are_counted_and_the_saved_state_is_read_as_it_is() -> None:
    progress = Progress({"run.seed": 1}, [0, 0])
    progress.finish_step(StepBatch((), 5, 2, (4, 1), (10, 7)))
    progress.finish_step(StepBatch((), 3, 1, (0, 3), (6,)))
    assert (progress.step, progress.tokens, progress.targets) == (2, 23, [4, 4])
    assert Progress(**json.loads(json.dumps(progress.as_json()))) == progress


def test_bad_steps_in_a_row_are_seen_even_if_good_ones_follow_before_the_next_row() -> None:
    progress = Progress({}, [0])
    bad_steps = BadSteps(progress, limit=3, device=CPU)
    for bad in (True, True, False, True, True):
        bad_steps.add(torch.tensor(bad))
    assert not bad_steps.update(progress)
    assert (progress.skipped_steps, progress.bad_steps_in_a_row) == (4, 2)
    for bad in (True, False):
        bad_steps.add(torch.tensor(bad))
    assert bad_steps.update(progress) and progress.skipped_steps == 5


def test_a_checkpoint_of_another_version_meaning_or_length_is_refused(tmp_path, ranks) -> None:
    def save(**state: object) -> None:
        (tmp_path / "step-000004" / "state.json").write_text(json.dumps(state))

    (tmp_path / "step-000004").mkdir()
    meaning = {"run.seed": 1, "data.train": "abc"}
    save(**Progress(meaning, [7], step=4).as_json())
    progress, checkpoint = find_progress(tmp_path, meaning, 1, 10, ranks)
    assert (progress.step, progress.targets, checkpoint) == (4, [7], tmp_path / "step-000004")
    with pytest.raises(UserError, match="step-000004 was made with run.seed=1, now it is 2"):
        find_progress(tmp_path, meaning | {"run.seed": 2}, 1, 10, ranks)
    with pytest.raises(UserError, match="was made with other data in data.train"):
        find_progress(tmp_path, meaning | {"data.train": "xyz"}, 1, 10, ranks)
    with pytest.raises(UserError, match="is at step 4, beyond the 3 steps of this config"):
        find_progress(tmp_path, meaning, 1, 3, ranks)
    save(step=4, skipped=0, evaluated=-1)
    with pytest.raises(UserError, match="another version of this code wrote its state.json"):
        find_progress(tmp_path, meaning, 1, 10, ranks)
