"""Sources, including token stores, are mixed by their shares of target tokens, as a pure function of (seed, step)."""

import numpy as np
import pytest

from data import mixing
from data.batches import TrainingPlan, collate, plan_training
from data.sources import Corpus, Windows
from tests.in_memory import InMemory, chats, micro_batches, texts


def ragged(low: int, high: int, count: int, seed: int, make=chats) -> InMemory:
    return make(np.random.default_rng(seed).integers(low, high, count).tolist())


def three_sources() -> Corpus:
    """Return 70% documents of 20 to 299 tokens, 25% of 2 to 11, 5% of 400 to 512, passed over several times."""
    parts = (ragged(20, 300, 2500, 0), ragged(2, 12, 3000, 1), ragged(400, 513, 40, 2))
    return Corpus(parts, ("main", "short", "long"), (0.7, 0.25, 0.05))


class OfFive:
    """A stand-in for a token store, without files: documents of 5 tokens."""

    fingerprint, path = "fingerprint", "store"

    def __init__(self, tokens: int) -> None:
        self.num_tokens, self.num_documents = tokens, -(-tokens // 5)

    def tokens(self, begin: int, end: int) -> np.ndarray:
        return np.arange(begin, end)

    def ends_between(self, begin: int, end: int) -> list[int]:
        return list(range(begin - begin % 5 + 5, end + 1, 5))


def windows(count: int, size: int = 16) -> Windows:
    store_windows = Windows(store := OfFive(count * size), size)  # pyright: ignore
    # Windows.mean_targets assumes that no window begins with a document. Correct it, so that it is exact here.
    store.num_documents = store.num_tokens - count + 1 - sum(map(store_windows.num_targets, range(count)))
    return store_windows


@pytest.mark.parametrize("size", [{"global_examples": 32}, {"global_tokens": 4000}])
def test_shares_are_within_one_percent_over_100_steps(size) -> None:
    corpus = three_sources()
    plan = plan_training(corpus, 2, 0, **size)
    counts = np.array([plan.batch(step).targets_by_source for step in range(plan.num_steps)])
    assert plan.num_steps >= 140
    for start in (0, 37, plan.num_steps - 100):  # any 100 steps, across epoch boundaries
        realised = counts[start : start + 100].sum(0) / counts[start : start + 100].sum()
        assert np.abs(realised / corpus.shares - 1).max() < 0.01
    if "global_tokens" in size:
        assert 0.97 < counts[:100].sum() / (100 * 4000) <= 1.0


def test_step_depends_on_seed_and_number_alone() -> None:
    in_sequence = plan_training(three_sources(), 1, 0, global_examples=32)
    steps = [in_sequence.batch(step) for step in range(in_sequence.num_steps)]
    for step in (0, 63, 77, in_sequence.num_steps - 1):
        corpus = three_sources()
        batch = plan_training(corpus, 1, 0, global_examples=32).batch(step)
        assert batch == steps[step]
        items = sorted(batch.items)
        for ranks in (1, 2, 4):
            dealt = [m for rank in range(ranks) for m in micro_batches(batch.items, corpus, 3 * 512, rank, ranks)]
            assert sorted(item for micro in dealt for item in micro) == items
    assert plan_training(three_sources(), 1, 1, global_examples=32).batch(0) != steps[0]


def test_block_size_does_not_change_the_plan(monkeypatch) -> None:
    batches_by_order = []
    for block in (mixing.BLOCK, 700):
        monkeypatch.setattr(mixing, "BLOCK", block)
        plan = plan_training(three_sources(), 2, 0, global_tokens=4000)
        batches_by_order.append([plan.batch(step) for step in range(0, plan.num_steps, 20)])
    assert batches_by_order[0] == batches_by_order[1]


def test_stream_repeats_only_after_a_whole_epoch() -> None:
    mixed = chats([7, 1, 9, 4])  # a document of one token has no target and is skipped
    corpus = Corpus((ragged(20, 60, 500, 0), mixed), ("main", "mixed"), (0.9, 0.1))
    plan = plan_training(corpus, 1, 0, global_examples=1)
    # Items within a step are sorted by length, so use steps that take at most one document of the mixed-in source.
    taken = [item - 500 for s in range(plan.num_steps) for item in plan.batch(s).items if item >= 500]
    assert len(taken) > 60 and set(taken) == {0, 2, 3}
    assert all(sorted(taken[i : i + 3]) == [0, 2, 3] for i in range(0, len(taken) - 3, 3))
    assert len({tuple(taken[i : i + 3]) for i in range(0, len(taken) - 3, 3)}) > 1  # every epoch has its own order
    passes = plan.passes(plan.num_steps)
    assert passes[0] == 1.0 and passes[1] == pytest.approx(len(taken) / 3, abs=0.5)


@pytest.mark.parametrize("size", [{"global_examples": 7}, {"global_tokens": 90}])
def test_every_window_is_visited_once_per_epoch(size) -> None:
    source = windows(103)
    plan = plan_training(source, 3, 5, **size)
    orders = []
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch[0], (epoch + 1) * plan.steps_per_epoch[0])
        orders.append([item for s in steps for item in plan.batch(s).items])
        assert sorted(orders[-1]) == list(range(103))
    assert orders[0] != orders[1] != orders[2]
    batch = plan.batch(4)
    exact = sum(source.num_targets(item) for item in batch.items)
    assert batch.num_target_tokens == exact < 16 * len(batch.items)
    assert sum(batch.document_lengths) == 16 * len(batch.items)


