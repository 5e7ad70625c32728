"""The sum of target-token losses, with logits for target tokens only, computed in chunks.

It is a sum, not a mean: the loop divides once by the number of target tokens (or the sum of their weights) of the whole
step (all ranks, all micro-batches). A mean per micro-batch gives a token more weight the fewer targets share its micro-batch
(transformers#34191).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

CHUNK_TOKENS = 1024  # fp32 logits of one chunk: 1024 x 49,152 x 4 bytes = 201 MB, 1024 x 151,936 x 4 bytes = 622 MB
VISIT_TOKENS = 256  # chunk size where an evaluation reads the logits, since it makes several tensors of their size

Visit = Callable[[torch.Tensor, int], None]  # (logits fp32 (rows, vocabulary), index of the first target)


@dataclass(frozen=True)
class HeadSettings:
    """How a model turns the product of hidden state and head into logits.

    scale: `logit_scale` of Cohere, 1 / `logits_scaling` of Granite. softcap: c * tanh(x / c) (Gemma 2, arXiv:2408.00118,
    section 2). num_tokens: rows of the head that are tokens; those after them are padding, which the softmax never sees.
    None: all rows.
    """

    scale: float = 1.0
    softcap: float | None = None
    num_tokens: int | None = None


PLAIN_HEAD = HeadSettings()


class LossSums:
    """Sums of target-token losses in nats, fp32 on the device: in total, and by source.

    A plain class on purpose: FSDP casts fp32 tensors among a forward's arguments to the compute dtype, also inside a
    dataclass, and sums added to a cast copy would be lost.
    """

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

    def add_by_source(self, losses: torch.Tensor, sources: torch.Tensor) -> None:
        """Add each loss `(targets,)` to the sum of its source, int64 `(targets,)`; the total stays as it is."""
        if self.num_sources > 1:
            self.by_source.index_add_(0, sources, losses)


def logits(hidden: torch.Tensor, head_weight: torch.Tensor, settings: HeadSettings = PLAIN_HEAD) -> torch.Tensor:
    """The input of the softmax, fp32 `(rows, vocabulary)`: the product in the dtype of `hidden`, scaled, then capped."""
    product = F.linear(hidden, head_weight).float()
    if settings.scale != 1.0:
        product = product * settings.scale
    if settings.softcap is not None:
        product = settings.softcap * torch.tanh(product / settings.softcap)
    return product


def visit_logits(
    hidden: torch.Tensor, head_weight: torch.Tensor, visit: Visit, settings: HeadSettings = PLAIN_HEAD
) -> torch.Tensor:
    """Call `visit(logits, start)` for each chunk of targets, without the head's padding; never if there is no target.

    hidden `(targets, hidden_size)`, head_weight `(vocabulary, hidden_size)`. Returns 0 in place of a loss.
    """
    tokens = head_weight[: settings.num_tokens]
    for start in range(0, len(hidden), VISIT_TOKENS):
        visit(logits(hidden[start : start + VISIT_TOKENS], tokens, settings), start)
    return hidden.new_zeros((), dtype=torch.float32)


def cross_entropy_sum(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    target_ids: torch.Tensor,
    settings: HeadSettings = PLAIN_HEAD,
    *,
    target_sources: torch.Tensor | None = None,
    loss_sums: LossSums | None = None,
    weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Sum over targets of -log p(target), in nats, as an fp32 scalar. The softmax is fp32.

    hidden `(targets, hidden_size)`: the states that predict. head_weight `(vocabulary, hidden_size)`. target_ids
    `(targets,)`. With target_sources `(targets,)` and loss_sums, each loss is also added to the sum of its source; loss and
    gradients do not depend on them. weights: fp32 `(targets,)`, a factor of each target's loss. chunk_tokens: default
    CHUNK_TOKENS.

    Without any target the loss is 0 and all gradients exist and are 0, so that all ranks reduce the same parameters.
    Besides inputs and gradients the memory is that of one chunk's logits, whatever the number of targets.
    """
    if target_ids.numel() == 0:
        return (hidden.sum() + head_weight[:1].sum()).float() * 0.0
    chunk_tokens = chunk_tokens or CHUNK_TOKENS
    return _ChunkedCrossEntropySum.apply(
        hidden, head_weight, target_ids, settings, target_sources, loss_sums, weights, chunk_tokens
    )


