"""The sum of target-token losses, with logits for target tokens only, computed in chunks.

The loss is a sum, not a mean: the loop divides once by the number of target tokens (or the sum of their weights) of the whole
step (all ranks, all micro-batches). With a mean per micro-batch, a token counts more if its micro-batch has fewer targets
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
LOSS_TOKENS = 256  # targets whose fp32 logits and intermediate values of the loss exist at once: 4 x 155 MB
HEAD_ROWS = 4096  # rows of the head whose gradient is computed at once: in fp32 4096 x 4096 x 4 bytes = 67 MB

TokenLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits fp32 `(targets, vocabulary)`, targets int64 `(targets,)`) -> losses fp32 `(targets,)`, by differentiable operations."""
Rows = Callable[[Sequence[tuple[int, int]]], torch.Tensor]
"""Spans (first, last) of rows of the head -> gradients of these rows, concatenated, `(rows, hidden_size)`."""
AddGradient = Callable[[Rows, int, torch.Tensor], None]
"""(gradients of rows, number of rows with a gradient, factor fp32 scalar): adds them to the shards. A collective."""
Visit = Callable[[torch.Tensor, int], None]  # (logits fp32 (rows, vocabulary), index of the first target)


@dataclass(frozen=True)
class HeadSettings:
    """The function from the product of hidden state and head to logits.

    `scale` is Cohere's `logit_scale`, or 1 / `logits_scaling` of Granite. `softcap` c means c * tanh(x / c) (Gemma 2,
    arXiv:2408.00118, section 2). The first `num_tokens` rows of the head are tokens, the rest is padding, which no loss
    includes; None means that all rows are tokens.
    """

    scale: float = 1.0
    softcap: float | None = None
    num_tokens: int | None = None

    def logits(self, product: torch.Tensor) -> torch.Tensor:
        """Return the input of the softmax, given the fp32 product of hidden states and head."""
        if self.scale != 1.0:
            product = product * self.scale
        if self.softcap is not None:
            product = self.softcap * torch.tanh(product / self.softcap)
        return product


class LossSums:
    """Sums of target-token losses in nats, fp32 on the device: in total, and by source."""

    def __init__(self, num_sources: int, device: torch.device) -> None:
        self.num_sources = num_sources
        # The total, then one sum for each source. A single source shares its sum with the total.
        self.values = torch.zeros(1 if num_sources == 1 else 1 + num_sources, device=device)

    @property
    def total(self) -> torch.Tensor:
        """The loss of all targets, a scalar view."""
        return self.values[0]

    @property
    def by_source(self) -> torch.Tensor:
        """The loss of each source's targets, a view `(sources,)`."""
        return self.values[-self.num_sources :]

    def add(self, losses: Sequence[torch.Tensor], batch: MicroBatch) -> None:
        """Add the weighted losses of all targets of `batch` to the total and to their sources. `losses` is a list of chunks."""
        if losses:
            weighted = torch.cat(list(losses))
            if batch.target_weights is not None:
                weighted = weighted * batch.target_weights
            self.total.add_(weighted.sum())
            if batch.target_sources is not None:
                self.add_by_source(weighted, batch.target_sources)

    def add_by_source(self, losses: torch.Tensor, sources: torch.Tensor) -> None:
        """Add each loss `(targets,)` to the sum of its source, int64 `(targets,)`. The total does not change."""
        if self.num_sources > 1:
            self.by_source.index_add_(0, sources, losses)


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return -log p(target) of each target in nats. Evaluations use this loss, even if another loss trains the model."""
    return F.cross_entropy(logits, targets, reduction="none")


def anchored(token_losses: TokenLosses, batch: MicroBatch, weight: float) -> TokenLosses:
    """Return a loss function: `weight * kl_to_base` for the anchored targets of `batch` (`Source.anchor`), else `token_losses`.

    The returned function serves a single call of `chunked` with this batch, which passes every target once and in order. For a
    batch without anchored targets it is `token_losses` itself. The step's divisor counts an anchored target as 1, whatever the
    weight: with a fraction s of anchored targets, the loss of a step is (1 - s) * (mean of token_losses) + s * weight * (mean
    KL). KL to the base on text of the base: arXiv:2512.22337, arXiv:2505.13811.
    """
    base_rows, base_log_p, base_ids = batch.base_rows, batch.base_log_p, batch.base_ids
    if base_rows is None or base_log_p is None or base_ids is None:
        return token_losses
    done = 0

    def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal done
        rows = base_rows[done : done + len(targets)]
        done += len(targets)
        # Runs of consecutive targets that are either all anchored or all not. `rows` is on the host, so no device is waited for.
        runs, losses_of_runs = np.split(rows, np.flatnonzero(np.diff(rows >= 0)) + 1), []
        lengths = [len(run) for run in runs]
        for run, part, ids in zip(runs, logits.split(lengths), targets.split(lengths), strict=True):
            if run[0] < 0:
                losses_of_runs.append(_checked(token_losses, part, ids))
            else:
                base = slice(run[0], run[-1] + 1)
                losses_of_runs.append(weight * kl_to_base(part, base_log_p[base], base_ids[base].long()))
        return torch.cat(losses_of_runs)

    return losses


def kl_to_base(logits: torch.Tensor, base_log_p: torch.Tensor, base_ids: torch.Tensor) -> torch.Tensor:
    """Return KL(base || model) of each target in nats, fp32 `(targets,)`, over the buckets of `bucket_log_probabilities`.

    `base_log_p` `(targets, k + 1)` are the base's bucket log-probabilities. They may be rounded, so they are normalised again.
    """
    log_p = base_log_p.float().log_softmax(-1)
    return (log_p.exp() * (log_p - bucket_log_probabilities(logits, base_ids))).sum(-1)


def bucket_log_probabilities(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of the tokens `ids` and, in the last column, of all remaining tokens together.

    `logits` is fp32 `(targets, vocabulary)`, `ids` int64 `(targets, k)`, and the result fp32 `(targets, k + 1)`. The remaining
    probabilities are summed directly, because log(1 - sum of k) would suffer from cancellation.
    """
    rest = logits.scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(1, ids), rest], 1).log_softmax(-1)


