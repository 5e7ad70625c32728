"""The sum of target-token losses, with logits for target tokens only and in chunks.

The sum, not the mean: it is divided once by the number of target tokens of the whole step (all ranks, all
micro-batches). A mean per micro-batch weighs tokens by how few share their micro-batch (transformers#34191).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

VISIT_TOKENS = 256  # of one chunk where logits are looked at: what looks makes several tensors of their size
CHUNK_TOKENS = 1024  # logits of one chunk in fp32: 1024 x 49,152 x 4 bytes = 201 MB, 1024 x 151,936 x 4 = 622 MB


class LossBySource:
    """Where each target's loss is added to the sum of its source, in place and on the device.

    sums: fp32 `(sources,)`, nats. target_sources: int64 `(targets,)`, the source of each target. A plain class: FSDP casts the
    fp32 tensors among a forward's arguments to the compute dtype, also those in a dataclass, and a copy's sums would be lost.
    """

    def __init__(self, sums: torch.Tensor, target_sources: torch.Tensor | None = None) -> None:
        self.sums, self.target_sources = sums, target_sources

    def add(self, losses: torch.Tensor, start: int) -> None:
        """The losses of the targets from `start` on."""
        self.sums.index_add_(0, self.target_sources[start : start + len(losses)], losses)


def logits(
    hidden: torch.Tensor, head_weight: torch.Tensor, scale: float = 1.0, softcap: float | None = None
) -> torch.Tensor:
    """What the softmax sees, fp32 `(rows, vocabulary)`: the product in the dtype of `hidden`, scaled, then capped.

    scale: `logit_scale` of Cohere, 1 / `logits_scaling` of Granite. softcap: c * tanh(x / c) (Gemma 2,
    arXiv:2408.00118, section 2).
    """
    product = F.linear(hidden, head_weight).float()
    if scale != 1.0:
        product = product * scale
    if softcap is not None:
        product = softcap * torch.tanh(product / softcap)
    return product


def visit_logits(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    visit: Callable[[torch.Tensor, int], None],
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Call `visit(logits, start)` with the logits, fp32 `(rows, vocabulary)`, of the targets from `start` on, chunk by chunk.

    hidden, scale and softcap as in `cross_entropy_sum`. Returns 0, so that it can stand in the loss's place. Not called
    where there is no target.
    """
    for start in range(0, len(hidden), VISIT_TOKENS):
        visit(logits(hidden[start : start + VISIT_TOKENS], head_weight, scale, softcap), start)
    return hidden.new_zeros((), dtype=torch.float32)


def cross_entropy_sum(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    target_ids: torch.Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    by_source: LossBySource | None = None,
    weights: torch.Tensor | None = None,
    num_tokens: int | None = None,
) -> torch.Tensor:
    """Sum over targets of -log p(target), in nats, as an fp32 scalar.

    hidden `(targets, hidden_size)`: the states that predict. head_weight `(vocabulary, hidden_size)`. target_ids
    `(targets,)`. scale and softcap as in `logits`; the softmax is fp32. chunk_tokens: default CHUNK_TOKENS. With no
    target at all the loss is 0 and every gradient exists and is 0, so that all ranks reduce the same parameters.
    by_source: sums to be told apart besides; neither the loss nor a gradient depends on them. weights: fp32 `(targets,)`, a
    factor for each target's loss. num_tokens: rows of the head that are tokens; the softmax does not see those after them.
    Beside inputs and gradients it needs memory for the logits of one chunk, however many targets there are.
    """
    if target_ids.numel() == 0:
        return (hidden.sum() + head_weight[:1].sum()).float() * 0.0
    chunk_tokens = chunk_tokens or CHUNK_TOKENS
    return _ChunkedCrossEntropySum.apply(
        hidden, head_weight, target_ids, scale, softcap, chunk_tokens, by_source, weights, num_tokens
    )


# Why not F.linear_cross_entropy with its chunking options (torch >= 2.13 only): SmolLM2's head (576 x 49,152), 1,024
# targets, forward and backward on one CPU thread, took 1.0-1.2 s here and 17-28 s there in bf16 (1.2-2.2 and 9-23 s in
# fp32) beside other work; the peak grew by 245 against 410 MB (297 against 195 MB in fp32); and its bf16 loss is rounded
# to bf16 (11,904 for 11,796.5).
class _ChunkedCrossEntropySum(torch.autograd.Function):
    """Both gradients are computed in the forward, chunk by chunk, so that no chunk's logits outlive it.

    The loss is a scalar, so backward only has to scale them. The head is thus multiplied three times, as it must be,
    where recomputing the logits in backward would make it four.
    """

    @staticmethod
    def forward(ctx, hidden, head_weight, target_ids, scale, softcap, chunk_tokens, by_source, weights, num_tokens):  # noqa: ANN001, ANN205
        """Arguments and result as in `cross_entropy_sum`; keeps both gradients for backward."""
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = None
        for start in range(0, len(target_ids), chunk_tokens):
            rows, ids = hidden[start : start + chunk_tokens], target_ids[start : start + chunk_tokens]
            scores = logits(rows, head_weight, scale, softcap)
            # The derivative of the cap, 1 - tanh(x / c)^2, before the scores are overwritten.
            slope = (scores / softcap).square_().neg_().add_(1.0) if needs_grad and softcap is not None else None
            if num_tokens is not None:
                scores[:, num_tokens:] = -torch.inf
            if not needs_grad:
                losses = F.cross_entropy(scores, ids, reduction="none")
                if weights is not None:
                    losses *= weights[start : start + chunk_tokens]
                loss += losses.sum()
                if by_source is not None:
                    by_source.add(losses, start)
                continue
            scores = torch.log_softmax(scores, dim=-1)
            losses = -scores.gather(1, ids[:, None])[:, 0]
            if weights is not None:
                losses *= weights[start : start + chunk_tokens]
            loss += losses.sum()
            if by_source is not None:
                by_source.add(losses, start)
            # d loss / d scores = softmax - one_hot, written over the log-probabilities.
            grad_scores = scores.exp_()
            grad_scores[torch.arange(len(ids), device=ids.device), ids] -= 1.0
            if slope is not None:
                grad_scores.mul_(slope)
            if scale != 1.0:
                grad_scores.mul_(scale)
            if weights is not None:
                grad_scores.mul_(weights[start : start + chunk_tokens, None])
            grad_scores = grad_scores.to(hidden.dtype)
            grad_hidden[start : start + chunk_tokens] = grad_scores @ head_weight
            part = grad_scores.T @ rows
            # Chunks are added in fp32: bf16 would lose the small ones.
            grad_weight = part if grad_weight is None else grad_weight.float().add_(part)
        if needs_grad:
            ctx.gradients = grad_hidden, grad_weight.to(head_weight.dtype)
        return loss

    @staticmethod
    def backward(ctx, grad_output):  # noqa: ANN001, ANN205
        # Scaled in place and handed over: a second copy of the vocabulary's gradient would be the peak of the step.
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        return grad_hidden.mul_(grad_output), grad_weight.mul_(grad_output), None, None, None, None, None, None, None
