"""Weights of targets: in the loss, under FSDP and in the Fisher diagonal. distributed/test_train.py runs whole weighted steps."""

import dataclasses

import numpy as np
import pytest
import torch

from configs.config import EWC, Model, Sharding
from data.batches import collate, plan_training
from distributed.sharding import decoder_layers, make_mesh, parallelize
from model import ewc
from model.ewc import document_numbers, drawn_items, estimate_fisher
from model.loss import LossSums
from tests.in_memory import InMemory, weighted
from tests.losses import loss_of, targets_of
from tests.model.ewc.tiny_ewc import corpus, dealer, signal_is, write_model
from tests.model.test_equivalence import load
from tests.tiny import write_tiny_model

CPU = torch.device("cpu")


def test_weights_of_one_change_no_bit() -> None:
    """If all weights are 1, `target_weights` is None, so that no loss is multiplied."""
    ones = weighted((1.0,), count=3)
    plain = InMemory(ones.ids, [weights > 0 for weights in ones.weights])
    for source in (ones, plain):
        assert collate((0, 2), source).target_weights is None
    mixed = collate((0, 1), InMemory(ones.ids, [plain.weights[0], 3 * ones.weights[1], plain.weights[2]]))
    lengths = [len(ids) - 1 for ids in ones.ids[:2]]
    assert mixed.target_weights.tolist() == [1.0] * lengths[0] + [3.0] * lengths[1]
    batch = plan_training(plain, 1, 0, global_examples=3).batch(0)
    assert type(batch.num_target_tokens) is int
    assert plan_training(ones, 1, 0, global_examples=3).batch(0).num_target_tokens == batch.num_target_tokens


def test_measurements_count_a_target_by_its_weight() -> None:
    sums, weights = LossSums(2, CPU), torch.tensor([0.5, 1.0, 3.0])
    batch = targets_of(torch.arange(3), torch.tensor([0, 1, 1]), weights)
    sums.add([torch.tensor([1.0, 2.0]), torch.tensor([4.0])], batch)
    assert sums.values.tolist() == [14.5, 0.5, 14.0]


def test_fsdp_does_not_round_the_weights_to_bf16(tmp_path, ranks) -> None:
    """With weight 1/3 for every target the loss is a third. 1/3 in bf16 is 0.2% more. An untied head is a unit of its own."""
    model = load(write_tiny_model(tmp_path / "model", tied=False))
    mesh = make_mesh("cpu", 1, Sharding())
    parallelize(
        model, decoder_layers(model), model.extra_fsdp_units(), mesh, torch.bfloat16, Model(path=""), Sharding()
    )
    source = weighted((1.0,), count=4)
    plain = collate((0, 1, 2, 3), source)
    third = torch.full(plain.target_ids.shape, 1 / 3)
    sums = LossSums(1, CPU)
    whole = loss_of(model, plain, sums).item()
    assert loss_of(model, dataclasses.replace(plain, target_weights=third), sums).item() == pytest.approx(
        whole / 3, rel=1e-6
    )
    rounded = third.bfloat16().float()
    assert loss_of(model, dataclasses.replace(plain, target_weights=rounded), sums).item() != pytest.approx(
        whole / 3, rel=1e-3
    )


def test_fisher_counts_a_document_by_its_weight(tmp_path, ranks, monkeypatch) -> None:
    path, settings = write_model(tmp_path), EWC(documents=2, batch=1)
    documents = corpus(1)
    results = {}
    for name, factors in {"one": (1, 0), "other": (0, 1), "both": (4, 1)}.items():
        kept = [i for i in (0, 1) if factors[i]]
        weights = [np.where(documents.get(i)[1], np.float32(factors[i]), np.float32(0)) for i in kept]
        source, first = InMemory([documents.get(i)[0] for i in kept], weights), kept[0]
        # The documents keep their numbers, and therefore their samples.
        numbers = lambda *of, first=first: document_numbers(*of) + (first << 20)  # noqa: E731
        monkeypatch.setattr(ewc, "document_numbers", numbers)
        num_targets = sum(map(source.num_targets, drawn_items(source, settings)))
        fisher = estimate_fisher(load(path), source, settings, dealer(), "full", signal_is(False, ranks))
        results[name] = num_targets, fisher
    (targets_first, fisher_first), (targets_second, fisher_second), (targets_mixed, fisher_mixed) = (
        results["one"],
        results["other"],
        results["both"],
    )
    assert targets_mixed == 4 * targets_first + targets_second
    for name, fisher in fisher_mixed.items():
        torch.testing.assert_close(
            fisher,
            (4 * targets_first * fisher_first[name] + targets_second * fisher_second[name]) / targets_mixed,
            rtol=1e-5,
            atol=1e-12,
        )
