"""The sum of target-token losses, with logits for target tokens only, computed in chunks.

It is a sum, not a mean: the loop divides once by the number of target tokens (or the sum of their weights) of the whole
step (all ranks, all micro-batches). A mean per micro-batch gives a token more weight the fewer targets share its micro-batch
(transformers#34191).
"""

import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from data.batches import MicroBatch

CHUNK_TOKENS = 1024  # targets whose logits exist at once, in the compute dtype: 1024 x 151,936 x 2 bytes = 311 MB
LOSS_TOKENS = 256  # targets whose fp32 logits exist at once, with what their loss makes of them: 4 x 155 MB
HEAD_ROWS = 4096  # rows of the head whose gradient is made at once: in fp32 4096 x 4096 x 4 bytes = 67 MB

TokenLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits fp32 `(targets, vocabulary)`, targets int64 `(targets,)`) -> losses fp32 `(targets,)`, by differentiable operations."""
Rows = Callable[[Sequence[tuple[int, int]]], torch.Tensor]
"""Spans (first, last) of rows of the head -> their gradients, one span after the other, `(rows, hidden_size)`."""
AddGradient = Callable[[Rows, int, torch.Tensor], None]
"""(gradients of rows, number of rows that have one, factor fp32 scalar): adds them to the shards. A collective."""
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


def anchored(token_losses: TokenLosses, batch: MicroBatch, weight: float) -> TokenLosses:
    """`token_losses`, but `weight * kl_to_base` for those targets of `batch` that are anchored (`Source.anchor`).

    What is returned serves one call of `chunked` with this batch, which asks once for every target, in order. Without an
    anchored target it is `token_losses` itself. The step's divisor counts an anchored target as one, whatever the weight: with
    a share s of them, the loss of a step is (1 - s) * (mean of token_losses) + s * weight * (mean KL). KL to the base on text
    of the base: arXiv:2512.22337, arXiv:2505.13811.
    """
    base_rows, base_log_p, base_ids = batch.base_rows, batch.base_log_p, batch.base_ids
    if base_rows is None or base_log_p is None or base_ids is None:
        return token_losses
    done = 0

    def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal done
        rows = base_rows[done : done + len(targets)]
        done += len(targets)
        # Runs of targets that are all anchored, or all not. The host knows them: nobody waits for the device.
        runs, found = np.split(rows, np.flatnonzero(np.diff(rows >= 0)) + 1), []
        lengths = [len(run) for run in runs]
        for run, part, ids in zip(runs, logits.split(lengths), targets.split(lengths), strict=True):
            if run[0] < 0:
                found.append(_checked(token_losses, part, ids))
            else:
                base = slice(run[0], run[-1] + 1)
                found.append(weight * kl_to_base(part, base_log_p[base], base_ids[base].long()))
        return torch.cat(found)

    return losses


def kl_to_base(logits: torch.Tensor, base_log_p: torch.Tensor, base_ids: torch.Tensor) -> torch.Tensor:
    """KL(base || model) of each target in nats, fp32 `(targets,)`, between the buckets of `bucket_log_probabilities`.

    base_log_p `(targets, k + 1)`: those of the base, which may be rounded: they are normalised again.
    """
    log_p = base_log_p.float().log_softmax(-1)
    return (log_p.exp() * (log_p - bucket_log_probabilities(logits, base_ids))).sum(-1)


def bucket_log_probabilities(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The log-probabilities of the tokens `ids`, int64 `(targets, k)`, and of all others together, fp32 `(targets, k + 1)`.

    logits: fp32 `(targets, vocabulary)`. The others are added up as they are: log(1 - sum of k) would cancel.
    """
    others = logits.scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(1, ids), others], 1).log_softmax(-1)


def lend_weight(head: nn.Linear, settings: HeadSettings) -> None:
    """Replace the forward of `head`: it calls a function with the hidden states and its weight.

    FSDP gathers the weight of a head that is a unit of its own around this call and nowhere else.
    """
    head.settings = settings  # pyright: ignore[reportArgumentType]
    head.add_gradient = None  # pyright: ignore[reportArgumentType]  sharded, it is a function (distributed/sharding.py)
    head.forward = types.MethodType(_lend, head)  # bound, so that a copy of the head lends its own weight


def _lend(head: nn.Linear, hidden: torch.Tensor, function: Callable[..., torch.Tensor]) -> torch.Tensor:
    adapter: Any = getattr(head, "token_adapter", None)
    if adapter is not None:  # rows of new tokens, which are trained beside a frozen head (model/lora.py)
        rows, first = adapter.trainable_tokens_delta, adapter.first
        return function(hidden, torch.cat([head.weight[:first], rows, head.weight[first + len(rows) :]]))
    return function(hidden, head.weight)


