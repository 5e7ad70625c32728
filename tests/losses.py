"""The sum of losses of a micro-batch as in train.py and as in transformers, and a head with a plain weight."""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from model.language_model import PackedLanguageModel
from model.loss import HeadSettings, LossSums, chunked, negative_log_likelihood


def loss_of(model: PackedLanguageModel, batch, loss_sums: LossSums | None = None) -> torch.Tensor:
    """Return the sum of -log p over the targets of `batch`."""
    return chunked(model.head, model(batch), batch, negative_log_likelihood, loss_sums)


def eager(
    path: str | Path, ids: list, weights: list, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: str
) -> tuple[PreTrainedModel, torch.Tensor]:
    """Return (transformers' model with eager attention, the sum of weight x -log p over all targets), each document alone.

    `ids` and `weights` have a numpy array for each document. `options` are passed to `from_pretrained`.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager", **options).to(device)
    total = torch.zeros((), device=device)
    for tokens, factors in zip(ids, weights, strict=True):
        tokens, factors = (torch.from_numpy(array).to(device) for array in (tokens, factors))
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
        total = total + (factors[1:] * F.cross_entropy(logits, tokens[1:], reduction="none")).sum()
    return model, total


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, floor: float = 1.0) -> None:
    """Check that gradients differ by less than 1e-5 times the tensor's largest gradient, or 1e-5 times `floor` if that is more."""
    expected, parameters = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        scale = max(floor, expected[name].grad.abs().max().item())
        assert (parameter.grad - expected[name].grad).abs().max().item() < 1e-5 * scale, name


def head_of(weight: torch.Tensor, settings: HeadSettings | None = None) -> nn.Module:
    """Return a head that passes `weight` itself to the loss, so that `weight` gets the gradient."""
    head = nn.Module()
    head.weight = weight if isinstance(weight, nn.Parameter) else None
    head.settings, head.add_gradient = settings or HeadSettings(), None
    head.forward = lambda hidden, function: function(hidden, weight)
    return head


def targets_of(ids: torch.Tensor, sources: torch.Tensor | None = None, weights: torch.Tensor | None = None, divisor=1):
    """Return the part of a micro-batch that a loss reads."""
    return SimpleNamespace(target_ids=ids, target_sources=sources, target_weights=weights, divisor=divisor)


def loss_sum(hidden, weight, ids, settings=None, sources=None, loss_sums=None, weights=None) -> torch.Tensor:
    """Return the sum of -log p over targets `ids`, for hidden states and the weight of a head."""
    return chunked(
        head_of(weight, settings), hidden, targets_of(ids, sources, weights), negative_log_likelihood, loss_sums
    )
