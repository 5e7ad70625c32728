"""The sum of target-token losses, with logits for target tokens only, computed in chunks.

It is a sum, not a mean: the loop divides once by the number of target tokens (or the sum of their weights) of the whole
step (all ranks, all micro-batches). A mean per micro-batch gives a token more weight the fewer targets share its micro-batch
(transformers#34191).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from data.batches import MicroBatch

CHUNK_TOKENS = 1024  # targets whose logits exist at once, in the compute dtype: 1024 x 151,936 x 2 bytes = 311 MB
LOSS_TOKENS = 256  # targets whose fp32 logits exist at once, with what their loss makes of them: 4 x 155 MB

TokenLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits fp32 `(targets, vocabulary)`, targets int64 `(targets,)`) -> losses fp32 `(targets,)`, by differentiable operations."""
Visit = Callable[[torch.Tensor, int], None]  # (logits fp32 (rows, vocabulary), index of the first target)


@dataclass(frozen=True)
class HeadSettings:
    """How a model turns the product of hidden state and head into logits.

    scale: `logit_scale` of Cohere, 1 / `logits_scaling` of Granite. softcap: c * tanh(x / c) (Gemma 2, arXiv:2408.00118,
    section 2). num_tokens: rows of the head that are tokens; those after them are padding, which no loss sees. None: all
    rows.
    """

    scale: float = 1.0
    softcap: float | None = None
    num_tokens: int | None = None

    def logits(self, product: torch.Tensor) -> torch.Tensor:
        """The input of the softmax, from the fp32 product of hidden states and head."""
        if self.scale != 1.0:
            product = product * self.scale
        if self.softcap is not None:
            product = self.softcap * torch.tanh(product / self.softcap)
        return product