# Why not F.linear_cross_entropy with its chunking options (torch >= 2.13 only)? For SmolLM2's head (576 x 49,152), 1,024
# targets, forward and backward on one CPU thread beside other work, this class took 1.0-1.2 s and that function 17-28 s in
# bf16 (1.2-2.2 s and 9-23 s in fp32). Peak memory grew by 245 and 410 MB (297 and 195 MB in fp32). Its bf16 loss is
# rounded to bf16 (11,904 for 11,796.5).
class _ChunkedCrossEntropySum(torch.autograd.Function):
    """Computes both gradients in forward, chunk by chunk, so that no chunk's logits outlive it.

    The loss is a scalar, so backward only scales the gradients. The head is multiplied three times, which is the minimum;
    recomputing the logits in backward would be a fourth time.
    """

    @staticmethod
    def forward(ctx, hidden, head_weight, target_ids, settings, target_sources, loss_sums, weights, chunk_tokens):  # noqa: ANN001, ANN205
        """Arguments and result as in `cross_entropy_sum`. Keeps both gradients for backward."""
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden if needs_grad else hidden[:0])
        trains_head = ctx.needs_input_grad[1]  # not with LoRA
        grad_weight = None
        for start in range(0, len(target_ids), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            rows, ids = hidden[chunk], target_ids[chunk]
            scores = logits(rows, head_weight, settings)
            # The derivative of the cap, 1 - tanh(x / c)^2, before the scores are overwritten.
            slope = None
            if needs_grad and settings.softcap is not None:
                slope = (scores / settings.softcap).square_().neg_().add_(1.0)
            if settings.num_tokens is not None:
                scores[:, settings.num_tokens :] = -torch.inf
            if needs_grad:
                scores = torch.log_softmax(scores, dim=-1)
                losses = -scores.gather(1, ids[:, None])[:, 0]
            else:
                losses = F.cross_entropy(scores, ids, reduction="none")
            if weights is not None:
                losses *= weights[chunk]
            loss += losses.sum()
            if loss_sums is not None and target_sources is not None:
                loss_sums.add_by_source(losses, target_sources[chunk])
            if not needs_grad:
                continue
            # d loss / d scores = softmax - one_hot, written over the log-probabilities.
            grad_scores = scores.exp_()
            grad_scores[torch.arange(len(ids), device=ids.device), ids] -= 1.0
            if slope is not None:
                grad_scores.mul_(slope)
            if settings.scale != 1.0:
                grad_scores.mul_(settings.scale)
            if weights is not None:
                grad_scores.mul_(weights[chunk, None])
            grad_scores = grad_scores.to(hidden.dtype)
            del scores, losses, slope  # with a large vocabulary what follows is the peak of the step
            grad_hidden[chunk] = grad_scores @ head_weight
            if trains_head:
                part = grad_scores.T @ rows
                # Chunks are added in fp32, because bf16 would lose the small ones.
                grad_weight = part if grad_weight is None else grad_weight.float().add_(part)
                del part
            del grad_scores  # else it would live until the next chunk has made its own
        if needs_grad:
            ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.to(head_weight.dtype)
        return loss

    @staticmethod
    def backward(ctx, grad_output):  # noqa: ANN001, ANN205
        # Scaled in place and handed over: a second copy of the vocabulary's gradient would be the peak of the step.
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        grad_weight = None if grad_weight is None else grad_weight.mul_(grad_output)
        return grad_hidden.mul_(grad_output), grad_weight, *(None,) * 6
