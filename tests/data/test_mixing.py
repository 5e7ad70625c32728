"""Sources, including token stores, are mixed by their shares of target tokens, as a pure function of (seed, step)."""

import dataclasses

import numpy as np
import pytest

from data.batches import collate, micro_batches, plan_training, plan_validation
from data.examples import Documents
from data.sources import Corpus, Windows


def documents(lengths, name: str = "") -> Documents:
    ids = [np.arange(n) + 1000 * i for i, n in enumerate(lengths)]
    is_target = [np.arange(n) >= max(1, n // 2) for n in lengths]
    return Documents(ids, is_target, np.array(lengths), np.array([f.sum() for f in is_target]), name, name)


def ragged(low: int, high: int, count: int, seed: int) -> Documents:
    return documents(np.random.default_rng(seed).integers(low, high, count).tolist(), f"{low} to {high}")


def three_sources() -> Corpus:
    """70% documents of 20 to 299 tokens, 25% of 2 to 11, 5% of 400 to 512, passed over several times."""
    parts = (ragged(20, 300, 2500, 0), ragged(2, 12, 3000, 1), ragged(400, 513, 40, 2))
    return Corpus(parts, ("main", "short", "long"), (0.7, 0.25, 0.05))


class Store:
    """A stand-in for a token store, without files: documents of 5 tokens, split where a window ends."""

    def __init__(self, windows: int, size: int = 16) -> None:
        self.windows, self.size = windows, size

    def __len__(self) -> int:
        return self.windows

    def window_length(self, i: int) -> int:
        return self.size

    def document_lengths(self, i: int) -> tuple[int, ...]:
        edges = [t for t in range(i * self.size, (i + 1) * self.size) if t % 5 == 0 or t == i * self.size]
        return tuple(int(n) for n in np.diff([*edges, (i + 1) * self.size]))

    def window(self, i: int) -> tuple[np.ndarray, tuple[int, ...]]:
        return np.arange(i * self.size, (i + 1) * self.size), self.document_lengths(i)


def windows(count: int) -> Windows:
    exact = [16 - len(Store(count).document_lengths(i)) for i in range(count)]
    return Windows(Store(count), "fingerprint", "store", sum(exact) / count)


@pytest.mark.parametrize("size", [{"global_examples": 32}, {"global_tokens": 4000}])
def test_shares_are_within_one_percent_over_100_steps(size) -> None:
    corpus = three_sources()
    plan = plan_training(corpus, 2, 0, 512, **size)
    counts = np.array([plan.batch(step).targets_by_source for step in range(plan.num_steps)])
    assert plan.num_steps >= 140
    for start in (0, 37, plan.num_steps - 100):  # any 100 steps, across epoch boundaries
        realised = counts[start : start + 100].sum(0) / counts[start : start + 100].sum()
        assert np.abs(realised / corpus.shares - 1).max() < 0.01
    if "global_tokens" in size:
        assert 0.97 < counts[:100].sum() / (100 * 4000) <= 1.0
    # The check must notice a source whose share is 10% too large.
    wrong = dataclasses.replace(corpus, shares=(0.675, 0.275, 0.05))
    plan = plan_training(wrong, 2, 0, 512, **size)
    counts = np.array([plan.batch(step).targets_by_source for step in range(100)]).sum(0)
    assert np.abs(counts / counts.sum() / corpus.shares - 1).max() > 0.05


def test_mixing_does_not_change_the_order_of_the_main_source() -> None:
    corpus = three_sources()
    alone, mixed = (plan_training(source, 1, 3, 512, global_examples=16) for source in (corpus.sources[0], corpus))
    assert alone.num_steps == mixed.num_steps
    for step in (0, 1, 100, alone.num_steps - 1):
        own = {item for row in alone.batch(step).rows for item in row}
        assert {item for row in mixed.batch(step).rows for item in row if item < 2500} == own
        assert mixed.batch(step).targets_by_source[0] == alone.batch(step).num_target_tokens
        assert all(sum(corpus.document_lengths(i)[0] for i in row) <= 512 for row in mixed.batch(step).rows)


def test_a_step_does_not_depend_on_earlier_calls_or_on_the_number_of_ranks() -> None:
    in_sequence = plan_training(three_sources(), 1, 0, 512, global_examples=32)
    steps = [in_sequence.batch(step) for step in range(in_sequence.num_steps)]
    for step in (0, 63, 77, in_sequence.num_steps - 1):
        corpus = three_sources()
        batch = plan_training(corpus, 1, 0, 512, global_examples=32).batch(step)
        assert batch == steps[step]
        items = sorted(item for row in batch.rows for item in row)
        for ranks in (1, 2, 4):
            dealt = [m for rank in range(ranks) for m in micro_batches(batch.rows, corpus, rank, ranks, 3)]
            assert sorted(item for micro in dealt for item in micro) == items
    assert plan_training(three_sources(), 1, 1, 512, global_examples=32).batch(0) != steps[0]


def test_a_stream_repeats_a_document_only_after_taking_all_others() -> None:
    other = documents([7, 1, 9, 4])  # a document of one token has no target and is skipped
    corpus = Corpus((ragged(20, 60, 500, 0), other), ("main", "other"), (0.9, 0.1))
    plan = plan_training(corpus, 1, 0, 64, global_examples=1)
    # Items within a step are sorted by length, so use steps that take at most one document of the other source.
    taken = [item - 500 for s in range(plan.num_steps) for row in plan.batch(s).rows for item in row if item >= 500]
    assert len(taken) > 60 and set(taken) == {0, 2, 3}
    assert all(sorted(taken[i : i + 3]) == [0, 2, 3] for i in range(0, len(taken) - 3, 3))
    assert len({tuple(taken[i : i + 3]) for i in range(0, len(taken) - 3, 3)}) > 1  # every epoch has its own order
    passes = plan.passes(plan.num_steps)
    assert passes[0] == 1.0 and passes[1] == pytest.approx(len(taken) / 3, abs=0.5)


def test_a_stream_repeats_a_window_only_after_taking_all_others() -> None:
    corpus = Corpus((ragged(20, 60, 900, 0), windows(7)), ("main", "store"), (0.9, 0.1))
    plan = plan_training(corpus, 1, 0, 64, global_examples=1)
    taken = [item - 900 for s in range(plan.num_steps) for row in plan.batch(s).rows for item in row if item >= 900]
    epochs = [tuple(taken[i : i + 7]) for i in range(0, len(taken) - 6, 7)]
    assert len(epochs) > 15 and all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 10  # every epoch has its own order


@pytest.mark.parametrize("size", [{"global_examples": 7}, {"global_tokens": 90}])
def test_every_window_of_a_store_is_visited_once_per_epoch(size) -> None:
    source = windows(103)
    plan = plan_training(source, 3, 5, 16, **size)
    orders = []
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch[0], (epoch + 1) * plan.steps_per_epoch[0])
        orders.append([item for s in steps for row in plan.batch(s).rows for item in row])
        assert sorted(orders[-1]) == list(range(103))
    assert orders[0] != orders[1] != orders[2]
    batch = plan.batch(4)
    exact = sum(source.num_targets(item) for row in batch.rows for item in row)
    assert batch.num_target_tokens == exact < 16 * batch.num_examples
    assert sum(batch.document_lengths) == 16 * batch.num_examples


@pytest.mark.parametrize("store_is_main", [True, False])
def test_the_shares_of_a_store_are_exact(store_is_main) -> None:
    parts = (windows(4000), ragged(8, 17, 300, 0))
    corpus = Corpus(parts if store_is_main else parts[::-1], ("main", "other"), (0.9, 0.1))
    plan = plan_training(corpus, 14, 0, 16, global_examples=40)
    counts = sum(np.array(plan.batch(s).targets_by_source) for s in range(100))
    assert np.abs(counts / counts.sum() / corpus.shares - 1).max() < 0.01


def test_collate_separates_the_documents_of_a_window_and_gives_the_source_of_each_target() -> None:
    corpus = Corpus((documents([4]), windows(3)), ("main", "store"), (0.5, 0.5))
    batch = collate((2, 0), corpus)  # the window of tokens 16 to 31, where documents begin at 20, 25 and 30
    assert batch.document_lengths == (4, 5, 5, 2, 4)
    assert batch.target_ids.tolist() == [17, 18, 19, 21, 22, 23, 24, 26, 27, 28, 29, 31, 2, 3]
    assert batch.position_ids[0].tolist() == [*range(4), *range(5), *range(5), *range(2), *range(4)]
    assert batch.target_sources.tolist() == [1] * 12 + [0] * 2
    assert collate((), corpus).target_sources.tolist() == []
    assert collate((0,), corpus.sources[0]).target_sources is None


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (2, 3), (64, 8)])
def test_validation_contains_every_item_of_every_source_once(world_size, micro_batch) -> None:
    corpus = Corpus((ragged(2, 60, 90, 0), windows(50)), ("main", "store"), (0.5, 0.5))
    plan = plan_validation(corpus, 64, world_size, micro_batch)
    batches = [plan.batch(step) for step in range(plan.num_steps)]
    assert sorted(item for batch in batches for row in batch.rows for item in row) == list(range(140))
    counts = np.sum([batch.targets_by_source for batch in batches], axis=0)
    exact = sum(corpus.sources[1].num_targets(i) for i in range(50))
    assert counts.tolist() == [corpus.sources[0].targets.sum(), exact]