def lend_weight(head: nn.Linear, settings: HeadSettings) -> None:
    """Replace the forward of `head`: the new forward calls a given function with the hidden states and the head's weight.

    If the head is an FSDP unit of its own, FSDP gathers the weight around this call and nowhere else.
    """
    head.settings = settings  # pyright: ignore[reportArgumentType]
    head.add_gradient = None  # pyright: ignore[reportArgumentType]  `shard` (distributed/sharding.py) sets it to a function
    head.forward = types.MethodType(_lend, head)  # bound, so that a copy of the head lends its own weight


def _lend(head: nn.Linear, hidden: torch.Tensor, function: Callable[..., torch.Tensor]) -> torch.Tensor:
    adapter: Any = getattr(head, "token_adapter", None)
    if adapter is not None:  # the trained rows of new tokens beside a frozen head (model/lora.py)
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
    """Return the weighted sum of `token_losses` over the targets of a micro-batch, fp32 scalar.

    `head` is `PackedLanguageModel.head`, and `hidden` `(targets, hidden_size)` is the output of the model. `loss_sums`, if given,
    also receives the losses of each source.

    Head and `token_losses` are called chunk by chunk, and the gradients of a chunk are computed immediately, so that the memory
    is one chunk's logits and one gradient of the head. The gradient of a sharded head (`distributed.sharding.shard`) never exists
    as a whole: backward adds it to the shards of all ranks piece by piece.
    Without any target the loss is 0 and all gradients exist and are 0, so that all ranks reduce the same parameters.
    Raises UserError if `token_losses` does not return one differentiable loss per target.
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


# Why not F.linear_cross_entropy with its chunking options (torch >= 2.13 only)? It supports only cross-entropy. For SmolLM2's
# head (576 x 49,152), 1,024 targets, forward and backward on one CPU thread it took 17-28 s in bf16, this class 1.0-1.2 s.
class _ChunkedSum(torch.autograd.Function):
    """The chunked loss with gradients computed in forward, so that the fp32 logits of a chunk are freed before the next chunk.

    The loss is a scalar, so backward only scales the gradients. There are three products with the head, which is the minimum;
    recomputing the logits in backward would be a fourth. Autograd differentiates from the losses back to the product with the
    head. The other two products are written here, in larger chunks and in place.
    """

    @staticmethod
    def forward(ctx, hidden, weight, batch, token_losses, loss_sums, settings, add_gradient, trains):  # noqa: ANN001, ANN205
        """Compute `chunked` and keep the gradients of hidden states and head for backward.

        `trains` is whether autograd is enabled: `ctx.needs_input_grad` is True for a trained head even if it is disabled.
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
            del product, part  # otherwise they would live until the next chunk has computed its product
        if needs_grad:
            ctx.kept = grad_hidden, gradient if trains_head else None, scale, weight.shape, weight.dtype, add_gradient
        return loss

    @staticmethod
    def backward(ctx, grad_output):  # noqa: ANN001, ANN205
        if torch.is_grad_enabled():  # the kept gradients have no graph, so a loss on them would have no effect
            raise UserError("train.py: the loss has no second derivative; leave out create_graph=True")
        (grad_hidden, gradient, scale, shape, dtype, add_gradient), ctx.kept = ctx.kept, None
        factor = grad_output / scale  # exactly 1 if the loop only divided the loss by the micro-batch's divisor
        # Scaled in fp32, because CUDA rounds the factor of a bf16 tensor to bf16.
        grad_hidden = grad_hidden.mul_(factor).to(dtype)
        grad_weight = None
        if gradient is not None and add_gradient is not None:
            add_gradient(gradient.rows, gradient.num_rows, factor)
        elif gradient is not None:
            # A product in bf16 that is then scaled would be rounded twice. On a CPU the exact fp32 product takes twice as long.
            exact = factor.is_cuda or factor.item() != 1
            grad_weight = grad_hidden.new_zeros(shape)
            for first in range(0, gradient.num_rows, HEAD_ROWS):
                last = min(first + HEAD_ROWS, gradient.num_rows)
                grad_weight[first:last] = gradient.rows([(first, last)], exact).mul_(factor)
        return grad_hidden, grad_weight, *(None,) * 6


