"""Sampled labels, and losses with a weight per target."""

import pytest
import torch

import model.loss
from common.random_bits import hash64_tensor, sample_labels
from model.loss import HeadSettings
from tests.losses import loss_sum


def test_labels_are_sampled_from_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, -9.0]])
    keys = hash64_tensor(3, torch.arange(100_000))
    counts = torch.bincount(sample_labels(logits.expand(len(keys), -1), keys), minlength=5)
    expected = logits.softmax(-1)[0] * len(keys)
    assert ((counts - expected).abs() < 4 * expected.sqrt() + 1).all(), (counts, expected)
    # Labels at other positions, of other documents or with other seeds are independent.
    draws = [
        sample_labels(torch.zeros(2000, 64), hash64_tensor(seed, torch.full((2000,), d), torch.arange(p, p + 2000)))
        for seed, d, p in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 2000))
    ]
    for i in range(4):
        for j in range(i):
            assert (draws[i] == draws[j]).float().mean() < 0.04  # 1/64 by chance


def test_loss_with_a_weight_per_target(monkeypatch) -> None:
    monkeypatch.setattr(model.loss, "CHUNK_TOKENS", 3)
    torch.manual_seed(0)
    hidden, head = torch.randn(7, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    ids, weights = torch.randint(0, 11, (7,)), torch.tensor([1.0, -1, 1, 1, -1, -1, 1])
    loss = loss_sum(hidden, head, ids, HeadSettings(scale=0.5, softcap=2.0), weights=weights)
    capped = 2.0 * torch.tanh(hidden @ head.T * 0.5 / 2.0)
    expected = (torch.nn.functional.cross_entropy(capped, ids, reduction="none") * weights).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, head)) for x in (loss, expected)), strict=True):
        assert (ours - theirs).abs().max() < 1e-6
