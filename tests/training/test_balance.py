"""What the start of a run says about idle ranks."""

import dataclasses

import pytest

from configs.config import Batch, Config, Data, Model, Optimizer, Run
from data.batches import plan_training
from data.dealing import Dealer, one_per_token
from data.sources import as_corpus
from tests.data.test_batches import documents
from training.balance import balance_of_ranks, steps_looked_at
from training.inputs import Inputs


def inputs_of(lengths: list[int], ranks: int, epochs: int = 1, **size) -> tuple[Config, Inputs]:
    """A run on documents of these lengths, in micro-batches of at most 64 tokens."""
    config = Config(Model("m"), Data(("a",), sequence_length=64), Batch(**size), Optimizer(1e-4), Run("r"))
    corpus = as_corpus(documents(lengths))
    plan = plan_training(corpus, epochs, 0, **size)
    dealer = Dealer(64, one_per_token)

    def deal(step: int):
        return dealer.deal(plan.batch(step).items, corpus, ranks)

    return config, Inputs(corpus, plan, plan.num_steps, 0, None, None, dealer, deal, None)


def said(lengths: list[int], ranks: int, **size) -> tuple[str, list[str]]:
    return balance_of_ranks(*inputs_of(lengths, ranks, **size), ranks)


def test_equal_documents_for_all_ranks_are_no_reason_to_warn() -> None:
    assert said([60] * 32, 4, global_examples=8) == ("; ranks wait for each other in 0% of it", [])


@pytest.mark.parametrize(
    ("size", "key"), [({"global_examples": 6}, "global_examples"), ({"global_tokens": 180}, "global_tokens")]
)
def test_the_warning_says_what_mends_it(size, key) -> None:
    """6 documents for 4 ranks: two micro-batches, of which the second has 2 idle ranks. With 12 documents none is idle."""
    share, (warning,) = said([60] * 48, 4, **size)
    assert share == "; ranks wait for each other in 25% of it"
    assert warning == (
        "the ranks wait for each other in 25% of a step, because its documents have different lengths and are few for 4 ranks; "
        f"raise batch.{key} or use fewer ranks"
    )
    assert said([60] * 48, 4, **{key: 2 * size[key]})[1] == [] and said([60] * 48, 2, **size)[1] == []


def test_the_short_last_step_of_an_epoch_is_left_out() -> None:
    _, inputs = inputs_of([60] * 20, 1, epochs=2, global_examples=8)
    assert [inputs.plan.batch(step).num_examples for step in range(6)] == [8, 8, 4, 8, 8, 4]
    assert steps_looked_at(inputs) == [0, 1]
    assert steps_looked_at(dataclasses.replace(inputs, total_steps=1)) == [0]  # optimizer.max_steps=1
    _, single = inputs_of([60] * 20, 1, epochs=3, global_examples=32)
    assert steps_looked_at(single) == [0]  # the only step of its epoch


def test_at_most_twenty_steps_are_looked_at() -> None:
    _, inputs = inputs_of([60] * 1001, 1, global_examples=2)
    steps = steps_looked_at(inputs)
    assert steps[0] == 0 and steps[-1] > 470 and len(set(steps)) == 20
