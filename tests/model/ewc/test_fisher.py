"""The Fisher estimators against loops over documents, and their choice of documents, in one process."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.config import EWC
from data.batches import collate
from model.ewc import document_numbers, draw, drawn_items, estimate_fisher
from tests.data.test_mixing import windows
from tests.model.ewc.tiny_ewc import DIFFERENT, corpus, dealer, signal_is, write_model
from tests.model.test_equivalence import load


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Write a model with a single layer, because an estimate takes a backward for each of up to 256 groups."""
    return write_model(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture(scope="module")
def exact(path) -> dict[str, dict[str, torch.Tensor]]:
    """Compute both Fisher diagonals in fp64 with transformers' eager model and a backward for each document and label."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float64)
    parameters = dict(model.named_parameters())
    diagonals = {kind: {n: torch.zeros_like(p) for n, p in parameters.items()} for kind in ("model", "empirical")}
    documents = corpus(1)
    for ids, flags in zip(documents.ids, documents.weights, strict=True):
        where = torch.from_numpy(np.flatnonzero(flags))
        log_p = model(torch.from_numpy(ids)[None]).logits[0, where - 1].log_softmax(-1)
        loss = log_p[torch.arange(len(where)), torch.from_numpy(ids)[where]].sum()
        gradients = torch.autograd.grad(loss, parameters.values(), retain_graph=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            diagonals["empirical"][name] += gradient.square()
        one_hot = torch.eye(log_p.numel(), dtype=torch.float64).view(-1, *log_p.shape)
        gradients = torch.autograd.grad(log_p, parameters.values(), one_hot, is_grads_batched=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            diagonals["model"][name] += torch.einsum("i,i...->...", log_p.detach().exp().flatten(), gradient.square())
    return {k: {n: f / documents.targets.sum() for n, f in v.items()} for k, v in diagonals.items()}


def error(estimate: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Return the relative L2 error over all parameters together."""
    assert estimate.keys() == exact.keys()
    squared = sum(float((estimate[n].double() - exact[n]).square().sum()) for n in exact)
    return (squared / sum(float(f.square().sum()) for f in exact.values())) ** 0.5


def estimate(path, ranks, estimator: str, copies: int, batch: int = 4, seed: int = 0):
    source, settings = corpus(copies), EWC(estimator=estimator, documents=10**6, batch=batch, seed=seed)
    assert len(drawn_items(source, settings)) == copies * DIFFERENT
    return estimate_fisher(load(path), source, settings, dealer(), "full", signal_is(False, ranks))


@pytest.fixture(scope="module")
def largest(path, ranks) -> dict[str, dict[str, torch.Tensor]]:
    """Run each estimator with 1,024 documents in groups of 4."""
    return {estimator: estimate(path, ranks, estimator, 16, seed=1) for estimator in ("model", "empirical")}


@pytest.mark.parametrize("estimator, other_estimator", [("model", "empirical"), ("empirical", "model")])
def test_each_estimator_converges_to_its_own_diagonal(exact, largest, estimator, other_estimator) -> None:
    assert error(largest[estimator], exact[estimator]) < 0.12
    assert error(largest[estimator], exact[other_estimator]) > 0.2  # not to the other estimator's diagonal


@pytest.mark.parametrize("estimator", ["model", "empirical"])
def test_the_error_falls_with_the_number_of_groups(path, ranks, exact, largest, estimator) -> None:
    """sqrt(2 x batch / documents): 18% for 256 documents in groups of 4, 35% in groups of 16, 8.8% for the largest."""
    for batch in (4, 16):
        errors = [error(estimate(path, ranks, estimator, 4, batch, seed), exact[estimator]) for seed in range(3)]
        expected = (2 * batch / (4 * DIFFERENT)) ** 0.5
        assert 0.5 * expected < sum(errors) / 3 < 1.3 * expected, (batch, errors)
    assert 0.4 * 0.088 < error(largest[estimator], exact[estimator]) < 1.3 * 0.088


def test_groups_of_one_document_are_exact(path, ranks, exact) -> None:
    """The sign does not change the square, so the empirical estimator equals the loop over documents."""
    assert error(estimate(path, ranks, "empirical", 1, batch=1), exact["empirical"]) < 1e-5


def test_documents_are_drawn_from_all_data() -> None:
    drawn = [drawn_items(corpus(4), EWC(documents=32, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and all(len(set(items)) == 32 and max(items) > 128 for items in drawn)


def test_documents_of_a_window_have_independent_signs() -> None:
    source = windows(2, 10)  # two windows with documents of 5 tokens
    items = drawn_items(source, EWC(documents=10))
    assert sorted(items) == [0, 1]
    batch, numbers = collate(items, source), document_numbers(items, source)
    assert len(set(numbers.tolist())) == 4 and sorted(n >> 20 for n in numbers.tolist()) == [0, 0, 1, 1]
    for seed in range(20):
        signs = draw("empirical", batch, numbers, seed)[0].target_weights
        signs_by_document = signs.split([n - 1 for n in batch.document_lengths])
        assert all(len(set(part.tolist())) == 1 for part in signs_by_document)
        if len({part[0].item() for part in signs_by_document}) == 2:
            return
    raise AssertionError("all documents had the same sign for every seed")
