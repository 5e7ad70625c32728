"""The sum of target-token losses, with logits for target tokens only and in chunks.

The sum, not the mean: it is divided once by the number of target tokens of the whole step (all ranks, all
micro-batches). A mean per micro-batch weighs tokens by how few share their micro-batch (transformers#34191).
"""

import torch
import torch.nn.functional as F

CHUNK_TOKENS = 512  # logits of one chunk in fp32: 512 x 49,152 x 4 bytes = 100 MB, 512 x 151,936 x 4 = 311 MB


def cross_entropy_sum(
    hidden: torch.Tensor, head_weight: torch.Tensor, target_ids: torch.Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> torch.Tensor:
    """Sum over targets of -log p(target), in nats, as an fp32 scalar.

    hidden `(targets, hidden_size)`: the states that predict. head_weight `(vocabulary, hidden_size)`. target_ids
    `(targets,)`. Logits are the product in the dtype of `hidden`; the softmax is fp32. With no target at all the loss
    is 0 and every gradient exists and is 0, so that all ranks reduce the same parameters.
    """
    if target_ids.numel() == 0:
        return (hidden.sum() + head_weight[:1].sum()).float() * 0.0
    return _ChunkedCrossEntropySum.apply(hidden, head_weight, target_ids, chunk_tokens)


class _ChunkedCrossEntropySum(torch.autograd.Function):
    """Both gradients are computed in the forward, chunk by chunk, so that no chunk's logits outlive it.

    The loss is a scalar, so backward only has to scale them. The head is thus multiplied three times, as it must be,
    where recomputing the logits in backward would make it four.
    """

    @staticmethod
    def forward(ctx, hidden, head_weight, target_ids, chunk_tokens):  # noqa: ANN001, ANN205
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = None
        for start in range(0, len(target_ids), chunk_tokens):
            rows, ids = hidden[start : start + chunk_tokens], target_ids[start : start + chunk_tokens]
            logits = (rows @ head_weight.T).float()
            if not needs_grad:
                loss += F.cross_entropy(logits, ids, reduction="sum")
                continue
            log_normaliser = logits.logsumexp(dim=-1, keepdim=True)
            loss += (log_normaliser[:, 0] - logits.gather(1, ids[:, None])[:, 0]).sum()
            # d loss / d logits = softmax - one_hot, written over the logits.
            grad_logits = logits.sub_(log_normaliser).exp_()
            grad_logits[torch.arange(len(ids), device=ids.device), ids] -= 1.0
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[start : start + chunk_tokens] = grad_logits @ head_weight
            part = grad_logits.T @ rows
            # Chunks are added in fp32: bf16 would lose the small ones.
            grad_weight = part if grad_weight is None else grad_weight.float().add_(part)
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight.to(head_weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_output):  # noqa: ANN001, ANN205
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad_output.to(grad_hidden.dtype),
            grad_weight * grad_output.to(grad_weight.dtype),
            None,
            None,
        )