class LossSums:
    """Sums of target-token losses in nats, fp32 on the device: in total, and by source."""

    def __init__(self, num_sources: int, device: torch.device) -> None:
        self.num_sources = num_sources
        # The total, then each source. With one source the total is its sum.
        self.values = torch.zeros(1 if num_sources == 1 else 1 + num_sources, device=device)

    @property
    def total(self) -> torch.Tensor:
        """Loss of all targets, a scalar view."""
        return self.values[0]

    @property
    def by_source(self) -> torch.Tensor:
        """Loss of each source's targets, a view `(sources,)`."""
        return self.values[-self.num_sources :]

    def add(self, losses: Sequence[torch.Tensor], batch: MicroBatch) -> None:
        """Add the losses of all targets of `batch`, given by chunks, to the total and by source; each counts by its weight."""
        if losses:
            every = torch.cat(list(losses))
            if batch.target_weights is not None:
                every = every * batch.target_weights
            self.total.add_(every.sum())
            if batch.target_sources is not None:
                self.add_by_source(every, batch.target_sources)

    def add_by_source(self, losses: torch.Tensor, sources: torch.Tensor) -> None:
        """Add each loss `(targets,)` to the sum of its source, int64 `(targets,)`; the total stays as it is."""
        if self.num_sources > 1:
            self.by_source.index_add_(0, sources, losses)


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target) of each target in nats: what measures a model, whatever loss trains it."""
    return F.cross_entropy(logits, targets, reduction="none")


def lend_weight(head: nn.Linear, settings: HeadSettings) -> None:
    """Replace the forward of `head`: it calls a function with the hidden states and its weight.

    FSDP gathers the weight of a head that is a unit of its own around this call and nowhere else.
    """
    head.settings = settings  # pyright: ignore[reportArgumentType]
    head.forward = lambda hidden, function: function(hidden, head.weight)  # pyright: ignore[reportAttributeAccessIssue]


def chunked(
    head: nn.Module,
    hidden: torch.Tensor,
    batch: MicroBatch,
    token_losses: TokenLosses,
    loss_sums: LossSums | None = None,
) -> torch.Tensor:
    """The sum of `token_losses` over the targets of a micro-batch times their weights, fp32 scalar.

    head: `PackedLanguageModel.head`. hidden `(targets, hidden_size)`: the states that predict, from the model. loss_sums
    also receives each loss by source; the result does not depend on it.

    Head and `token_losses` are called chunk by chunk, and the gradients of hidden states and head are computed at once,
    so that beside inputs and gradients the memory is that of one chunk's logits, whatever the number of targets.
    Without any target the loss is 0 and all gradients exist and are 0, so that all ranks reduce the same parameters.
    Raises UserError if `token_losses` does not return one loss per target.
    """
    function = functools.partial(
        _sum_of_losses,
        batch=batch,
        token_losses=token_losses,
        loss_sums=loss_sums,
        settings=cast(HeadSettings, head.settings),
    )
    return head(hidden, function)


def visit_logits(head: nn.Module, hidden: torch.Tensor, visit: Visit) -> None:
    """Call `visit(logits, start)` for each `LOSS_TOKENS` rows of hidden `(rows, hidden_size)`, without gradients."""
    settings = cast(HeadSettings, head.settings)

    def visit_chunks(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        for start in range(0, len(hidden), LOSS_TOKENS):
            product = F.linear(hidden[start : start + LOSS_TOKENS], weight[: settings.num_tokens])
            visit(settings.logits(product.float()), start)
        return hidden

    with torch.no_grad():
        head(hidden, visit_chunks)


def _sum_of_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    batch: MicroBatch,
    token_losses: TokenLosses,
    loss_sums: LossSums | None,
    settings: HeadSettings,
) -> torch.Tensor:
    if batch.target_ids.numel() == 0:
        return (hidden.sum() + weight[:1].sum()).float() * 0.0
    return _ChunkedSum.apply(hidden, weight, batch, token_losses, loss_sums, settings)  # pyright: ignore[reportReturnType]


# Why not F.linear_cross_entropy with its chunking options (torch >= 2.13 only)? It knows one loss. For SmolLM2's head
# (576 x 49,152), 1,024 targets, forward and backward on one CPU thread it took 17-28 s in bf16, this class 1.0-1.2 s.
class _ChunkedSum(torch.autograd.Function):
    """Computes both gradients in forward, chunk by chunk, so that no chunk's logits outlive it.

    The loss is a scalar, so backward only scales the gradients. The head is multiplied three times, which is the minimum;
    recomputing the logits in backward would be a fourth time. Autograd differentiates from the losses to the product with
    the head; the two products behind it are written here, in larger chunks and in place.
    """

    @staticmethod
    def forward(ctx, hidden, weight, batch, token_losses, loss_sums, settings):  # noqa: ANN001, ANN205
        """Arguments and result as in `chunked`. Keeps both gradients for backward."""
        trains_head = ctx.needs_input_grad[1]  # not with LoRA
        needs_grad = ctx.needs_input_grad[0] or trains_head
        tokens = weight[: settings.num_tokens]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden if needs_grad else hidden[:0])
        grad_weight = None
        for start in range(0, len(hidden), CHUNK_TOKENS):
            rows = hidden[start : start + CHUNK_TOKENS]
            product = F.linear(rows, tokens)
            for first in range(0, len(rows), LOSS_TOKENS):
                part = product[first : first + LOSS_TOKENS]
                targets = slice(start + first, start + first + len(part))
                losses = _losses(part, targets, batch, token_losses, settings, needs_grad)
                loss += losses.sum()
                if loss_sums is not None and batch.target_sources is not None:
                    loss_sums.add_by_source(losses, batch.target_sources[targets])
            if not needs_grad:
                continue
            grad_hidden[start : start + len(rows)] = product @ tokens
            if trains_head:
                of_rows = product.T @ rows
                # Chunks are added in fp32, because bf16 would lose the small ones.
                grad_weight = of_rows if grad_weight is None else grad_weight.float().add_(of_rows)
                del of_rows
            del product, part  # else they would live until the next chunk has made its own
        if needs_grad:
            ctx.gradients = grad_hidden, None if grad_weight is None else _padded(grad_weight, weight)
        return loss

    @staticmethod
    def backward(ctx, grad_output):  # noqa: ANN001, ANN205
        # Scaled in place and handed over: a second copy of the vocabulary's gradient would be the peak of the step.
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        grad_weight = None if grad_weight is None else grad_weight.mul_(grad_output)
        return grad_hidden.mul_(grad_output), grad_weight, *(None,) * 4


def _losses(
    product: torch.Tensor,
    targets: slice,
    batch: MicroBatch,
    token_losses: TokenLosses,
    settings: HeadSettings,
    needs_grad: bool,
) -> torch.Tensor:
    """The weighted losses, fp32 `(targets,)`. If `needs_grad`, `product` becomes the gradient of their sum."""
    with torch.set_grad_enabled(needs_grad):
        leaf = product.detach().float().requires_grad_(needs_grad)
        losses = token_losses(settings.logits(leaf), batch.target_ids[targets])
        if losses.shape != batch.target_ids[targets].shape:
            raise UserError(
                f"token_losses in train.py returned the shape {tuple(losses.shape)}; it must return one loss per target, "
                f"{tuple(batch.target_ids[targets].shape)}"
            )
        if batch.target_weights is not None:
            losses = losses * batch.target_weights[targets]
        if needs_grad:
            product.copy_(torch.autograd.grad(losses.sum(), leaf)[0])
    return losses.detach()


def _padded(grad_weight: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient in the weight's dtype, with zeros for its rows of padding."""
    if len(grad_weight) == len(weight):
        return grad_weight.to(weight.dtype)
    padded = torch.zeros_like(weight)
    padded[: len(grad_weight)] = grad_weight
    return padded
