"""The evaluations that are due, the best checkpoint, and the state that a resume keeps."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.errors import UserError
from configs.config import Batch, Config, Data, Model, Optimizer, Run
from data.batches import collate, plan_training, step_batch
from data.dealing import Dealer, length_as_cost
from data.examples import in_memory
from data.sources import Corpus
from training.evaluations import SAVED, Evaluations
from training.inputs import Inputs

CONFIG = Config(Model("m"), Data(("d",)), Batch(1), Optimizer(1e-3), Run("r"))


def made(**run) -> Evaluations:
    found = Evaluations(dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, **run)), None)
    found.functions = dict.fromkeys(("validation", "forgetting"), dict)
    return found


def saved(evaluations: Evaluations) -> dict:
    return {name: getattr(evaluations, name) for name in SAVED}


def again(evaluations: Evaluations, **run) -> Evaluations:
    """A start that resumes."""
    resumed = made(**run)
    resumed.load_state_dict(json.loads(json.dumps(saved(evaluations))))
    return resumed


def test_evaluations_are_due_once_per_step() -> None:
    def due_steps(every: int) -> list[int]:
        evaluations, steps = made(eval_every=every), []
        for step in range(8):
            if "validation" in evaluations.due(step, total_steps=7):
                steps.append(step)
                evaluations.finish("validation", {}, step, step)
                assert evaluations.due(step, 7) == ["forgetting"]  # each evaluation for itself
                assert again(evaluations, eval_every=every).due(step, 7) == ["forgetting"]
        return steps

    assert due_steps(3) == [0, 3, 6, 7]
    assert due_steps(0) == [0, 7]


def test_best_has_lowest_finite_validation_loss() -> None:
    evaluations, improved = made(), []
    for step, loss in enumerate((1.0, math.nan, 2.0, 2.0, math.inf, 1.5)):
        improved.append(evaluations.finish("validation", {"validation/loss": loss}, step, updates=step))
    assert improved == [False, False, True, False, False, True]
    # The base model, of step 0, is never the best, even if it is better.
    assert (evaluations.base_loss, evaluations.best_loss, evaluations.best_step) == (1.0, 1.5, 5)
    assert not evaluations.finish("forgetting", {"forgetting/kl": 0.1}, 5, 5)
    evaluations = made()  # nor one that no step has changed: three without a target token, or skipped
    assert not evaluations.finish("validation", {"validation/loss": 1.0}, 3, updates=0)
    assert (evaluations.base_loss, evaluations.best_step) == (1.0, None)


def test_a_best_step_names_a_better_base() -> None:
    evaluations, remarks = made(), []
    for step, loss in enumerate((2.5, 6.3, 3.0, 4.0, 2.4)):
        is_best = evaluations.finish("validation", {"validation/loss": loss}, step, updates=step)
        remarks.append(evaluations.remark(is_best))
    worse = " (best step so far, but not better than the base: {} against 2.5)"
    assert remarks == ["", worse.format("6.3"), worse.format("3"), "", " (best)"]
    forgetting = made(best_by="forgetting/kl")
    assert not forgetting.finish("forgetting", {"forgetting/kl": 0.0}, 0, 0)
    assert forgetting.remark(forgetting.finish("forgetting", {"forgetting/kl": 0.1}, 3, 3)) == " (best)"


def test_best_by_score_is_the_highest() -> None:
    evaluations, improved = made(best_by="f1", eval_generate=8), []
    figures = [{"validation/f1": 0.9}, {"validation/f1": 0.2}, {}, {"validation/f1": 0.2}, {"validation/f1": 0.5}]
    for step, scores in enumerate(figures):
        improved.append(evaluations.finish("validation", {"validation/loss": 1.0 - step / 8} | scores, step, step))
        assert not evaluations.finish("forgetting", {"forgetting/kl": 0.1}, step, step)
    assert improved == [False, True, False, False, True]
    best = (evaluations.base_value, evaluations.best_value, evaluations.best_step, evaluations.best_loss)
    assert (*best, evaluations.base_loss) == (0.9, 0.5, 4, 0.5, 1.0)


def test_best_by_nll_is_the_lowest() -> None:
    evaluations, improved = made(best_by="validation/nll", stop_after_no_gain=2), []
    for step, (loss, nll) in enumerate(((5.0, 2.0), (1.0, 4.0), (2.0, 3.0), (0.5, 3.5), (3.0, math.nan), (0.4, 3.0))):
        figures = {"validation/loss": loss, "validation/nll": nll}
        improved.append(evaluations.finish("validation", figures, step, updates=step))
    assert improved == [False, True, True, False, False, False]
    best = (evaluations.base_value, evaluations.best_value, evaluations.best_step, evaluations.best_loss)
    assert (evaluations.best_by, *best) == ("validation/nll:min", 2.0, 3.0, 2, 2.0) and evaluations.is_stalled
    assert evaluations.why_stalled(5).endswith("nothing better than the lowest validation/nll, 3 at step 2")
    # A start that judges by the loss again evaluates the last step anew.
    assert "validation" in again(evaluations, best_by="validation/loss").due(5, 5)


def test_run_stalls_without_gain_across_resumes() -> None:
    evaluations, stalled = made(), []
    for step, loss in enumerate((9.0, 3.0, 4.0, 2.0, 2.0, math.nan, 2.5, 2.5)):
        evaluations.finish("validation", {"validation/loss": loss}, step, step)
        stalled.append([again(evaluations, stop_after_no_gain=without).is_stalled for without in (0, 1, 2, 3)])
    assert [row[0] for row in stalled] == [False] * 8
    assert [row[1] for row in stalled] == [False, False, True, False, True, True, True, True]
    assert [row[2] for row in stalled] == [False] * 6 + [True, True]
    assert [row[3] for row in stalled] == [False] * 7 + [True]
    # An edited train.py has ended the run, which may have no evaluation.
    assert made().why_stalled(5) == "ended early after step 5, by a condition of train.py"


def test_changed_criterion_forgets_the_best() -> None:
    evaluations = made()
    evaluations.finish("validation", {"validation/loss": 0.9}, 0, 0)
    evaluations.finish("validation", {"validation/loss": 0.4}, 6, 6)
    evaluations.finish("validation", {"validation/loss": 0.5}, 7, 7)
    same = made()
    assert same.load_state_dict(saved(evaluations)) == [] and same.is_judged and same.without_gain == 1
    changed = made(best_by="f1", eval_generate=8)
    lines = changed.load_state_dict(saved(evaluations))
    assert changed.due(6, 9) == [] and "validation" in changed.due(9, 9) and "validation" not in changed.evaluated
    what = "run.best_by has changed (validation/loss:min -> validation/f1:max of 8 answers)"
    assert lines == [f"{what}: the next evaluation is the first that counts"]
    assert (changed.best_step, changed.best_value, changed.base_value, changed.without_gain) == (None, None, None, 0)
    assert not changed.is_judged  # so that a finished run is not "already finished", but evaluated again


def test_best_by_forgetting_survives_other_validation_data() -> None:
    evaluations = made(best_by="forgetting/kl")
    evaluations.validation = ["before"]
    evaluations.finish("validation", {"validation/loss": 0.9}, 0, 0)
    evaluations.finish("validation", {"validation/loss": 0.5}, 3, 3)
    evaluations.finish("forgetting", {"forgetting/kl": 0.1}, 3, 3)
    for best_by, best_step in {"forgetting/kl": 3, "validation/loss": None}.items():
        resumed = made(best_by=best_by)
        resumed.validation = ["other"]
        lines = resumed.load_state_dict(json.loads(json.dumps(saved(evaluations))))
        assert (resumed.best_step, resumed.best_loss, bool(lines)) == (best_step, None, best_step is None)
        assert (evaluations.base_loss, resumed.base_loss) == (0.9, None)  # of the texts before
        assert "validation" in resumed.due(3, 3)
    assert evaluations.finish("forgetting", {"forgetting/kl": 0.05}, 4, 4)  # nothing to validate on any more
    assert (evaluations.best_step, evaluations.best_loss) == (4, None)


def test_the_documents_of_an_evaluation_are_dealt_once() -> None:
    """For 30,000 documents on 512 ranks that takes seconds, in which all of them wait."""
    documents = [in_memory([np.arange(4)] * 6, [np.arange(4) > first] * 6) for first in (0, 1)]
    train, validation = (Corpus((items_of_batch,)) for items_of_batch in documents)
    dealer, dealt = Dealer(8, length_as_cost), []
    counted = SimpleNamespace(deal=lambda *arguments: dealt.append(arguments) or dealer.deal(*arguments))
    inputs = Inputs(train, None, 0, 0, validation, (), counted, dealer.deal, None, None)  # type: ignore[arg-type]
    rank = SimpleNamespace(world_size=2, rank=1, device=torch.device("cpu"))
    for items, corpus in (((0, 1, 2, 3), validation), ((4, 5), validation), ((4, 5), train)) * 2:
        ids = [batch.target_ids.tolist() for batch in inputs.micro_batches(items, corpus, rank)]  # type: ignore[arg-type]
        expected = [
            collate(items_of_batch, corpus).target_ids.tolist()
            for items_of_batch in dealer.deal(items, corpus, 2).of_rank(1)
        ]
        assert ids == expected
    assert len(dealt) == 3


def test_replaced_plan_decides_documents_and_divisor() -> None:
    corpus = Corpus((in_memory([np.full(4, item) for item in range(4)], [np.arange(4) > 0] * 4),))
    dealer, plan = Dealer(8, length_as_cost), plan_training(corpus, 1, 0, global_examples=2)
    inputs = Inputs(corpus, plan, 2, 0, None, (), dealer, lambda items: dealer.deal(items, corpus, 1), None, CONFIG)
    last_first = dataclasses.replace(plan, batch=lambda step: step_batch([3 - step], corpus))
    edited = dataclasses.replace(inputs, plan=last_first)
    rank = SimpleNamespace(world_size=1, rank=0, device=torch.device("cpu"))
    steps = [
        (batch.input_ids.tolist(), batch.divisor)
        for _, micro_batches in edited.steps(0, rank)  # type: ignore[arg-type]
        for batch, _ in micro_batches
    ]
    assert steps == [([[3] * 4], 3), ([[2] * 4], 3)]
    assert [edited.deal(step).items for step in range(2)] == [(((3,),),), (((2,),),)]


def test_impure_plan_is_refused() -> None:
    """Micro-batches are made in advance: a plan that depends on the loss would follow an earlier loss."""
    corpus, requested = Corpus((in_memory([np.arange(4)] * 2, [np.arange(4) > first for first in (0, 1)]),)), []
    dealer, plan = Dealer(8, length_as_cost), plan_training(corpus, 1, 0, global_examples=2)
    moving = dataclasses.replace(
        plan, batch=lambda step: requested.append(step) or step_batch([requested.count(step) % 2], corpus)
    )
    deal = lambda items: dealer.deal(items, corpus, 1)  # noqa: E731
    inputs = Inputs(corpus, moving, 2, 0, None, (), dealer, deal, None, CONFIG)
    _, micro_batches = next(inputs.steps(0, SimpleNamespace(world_size=1, rank=0, device=torch.device("cpu"))))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="of step 1 are not of the documents that data.plan names now"):
        list(micro_batches)
