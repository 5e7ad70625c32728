"""The workload of a plan: its steps and its worst micro-batch are those that the ranks of a run compute."""

import functools
import json

import numpy as np
import pytest
from transformers import LlamaConfig

from data.batches import collate, plan_training
from data.dealing import Dealer, balance
from data.sources import Windows, as_corpus
from data.token_build import build_store
from data.token_store import open_store, tokenizer_fingerprint
from model.flops import step_flops
from planner import workload
from planner.shape import shape_of
from planner.workload import planned_workload, uniform_workload
from tests.in_memory import chats, texts, weighted
from tests.tiny import WORDS, tiny_tokenizer
from training.inputs import Inputs

LENGTH = 128
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def shape():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=300
    )
    return shape_of("tiny", config)


def inputs_of(
    source, shape, ranks=1, rows=1, packing=True, pair_weight=1, examples=8, epochs=2, max_steps=None
) -> Inputs:
    """Like training.inputs.read_inputs, of a source in memory."""
    corpus = as_corpus(source)
    plan = plan_training(corpus, epochs=epochs, seed=0, global_examples=examples)
    costs = functools.partial(shape.work.costs, pair_weight=pair_weight)
    dealer = Dealer(rows * LENGTH if packing else rows, costs, packing)

    def deal(step: int):
        return dealer.deal(plan.batch(step).items, corpus, ranks)

    return Inputs(corpus, plan, max_steps or plan.num_steps, 0, None, None, dealer, deal, None)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("packing", [True, False])
def test_steps_and_worst_micro_batch_are_those_of_a_run(shape, ranks, packing) -> None:
    source = chats(RANDOM.integers(10, LENGTH, 30))
    run = inputs_of(source, shape, ranks, rows=2, packing=packing)
    # The inputs that a planner has were read for another micro-batch and one rank.
    found = planned_workload(inputs_of(source, shape, packing=packing), shape, 2, LENGTH, ranks)
    assert found.total_steps == len(found.steps) == run.total_steps == 8 and found.is_exact
    most = 0
    for step, work in enumerate(found.steps):
        batch, deal = run.plan.batch(step), run.deal(step)
        assert (work.step, work.tokens, work.targets) == (step, sum(batch.document_lengths), batch.num_target_tokens)
        assert work.micro_batches == len(deal.items) and work.balance == balance([deal])
        assert work.flops == step_flops(shape.work, batch.document_lengths, batch.num_target_tokens)
        for micro_batch in deal.items:
            most = max([most, *(sum(collate(items, run.train).document_lengths) for items in micro_batch if items)])
    worst = found.worst
    assert worst.tokens == most
    candidates = [micro_batch[worst.rank] for micro_batch in run.deal(worst.step).items]
    tensors = [collate(items, run.train) for items in candidates]
    assert any(one.document_lengths == worst.lengths and len(one.target_ids) == worst.targets for one in tensors)


def test_the_deals_are_those_of_the_planned_device(shape, monkeypatch) -> None:
    monkeypatch.setattr(workload, "PAIR_WEIGHTS", {"cpu": 10**6, "cuda": 1})
    inputs = inputs_of(texts(RANDOM.integers(10, LENGTH, 40)), shape, examples=20)
    on = {kind: planned_workload(inputs, shape, 1, LENGTH, 4, kind).steps[0].balance for kind in ("cpu", "cuda")}
    for kind, weight in workload.PAIR_WEIGHTS.items():
        deal = inputs_of(inputs.train, shape, 4, pair_weight=weight, examples=20).deal(0)
        assert on[kind] == balance([deal])
    assert on["cpu"] != on["cuda"]


def test_only_the_steps_of_the_run_are_looked_at_and_not_more_than_the_limit(shape, monkeypatch) -> None:
    lengths = [20] * 47 + [100]
    inputs = inputs_of(texts(lengths), shape, examples=1, epochs=1, max_steps=40)
    longest = max(inputs.plan.batch(step).document_lengths[0] for step in range(40))
    found = planned_workload(inputs, shape, 1, LENGTH, 1)
    assert found.total_steps == len(found.steps) == 40 and found.worst.tokens == longest and found.is_exact
    monkeypatch.setattr(workload, "MOST_DEALS", 5)
    monkeypatch.setattr(workload, "MOST_STEPS", 3)
    bounded = planned_workload(inputs, shape, 1, LENGTH, 1)
    assert bounded.total_steps == 40 and not bounded.is_exact
    assert [step.step for step in bounded.steps] == [0, 20, 39]


def test_targets_of_the_worst_are_a_number_of_tokens_and_not_a_sum_of_weights(shape) -> None:
    inputs = inputs_of(weighted((0.0, 0.25)), shape)
    worst = planned_workload(inputs, shape, 1, LENGTH, 2).worst
    batches = [collate(items, inputs.train) for items in all_items(inputs, 2)]
    assert worst.targets in {len(b.target_ids) for b in batches if b.document_lengths == worst.lengths}


def all_items(inputs: Inputs, ranks: int):
    for step in range(inputs.total_steps):
        for micro_batch in inputs.dealer.deal(inputs.plan.batch(step).items, inputs.train, ranks).items:
            yield from (items for items in micro_batch if items)


def test_a_token_store(shape, tmp_path) -> None:
    documents = [" ".join(RANDOM.choice(WORDS, RANDOM.integers(1, 40))) for _ in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    build_store([tmp_path / "texts.jsonl"], tiny_tokenizer(), tmp_path / "store", 10**6)
    store = open_store(tmp_path / "store", tokenizer_fingerprint(tiny_tokenizer()), LENGTH)
    source = Windows(store, "", "", store.mean_targets)
    inputs = inputs_of(source, shape, examples=4, epochs=1)
    found = planned_workload(inputs, shape, 2, LENGTH, 2)
    assert sum(step.tokens for step in found.steps) == store.num_tokens
    assert sum(step.targets for step in found.steps) == sum(map(source.num_targets, range(len(source))))
    assert found.worst.tokens == 2 * LENGTH  # two windows for each of two ranks
    pairs = [
        store.document_lengths(a) + store.document_lengths(b) for a in range(len(store)) for b in range(len(store))
    ]
    assert found.worst.lengths in pairs and found.worst.targets == 2 * LENGTH - len(found.worst.lengths)


@pytest.mark.parametrize(
    "examples,global_examples,rows,ranks", [(20, 8, 1, 4), (21, 8, 3, 2), (7, 64, 2, 4), (5, 5, 8, 1)]
)
def test_a_uniform_workload_is_that_of_equal_documents(shape, examples, global_examples, rows, ranks) -> None:
    length = 32
    found = uniform_workload(shape, examples, length, global_examples, 3, rows, ranks)
    inputs = inputs_of(texts([length] * examples), shape, examples=global_examples, epochs=3)
    real = planned_workload(inputs, shape, rows, length, ranks)
    assert found.total_steps == real.total_steps and found.worst.lengths == real.worst.lengths
    for ours, theirs in zip(found.steps, real.steps, strict=True):
        assert (ours.step, ours.tokens, ours.micro_batches) == (theirs.step, theirs.tokens, theirs.micro_batches)
        assert ours.balance == pytest.approx(theirs.balance, abs=0.02)  # costs of a text have one target less
        assert ours.flops == pytest.approx(theirs.flops, rel=0.02)