def targets_per_chunk(targets: int, trained_width: int, itemsize: int, in_pieces: bool) -> int:
    """Return how many targets a chunk has: all `targets` if a single chunk takes no more memory, else `CHUNK_TOKENS`.

    Several chunks need an fp32 sum of the head's gradients. A single chunk does not, and is faster. `trained_width` is the number
    of columns of the head, 0 if it is not trained. `itemsize` is the bytes of an element of a product. `in_pieces` is whether
    the head's gradient is reduced in pieces.
    """
    # Bytes that a single chunk saves per row of the head: the fp32 sum, minus the whole gradient unless it is made in pieces.
    saved = trained_width * (4 - (0 if in_pieces else itemsize)) // itemsize if itemsize < 4 else 0
    return targets if targets <= CHUNK_TOKENS + saved else CHUNK_TOKENS


class _HeadGradient:
    """The gradient of the head's weight.

    For a single chunk it keeps the two factors (gradient of the product, hidden states) and multiplies them when `rows` is called.
    For several chunks it keeps the fp32 sum of their products.
    """

    def __init__(self, tokens: torch.Tensor) -> None:
        """Start without a chunk. `tokens` `(tokens, hidden_size)` are the rows of the head that get a gradient."""
        self.num_rows = len(tokens)
        self._factors = tokens.new_empty(0, len(tokens)), tokens.new_empty(0, tokens.shape[1])
        self._sum: torch.Tensor | None = None

    def add(self, product: torch.Tensor, hidden: torch.Tensor, is_only: bool) -> None:
        """Add a chunk. `product` `(targets, tokens)` is the gradient of its product with the head, `hidden` its hidden states."""
        if is_only:
            self._factors = product, hidden
            return
        if self._sum is None:
            self._sum = hidden.new_zeros(self.num_rows, hidden.shape[1], dtype=torch.float32)
        # In bf16 small chunks would be lost. Neither the sum nor its addends are rounded.
        for first in range(0, self.num_rows, HEAD_ROWS):
            rows = slice(first, first + HEAD_ROWS)
            self._sum[rows].add_(_product(product[:, rows].T, hidden, exact=True))

    def rows(self, spans: Sequence[tuple[int, int]], exact: bool = False) -> torch.Tensor:
        """Return rows of the gradient (see `Rows`): in fp32 if `exact` or summed over chunks, else in the dtype of the factors.

        The caller requests each row once and may change the result in place.
        """
        if self._sum is not None:
            return _cat([self._sum[first:last] for first, last in spans])
        product, hidden = self._factors
        return _product(_cat([product[:, first:last] for first, last in spans], dim=1).T, hidden, exact)


def _cat(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _product(left: torch.Tensor, right: torch.Tensor, exact: bool) -> torch.Tensor:
    """Return left @ right, in fp32 if `exact`; on CUDA always in fp32 for 16-bit factors."""
    if left.element_size() >= 4:
        return left @ right
    if left.is_cuda:  # fp32 output costs nothing on CUDA
        return torch.mm(left, right, out_dtype=torch.float32)
    if not exact:
        return left @ right
    if left.dtype != torch.bfloat16:
        return left.float() @ right.float()
    # The CPU's bf16 units multiply fp32 numbers that bf16 represents exactly and return fp32. CPUs without them compute in fp32.
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
    """Return the weighted losses, fp32 `(targets,)`. With a scale, write the gradient of scale * sum(losses) into `product`."""
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
    """Return the losses in fp32. Raises UserError unless `token_losses` returns one differentiable loss per target.

    An exception that `token_losses` itself raises is not changed.
    """
    losses = token_losses(logits, ids)
    shape = tuple(losses.shape) if isinstance(losses, torch.Tensor) else None
    if shape != tuple(ids.shape):
        result = f"the type {type(losses).__name__}" if shape is None else f"the shape {shape}"
        raise UserError(
            f"token_losses in train.py returned {result}; it must return one loss per target, a tensor {tuple(ids.shape)}"
        )
    if logits.requires_grad and not losses.requires_grad:
        raise UserError(WITHOUT_GRADIENT)
    return losses.float()