def test_collate_separates_documents_and_gives_sources() -> None:
    corpus = Corpus((chats([4]), windows(3)), ("main", "store"), (0.5, 0.5))
    batch = collate((2, 0), corpus)  # the window of tokens 16 to 31, where documents begin at 20, 25 and 30
    assert batch.document_lengths == (4, 5, 5, 2, 4)
    assert batch.target_ids.tolist() == [17, 18, 19, 21, 22, 23, 24, 26, 27, 28, 29, 31, 2, 3]
    assert batch.target_positions.tolist() == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 14, 17, 18]
    assert batch.position_ids[0].tolist() == [*range(4), *range(5), *range(5), *range(2), *range(4)]
    assert batch.target_sources.tolist() == [1] * 12 + [0] * 2
    assert collate((), corpus).target_sources.tolist() == []
    assert collate((0,), corpus.sources[0]).target_sources is None


def brought(plan: TrainingPlan, source: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return the target tokens of the main source and of a mixed-in one in every step."""
    counts = np.array([plan.batch(step).targets_by_source for step in range(plan.num_steps)], dtype=float)
    return counts[:, 0], counts[:, source]


SIZES = [{"global_examples": 12}, {"global_tokens": 2000}]
LONG = ragged(200, 900, 60, 3, texts)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.05, 0.3])
@pytest.mark.parametrize("main", [ragged(60, 300, 700, 0), windows(3000)], ids=["chats", "store"])
def test_source_has_its_share_over_promised_steps(main, share, size) -> None:
    """Check the bounds of data/mixing.py over any range of steps in two epochs, including the smaller last steps."""
    corpus = Corpus((main, LONG), ("main", "texts"), (1 - share, share))
    plan = plan_training(corpus, 2, 0, **size)
    own, texts_of = brought(plan)
    ratio, largest = share / (1 - share), LONG.targets.max()
    missing = np.concatenate([[0], np.cumsum(texts_of - ratio * own)])
    assert np.ptp(missing) <= largest and np.abs(missing).max() <= largest / 2
    (steps,) = plan.steps_of_shares
    # With a limit on tokens, steps are expected to be full, but they are not.
    assert steps == pytest.approx(
        4 * largest / (ratio * own.sum() / len(own)), rel=0.02 if "global_examples" in size else 0.25, abs=1
    )
    over = [np.convolve(counts, np.ones(steps), "valid") for counts in (own, texts_of) if steps <= plan.num_steps]
    if over:
        usual = over[0] >= 0.5 * steps * own.mean()
        realised = (over[1] / (over[0] + over[1]))[usual]
        assert usual.mean() > 0.95 and share / 2 <= realised.min() and realised.max() <= 2 * share


def test_mixed_in_items_are_never_cut() -> None:
    """Every target of a text is predicted from all of the text before it: its median context is half of its length."""
    corpus = Corpus((ragged(60, 300, 700, 0), LONG), ("main", "texts"), (0.95, 0.05))
    plan = plan_training(corpus, 2, 0, global_examples=12)
    context, taken = [], []
    for step in range(plan.num_steps):
        for items in micro_batches(plan.batch(step).items, corpus, 900):
            batch = collate(items, corpus)
            of_texts = batch.target_sources == 1
            context.append((batch.position_ids[0, batch.target_positions[of_texts]] + 1).numpy())
            taken += [item - 700 for item in items if item >= 700]
    assert len(taken) == 12 and np.median(np.concatenate(context)) > 250
    assert sum(map(len, context)) == LONG.targets[taken].sum()
    assert np.concatenate(context).max() == LONG.targets[taken].max()


# A window of the main store has 12 targets, but a step reserves room for the 15 that it may have.
@pytest.mark.parametrize(
    ("main", "used"), [(ragged(60, 300, 700, 0), 0.85), (windows(3000), 0.6)], ids=["chats", "store"]
)
def test_no_step_has_more_than_global_tokens(main, used) -> None:
    """Mix in long texts, chats, or windows of a store."""
    mixed = LONG, ragged(100, 500, 80, 4), windows(60, 256)
    for parts, shares in ((mixed, (0.1, 0.2, 0.1)), (mixed[1:2], (0.05,))):
        corpus = Corpus((main, *parts), ("main", "a", "b", "c")[: len(parts) + 1], (1 - sum(shares), *shares))
        plan = plan_training(corpus, 2, 0, global_tokens=1500)
        totals = np.array([plan.batch(step).num_target_tokens for step in range(plan.num_steps)])
        assert totals.max() <= 1500 and not plan.warnings
        lasts = np.cumsum(plan.steps_per_epoch) - 1
        assert np.delete(totals, lasts).mean() > 1500 * used


def test_steps_above_global_tokens_are_announced() -> None:
    main = chats([100] * 200 + [700] * 3)
    corpus = Corpus((main, ragged(20, 100, 200, 3, texts)), ("main", "texts"), (0.9, 0.1))
    plan = plan_training(corpus, 2, 0, global_tokens=300)
    totals = [plan.batch(step).num_target_tokens for step in range(plan.num_steps)]
    above = [total for total in totals if total > 300]
    assert len(above) == 6 and plan.warnings[0].startswith(f"warning: 6 of {plan.num_steps} steps may have more than")
    assert f"up to {max(above)}: one example of the main source" in plan.warnings[0]
