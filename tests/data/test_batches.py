"""Plans are pure functions of (seed, step), lose and repeat nothing, and do not depend on the number of ranks."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches import StepBatch, TrainingPlan, plan_pass, plan_training
from data.sources import Corpus
from tests.data.test_mixing import windows
from tests.in_memory import chats as documents

lengths_of = st.lists(st.integers(2, 64), min_size=1, max_size=60)


def batches(plan: TrainingPlan) -> list[StepBatch]:
    return [plan.batch(step) for step in range(plan.num_steps)]


@settings(max_examples=25)
@given(lengths_of, st.integers(1, 9), st.integers(0, 5))
def test_an_epoch_contains_every_document_once(lengths, size, seed) -> None:
    source = documents(lengths)
    plan = plan_training(source, epochs=2, seed=seed, global_examples=size)
    per_epoch = -(-len(lengths) // size)
    assert plan.steps_per_epoch == (per_epoch, per_epoch) and plan.num_steps == 2 * per_epoch
    for epoch in range(2):
        steps = batches(plan)[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(d for batch in steps for d in batch.items) == list(range(len(lengths)))
        assert [len(batch.items) for batch in steps[:-1]] == [size] * (per_epoch - 1)
    for batch in batches(plan):
        assert batch.num_target_tokens == source.targets[list(batch.items)].sum() == sum(batch.targets_by_source)
        assert sorted(batch.document_lengths) == sorted(source.lengths[list(batch.items)])
    assert [plan.passes(step)[0] for step in (0, per_epoch, 2 * per_epoch)] == [0.0, 1.0, 2.0]


@settings(max_examples=25)
@given(lengths_of, st.integers(1, 200))
def test_global_tokens_limits_the_targets_of_every_step(lengths, tokens) -> None:
    source = documents(lengths)
    plan = plan_training(source, 1, 3, global_tokens=tokens)
    assert sorted(d for batch in batches(plan) for d in batch.items) == list(range(len(lengths)))
    for batch in batches(plan):
        assert batch.num_target_tokens <= tokens or len(batch.items) == 1


def test_a_plan_is_pure_and_epochs_differ() -> None:
    source = documents([5, 9, 3, 12, 7, 7, 2, 30])
    plan = plan_training(source, 2, 0, global_examples=3)
    assert batches(plan) == batches(plan_training(source, 2, 0, global_examples=3))
    assert batches(plan) != batches(plan_training(source, 2, 1, global_examples=3))
    assert batches(plan)[:3] != batches(plan)[3:]
    longer = plan_training(source, 3, 0, global_examples=3)
    assert batches(longer)[: plan.num_steps] == batches(plan)  # more epochs leave the earlier ones unchanged


def test_order_of_single_source_is_unchanged() -> None:
    """Runs that were stopped under an earlier version can resume: each step has the same documents."""
    source = documents([5, 9, 3, 12, 7, 7, 2, 30, 11, 6])
    assert [sorted(batch.items) for batch in batches(plan_training(source, 2, 0, global_examples=4))] == [
        [2, 4, 6, 7],
        [0, 3, 5, 9],
        [1, 8],
        [1, 3, 8, 9],
        [0, 4, 6, 7],
        [2, 5],
    ]
    assert [len(batch.items) for batch in batches(plan_training(source, 1, 1, global_tokens=20))] == [2, 2, 5, 1]


@settings(max_examples=25)
@given(lengths_of, st.integers(1, 20), st.integers(1, 300))
def test_pass_takes_every_item_once_in_order(lengths, count, tokens) -> None:
    source, store = documents(lengths), windows(count)
    corpus = Corpus((source, store), ("main", "store"), (0.5, 0.5))
    steps = plan_pass(corpus, tokens)
    assert [item for batch in steps for item in batch.items] == list(range(len(lengths) + count))
    targets_by_source = [source.targets.sum(), sum(store.get(i)[1].sum() for i in range(count))]
    assert np.sum([batch.targets_by_source for batch in steps], axis=0).tolist() == targets_by_source
    assert sum(batch.num_target_tokens for batch in steps) == sum(targets_by_source)
    sizes = [sum(batch.document_lengths) for batch in steps]
    assert all(size <= tokens or len(batch.items) == 1 for size, batch in zip(sizes, steps, strict=True))
    for size, following in zip(sizes, steps[1:], strict=False):  # a step ends only before an item that does not fit
        assert size + corpus.num_tokens(following.items[0]) > tokens