def chunked(
    head: nn.Module,
    hidden: torch.Tensor,
    batch: MicroBatch,
    token_losses: TokenLosses,
    loss_sums: LossSums | None = None,
) -> torch.Tensor:
    """The sum of `token_losses` over the targets of a micro-batch times their weights, fp32 scalar.

    head: `PackedLanguageModel.head`. hidden `(targets, hidden_size)`: the states that predict, from the model. loss_sums
    also receives each loss by source.

    Head and `token_losses` are called chunk by chunk, and their gradients are computed at once, in the memory of one chunk's
    logits and a gradient of the head. That of a sharded head (`distributed.sharding.shard`) never exists as a whole: backward
    adds it to the shards of all ranks, piece by piece.
    Without any target the loss is 0 and all gradients exist and are 0, so that all ranks reduce the same parameters.
    Raises UserError if `token_losses` does not return one loss per target, with a gradient.
    """
    options = cast(HeadSettings, head.settings), cast(AddGradient | None, head.add_gradient), torch.is_grad_enabled()
    return head(
        hidden, lambda states, weight: _ChunkedSum.apply(states, weight, batch, token_losses, loss_sums, *options)
    )


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


# Why not F.linear_cross_entropy with its chunking options (torch >= 2.13 only)? It knows one loss. For SmolLM2's head
# (576 x 49,152), 1,024 targets, forward and backward on one CPU thread it took 17-28 s in bf16, this class 1.0-1.2 s.
class _ChunkedSum(torch.autograd.Function):
    """Computes the gradients in forward, chunk by chunk, so that no chunk's fp32 logits outlive it.

    The loss is a scalar, so backward only scales the gradients. The head is multiplied three times, which is the minimum;
    recomputing the logits in backward would be a fourth time. Autograd differentiates from the losses to the product with
    the head; the two products behind it are written here, in larger chunks and in place.
    """

    @staticmethod
    def forward(ctx, hidden, weight, batch, token_losses, loss_sums, settings, add_gradient, trains):  # noqa: ANN001, ANN205
        """Arguments and result as in `chunked`. Keeps both gradients for backward.

        trains: whether autograd is on. A head that is trained asks for its gradient also where it is off.
        """
        trains_head = ctx.needs_input_grad[1]  # not with LoRA
        needs_grad = trains and any(ctx.needs_input_grad)
        tokens = weight[: settings.num_tokens]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        scale = torch.ones_like(loss) / batch.divisor
        grad_hidden = torch.empty_like(hidden if needs_grad else hidden[:0], dtype=torch.float32)
        gradient = _HeadGradient(tokens)
        width = hidden.shape[1] if trains_head else 0
        chunk = targets_per_chunk(len(hidden), width, hidden.element_size(), add_gradient is not None)
        for start in range(0, len(hidden), chunk or 1):
            rows = hidden[start : start + chunk]
            product = F.linear(rows, tokens)
            for first in range(0, len(rows), LOSS_TOKENS):
                part = product[first : first + LOSS_TOKENS]
                targets = slice(start + first, start + first + len(part))
                losses = _losses(part, targets, batch, token_losses, settings, scale if needs_grad else None)
                loss += losses.sum()
                if loss_sums is not None and batch.target_sources is not None:
                    loss_sums.add_by_source(losses, batch.target_sources[targets])
            if needs_grad:
                grad_hidden[start : start + len(rows)] = _product(product, tokens, exact=False)
            if trains_head and needs_grad:
                gradient.add(product, rows, is_only=len(rows) == len(hidden))
            del product, part  # else they would live until the next chunk has made its own
        if needs_grad:
            ctx.kept = grad_hidden, gradient if trains_head else None, scale, weight.shape, weight.dtype, add_gradient
        return loss

    @staticmethod
    def backward(ctx, grad_output):  # noqa: ANN001, ANN205
        if torch.is_grad_enabled():  # what is kept has no graph: a term of the loss made of it would pull at nothing
            raise UserError("train.py: the loss has no second derivative; leave out create_graph=True")
        (grad_hidden, gradient, scale, shape, dtype, add_gradient), ctx.kept = ctx.kept, None
        factor = grad_output / scale  # 1 if the loop divided by the micro-batch's divisor and changed nothing else
        # Scaled in fp32, since CUDA rounds a factor of bf16 numbers to bf16.
        grad_hidden = grad_hidden.mul_(factor).to(dtype)
        grad_weight = None
        if gradient is not None and add_gradient is not None:
            add_gradient(gradient.rows, gradient.num_rows, factor)
        elif gradient is not None:
            # A product that is rounded before it is scaled would be rounded twice. On a CPU the exact one takes twice as long.
            exact = factor.is_cuda or factor.item() != 1
            grad_weight = grad_hidden.new_zeros(shape)
            for first in range(0, gradient.num_rows, HEAD_ROWS):
                last = min(first + HEAD_ROWS, gradient.num_rows)
                grad_weight[first:last] = gradient.rows([(first, last)], exact).mul_(factor)
        return grad_hidden, grad_weight, *(None,) * 6


