"""The loss of anchored targets: KL to the base over 64 tokens and a bucket, beside the `token_losses` of all other targets."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model.loss
from model.loss import LossSums, anchored, bucket_log_probabilities, chunked, kl_to_base, negative_log_likelihood
from tests.losses import head_of, targets_of

TARGETS, VOCABULARY, WIDTH, TOKENS, WEIGHT = 90, 300, 16, 64, 0.5


def in_fp64(base: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the KL over the 64 most probable tokens of `base` and the rest, by plain sums of probabilities."""
    p, q = base.double().softmax(-1), logits.double().softmax(-1)
    top = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(TOKENS).indices, True)
    kl = (p * (p / q).log() * top).sum(-1)
    rest_p, rest_q = (p * ~top).sum(-1), (q * ~top).sum(-1)
    return kl + rest_p * (rest_p / rest_q).log()


def predicted(base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities and ids that training/anchor.py keeps of the base's logits."""
    ids = base.topk(TOKENS).indices
    return bucket_log_probabilities(base, ids).half(), ids.int()


@pytest.mark.parametrize("sharpness", [0.1, 1, 4, 30])
def test_kl_equals_plain_sums_in_fp64(sharpness) -> None:
    """From almost uniform distributions to distributions in which 64 tokens have all but 1e-12 of the mass."""
    torch.manual_seed(0)
    base, logits = sharpness * torch.randn(2, TARGETS, VOCABULARY)
    log_p, ids = predicted(base)
    kl = kl_to_base(logits, log_p, ids.long())
    expected = in_fp64(base, logits)
    assert kl.dtype == torch.float32
    # fp16 has a relative rounding error of 2^-11.
    torch.testing.assert_close(kl.double(), expected, rtol=2e-3, atol=1e-4)
    exact = kl_to_base(logits, bucket_log_probabilities(base, ids.long()), ids.long())
    torch.testing.assert_close(exact.double(), expected, rtol=1e-5, atol=1e-6)
    itself = kl_to_base(base, log_p, ids.long())
    assert itself.abs().max() < 2e-5


def mixed(base_logits: torch.Tensor, is_anchored: torch.Tensor, ids: torch.Tensor) -> SimpleNamespace:
    """Return a micro-batch whose targets at `is_anchored` have an anchor and belong to source 1."""
    log_p, base_ids = predicted(base_logits[is_anchored])
    batch = targets_of(ids, is_anchored.long())
    where = is_anchored.numpy()
    batch.base_rows, batch.base_log_p, batch.base_ids = np.where(where, where.cumsum() - 1, -1), log_p, base_ids
    return batch


def edited(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return losses that are not cross-entropy, as a researcher may write them."""
    return F.cross_entropy(logits, targets, reduction="none") ** 2


@pytest.mark.parametrize("token_losses", [negative_log_likelihood, edited])
def test_mixed_micro_batch_in_chunks_is_exact(monkeypatch, token_losses) -> None:
    """Loss, gradients and sums by source are exact, wherever chunks begin."""
    torch.manual_seed(0)
    hidden = torch.randn(TARGETS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    base, ids = 2 * torch.randn(TARGETS, VOCABULARY), torch.randint(0, VOCABULARY, (TARGETS,))
    is_anchored = torch.zeros(TARGETS, dtype=torch.bool)
    is_anchored[5:23] = is_anchored[40:41] = is_anchored[60:80] = True
    batch = mixed(base, is_anchored, ids)
    logits = F.linear(hidden, weight).double()
    kl, plain_losses = in_fp64(base, logits)[is_anchored], token_losses(logits, ids)[~is_anchored]
    (WEIGHT * kl.sum() + plain_losses.sum()).backward()
    expected = [tensor.grad.clone() for tensor in (hidden, weight)]
    for chunk, part in ((1024, 256), (35, 10)):
        monkeypatch.setattr(model.loss, "CHUNK_TOKENS", chunk)
        monkeypatch.setattr(model.loss, "LOSS_TOKENS", part)
        hidden.grad = weight.grad = None
        sums = LossSums(2, torch.device("cpu"))
        loss = chunked(head_of(weight), hidden, batch, anchored(token_losses, batch, WEIGHT), sums)
        loss.backward()
        assert sums.by_source.tolist() == pytest.approx([plain_losses.sum().item(), WEIGHT * kl.sum().item()], rel=1e-3)
        assert loss.item() == pytest.approx(sums.by_source.sum().item(), rel=1e-5)
        for tensor, reference in zip((hidden, weight), expected, strict=True):
            error = (tensor.grad - reference).norm() / reference.norm()
            assert error.item() < 1e-3  # from rounding log-probabilities to fp16


def test_token_losses_is_unchanged_without_anchored_targets() -> None:
    batch = targets_of(torch.arange(3))
    batch.base_rows = batch.base_log_p = batch.base_ids = None
    assert anchored(edited, batch, WEIGHT) is edited
