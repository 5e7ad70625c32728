"""What the start of a run says about idle ranks, and that the batch size it names does mend it."""

import dataclasses

import pytest

from configs.config import Batch, Config, Data, Model, Optimizer, Run
from data.batches import plan_training
from data.dealing import Dealer, balance, one_per_token
from data.sources import as_corpus
from tests.data.test_batches import documents
from training.balance import balance_line, balance_warnings, steps_looked_at
from training.inputs import Inputs


def inputs_of(lengths: list[int], ranks: int, epochs: int = 1, packing: bool = True, **size) -> tuple[Config, Inputs]:
    """A run on documents of these lengths, in micro-batches of at most 64 tokens."""
    config = Config(Model("m"), Data(("a",), sequence_length=64), Batch(**size), Optimizer(1e-4), Run("r"))
    corpus = as_corpus(documents(lengths))
    plan = plan_training(corpus, epochs, 0, **size)
    dealer = Dealer(64, one_per_token)

    def deal(step: int):
        return dealer.deal(plan.batch(step).items, corpus, ranks)

    return config, Inputs(corpus, plan, plan.num_steps, 0, None, None, dealer, deal, None)


def warnings_of(lengths: list[int], ranks: int, **size) -> list[str]:
    config, inputs = inputs_of(lengths, ranks, **size)
    return balance_warnings(config, inputs, [inputs.deal(step) for step in steps_looked_at(inputs)], ranks)


def test_equal_documents_for_all_ranks_are_no_reason_to_warn() -> None:
    assert warnings_of([60] * 32, 4, global_examples=8) == []


@pytest.mark.parametrize(
    ("size", "key"), [({"global_examples": 6}, "global_examples"), ({"global_tokens": 180}, "global_tokens")]
)
def test_the_warning_names_a_batch_size_that_mends_it(size, key) -> None:
    """6 documents for 4 ranks: two micro-batches, of which the second has 2 idle ranks. With 12 documents none is idle."""
    (warning,) = warnings_of([60] * 48, 4, **size)
    assert warning == (
        "the ranks wait for each other: the balance is 0.75, because a step has 6 examples of different lengths for 4 ranks; "
        f"batch.{key}={2 * size[key]} would make it about 1.00, and 2 ranks would make it about 1.00"
    )
    assert warnings_of([60] * 48, 4, **{key: 2 * size[key]}) == [] and warnings_of([60] * 48, 2, **size) == []


def test_where_nothing_mends_it_the_warning_says_what_to_try() -> None:
    (warning,) = warnings_of([64, *[2] * 3], 3, global_examples=4)
    assert warning.endswith("lengths for 3 ranks; 1 rank would make it about 1.00")
    (warning,) = warnings_of([64], 17, global_examples=4)
    assert warning.endswith("for 17 ranks; raise batch.global_examples or use fewer ranks")


def test_the_line_gives_the_mean_and_the_least_balanced_step() -> None:
    _, inputs = inputs_of([60] * 8, 3, global_examples=3)
    deals = [inputs.deal(step) for step in range(inputs.plan.num_steps)]
    assert [round(balance([deal]), 3) for deal in deals] == [1.0, 1.0, 0.667]
    assert balance_line(deals).startswith(
        "balance 0.89: by FLOPs, a mean rank waits for others in 11% of a step"
    ) and "least of 3 steps: 0.67" in balance_line(deals)


def test_the_short_last_step_of_an_epoch_is_left_out() -> None:
    _, inputs = inputs_of([60] * 20, 1, epochs=2, global_examples=8)
    assert [inputs.plan.batch(step).num_examples for step in range(6)] == [8, 8, 4, 8, 8, 4]
    assert steps_looked_at(inputs) == [0, 1, 3, 4]
    assert steps_looked_at(dataclasses.replace(inputs, total_steps=3)) == [0, 1]  # optimizer.max_steps=3
    _, single = inputs_of([60] * 20, 1, epochs=3, global_examples=32)
    assert steps_looked_at(single) == [0, 1, 2]  # the only steps there are


def test_at_most_twenty_steps_are_looked_at() -> None:
    _, inputs = inputs_of([60] * 1001, 1, global_examples=2)
    steps = steps_looked_at(inputs)
    assert steps[0] == 0 and steps[-1] > 470 and len(set(steps)) == 20


def test_the_batch_size_that_is_named_has_room_above_the_threshold() -> None:
    """9 documents for 8 ranks. Four times as many give 36 / 40, which is 0.90 and too close; six times 54 / 56."""
    (warning,) = warnings_of([60] * 720, 8, global_examples=9)
    assert "the balance is 0.56" in warning and "batch.global_examples=54 would make it about 0.96" in warning