def targets_per_chunk(targets: int, trained_width: int, itemsize: int, in_pieces: bool) -> int:
    """All `targets` in one chunk, if that takes no more memory than chunks of `CHUNK_TOKENS` and the fp32 sum of their
    gradients, else `CHUNK_TOKENS`. One chunk is faster and needs no sum.

    trained_width: columns of the head, 0 if it is not trained. itemsize: bytes of an element of a product.
    """
    # For each row of the head: the fp32 sum, less the gradient that one chunk has in place of it, unless made in pieces.
    saved = trained_width * (4 - (0 if in_pieces else itemsize)) // itemsize if itemsize < 4 else 0
    return targets if targets <= CHUNK_TOKENS + saved else CHUNK_TOKENS


class _HeadGradient:
    """The gradient of the head's weight: product^T x hidden of one chunk, multiplied when rows of it are asked for, or
    the sum of that over several chunks, in fp32.
    """

    def __init__(self, tokens: torch.Tensor) -> None:
        """tokens: the rows of the head that have a gradient, `(tokens, hidden_size)`."""
        self.num_rows = len(tokens)
        self._factors = tokens.new_empty(0, len(tokens)), tokens.new_empty(0, tokens.shape[1])
        self._sum: torch.Tensor | None = None

    def add(self, product: torch.Tensor, hidden: torch.Tensor, is_only: bool) -> None:
        """Add a chunk: the gradient `(targets, tokens)` of its product with the head, and its hidden states."""
        if is_only:
            self._factors = product, hidden
            return
        if self._sum is None:
            self._sum = hidden.new_zeros(self.num_rows, hidden.shape[1], dtype=torch.float32)
        # Bf16 would lose small chunks: neither the sum nor what is added to it is rounded.
        for first in range(0, self.num_rows, HEAD_ROWS):
            rows = slice(first, first + HEAD_ROWS)
            self._sum[rows].add_(_product(product[:, rows].T, hidden, exact=True))

    def rows(self, spans: Sequence[tuple[int, int]], exact: bool = False) -> torch.Tensor:
        """Rows of the gradient (see `Rows`), fp32 if exact, else also in the dtype of the factors.

        The caller may change them in place, and asks for each row once.
        """
        if self._sum is not None:
            return _cat([self._sum[first:last] for first, last in spans])
        product, hidden = self._factors
        return _product(_cat([product[:, first:last] for first, last in spans], dim=1).T, hidden, exact)


def _cat(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _product(left: torch.Tensor, right: torch.Tensor, exact: bool) -> torch.Tensor:
    """left @ right. exact: in fp32, not rounded to the dtype of the factors."""
    if left.element_size() >= 4:
        return left @ right
    if left.is_cuda:  # costs nothing there
        return torch.mm(left, right, out_dtype=torch.float32)
    if not exact:
        return left @ right
    if left.dtype != torch.bfloat16:
        return left.float() @ right.float()
    # The CPU's bf16 units multiply fp32 numbers that bf16 represents exactly, and return fp32. Without units: plain fp32.
    settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "bf16"
        return left.float() @ right.float()
    finally:
        settings.fp32_precision = before


def _losses(
    product: torch.Tensor,
    targets: slice,
    batch: MicroBatch,
    token_losses: TokenLosses,
    settings: HeadSettings,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """The weighted losses, fp32 `(targets,)`. With a scale, `product` becomes the gradient of their sum times the scale."""
    ids = batch.target_ids[targets]
    with torch.set_grad_enabled(scale is not None):
        leaf = product.detach().float().requires_grad_(scale is not None)
        losses = _checked(token_losses, settings.logits(leaf), ids)
        if batch.target_weights is not None:
            losses = losses * batch.target_weights[targets]
        if scale is not None:
            (gradient,) = torch.autograd.grad(losses.sum(), leaf, scale, allow_unused=True)
            if gradient is None:
                raise UserError(WITHOUT_GRADIENT)
            product.copy_(gradient)
    return losses.detach()


WITHOUT_GRADIENT = (
    "token_losses in train.py returned losses without a gradient; it must compute them from its logits by differentiable "
    "operations, without detach(), item() or torch.no_grad()"
)


def _checked(token_losses: TokenLosses, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The losses in fp32. Raises UserError for what `chunked` names; errors inside of `token_losses` stay what they are."""
    losses = token_losses(logits, ids)
    shape = tuple(losses.shape) if isinstance(losses, torch.Tensor) else None
    if shape != tuple(ids.shape):
        found = f"the type {type(losses).__name__}" if shape is None else f"the shape {shape}"
        raise UserError(
            f"token_losses in train.py returned {found}; it must return one loss per target, a tensor {tuple(ids.shape)}"
        )
    if logits.requires_grad and not losses.requires_grad:
        raise UserError(WITHOUT_GRADIENT)
    return losses.float()
