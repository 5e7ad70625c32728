"""The sum of losses of a micro-batch as train.py computes it, and a head made of a plain weight."""

from types import SimpleNamespace

import torch
from torch import nn

from model.language_model import PackedLanguageModel
from model.loss import HeadSettings, LossSums, chunked, negative_log_likelihood


def loss_of(model: PackedLanguageModel, batch, loss_sums: LossSums | None = None) -> torch.Tensor:
    """The sum of -log p over the targets of `batch`."""
    return chunked(model.head, model(batch), batch, negative_log_likelihood, loss_sums)


def head_of(weight: torch.Tensor, settings: HeadSettings | None = None) -> nn.Module:
    """A head that lends `weight` itself, so that gradients arrive there."""
    head = nn.Module()
    head.weight = weight if isinstance(weight, nn.Parameter) else None
    head.settings, head.add_gradient = settings or HeadSettings(), None
    head.forward = lambda hidden, function: function(hidden, weight)
    return head


def targets_of(ids: torch.Tensor, sources: torch.Tensor | None = None, weights: torch.Tensor | None = None, divisor=1):
    """What a loss reads of a micro-batch."""
    return SimpleNamespace(target_ids=ids, target_sources=sources, target_weights=weights, divisor=divisor)


def loss_sum(hidden, weight, ids, settings=None, sources=None, loss_sums=None, weights=None) -> torch.Tensor:
    """The sum of -log p over targets `ids`, for hidden states and the weight of a head."""
    return chunked(
        head_of(weight, settings), hidden, targets_of(ids, sources, weights), negative_log_likelihood, loss_sums
    )
