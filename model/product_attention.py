"""Causal attention in bf16 on a CPU, as matrix products.

torch's CPU flash kernel is fast in forward only. Its backward is parallel over heads alone, computes in fp32, and is no
faster in bf16. Here blocks of 128 queries are multiplied by the keys up to their last query, so little is computed above the
diagonal, and all query heads that share a key head are multiplied at once. As in flash attention (arXiv:2205.14135, algorithms
1 and 4) scores and softmax are fp32, and the probabilities are rounded to the dtype of the values before they are multiplied.

docs/performance.md has the times.
"""

from collections.abc import Iterator

import torch

BLOCK = 128  # queries
# Probabilities are kept for backward in documents of up to this many tokens, and computed again in longer documents. At 512
# tokens they take as much memory as the fp32 query, key, value and output that SDPA keeps if a head has 128 dimensions, and 1.4
# times as much if it has 64.
KEEP_PROBABILITIES = 512


def product_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], scaling: float
) -> torch.Tensor:
    """Return causal attention within documents of `lengths` tokens, `(1, tokens, heads, head_dim)`.

    `query` is `(1, heads, tokens, head_dim)`, `key` and `value` are `(1, kv_heads, tokens, head_dim)`. The result of a document
    does not depend on the other documents, to the bit.
    """
    return _ProductAttention.apply(query, key, value, lengths, scaling)  # pyright: ignore[reportReturnType]


def _blocks(lengths: tuple[int, ...]) -> list[tuple[int, int, int, bool]]:
    """Return (start of the document, start and end of a block of queries, whether probabilities are kept) for each block."""
    blocks, first = [], 0
    for length in lengths:
        for start in range(first, first + length, BLOCK):
            blocks.append((first, start, min(first + length, start + BLOCK), length <= KEEP_PROBABILITIES))
        first += length
    return blocks


def _mask(lengths: tuple[int, ...]) -> torch.Tensor:
    """Return fp32 `(BLOCK, longest + BLOCK)`: -inf above the diagonal of the last BLOCK columns, 0 elsewhere."""
    longest = max(lengths)
    return torch.full((BLOCK, longest + BLOCK), -torch.inf).triu_(longest + 1)


def _probabilities(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return causal softmax(q k^T) in `dtype`, `(kv_heads, group x queries, keys)`. The last query is at the last key.

    `q` is fp32, already scaled, `(heads, queries, head_dim)`. `k` is fp32 `(kv_heads, keys, head_dim)`.
    """
    queries, end = q.shape[1], mask.shape[1] - BLOCK + q.shape[1]
    unseen = mask[:queries, end - k.shape[1] : end].repeat(len(q) // len(k), 1)
    # A single operator: bmm and an addition would take another pass over the scores.
    scores = torch.baddbmm(unseen, _grouped(q, len(k)), k.transpose(1, 2))
    return torch.softmax(scores, dim=2).to(dtype)


def _grouped(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Reshape `(heads, queries, head_dim)` to `(kv_heads, group x queries, head_dim)`. A group shares a key head."""
    return x.reshape(kv_heads, -1, x.shape[-1])


class _ProductAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, lengths, scaling):  # noqa: ANN001, ANN205
        """Compute `product_attention`."""
        q, k, v, dtype = query[0], key[0].contiguous(), value[0].contiguous(), query.dtype
        scaled, k32, mask = q.float().mul_(scaling), k.float(), _mask(lengths)
        output = torch.empty((q.shape[1], *q.shape[::2]), dtype=dtype)
        kept = []
        for first, start, end, keeps in _blocks(lengths):
            p = _probabilities(scaled[:, start:end], k32[:, first:end], mask, dtype)
            product = torch.bmm(p, v[:, first:end]).view(len(q), end - start, -1)
            output[start:end].copy_(product.transpose(0, 1))
            if keeps and any(ctx.needs_input_grad):
                kept.append(p)
        ctx.save_for_backward(query, k[None], v[None], *kept)
        ctx.lengths, ctx.scaling = lengths, scaling
        return output[None]

    @staticmethod
    def backward(ctx, grad_output):  # noqa: ANN001, ANN205
        """Return the gradients of query, key and value."""
        q, k, v, *kept = ctx.saved_tensors
        return *product_gradients(grad_output, q, k, v, ctx.lengths, ctx.scaling, iter(kept)), None, None


def product_gradients(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scaling: float,
    kept: Iterator[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, given `grad`, the gradient of the result of `product_attention`.

    The gradients of key and value are summed over blocks in fp32. `kept` iterates over the kept probabilities of blocks.
    """
    q, k, v, grad = query[0], key[0].contiguous(), value[0].contiguous(), grad[0].transpose(0, 1)
    kv_heads, dtype = len(k), q.dtype
    scaled, k32, mask = q.float().mul_(scaling), k.float(), _mask(lengths)
    grad_q = torch.empty((q.shape[1], *q.shape[::2]), dtype=dtype)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float32) for x in (k, v))
    for first, start, end, keeps in _blocks(lengths):
        seen, block = slice(first, end), slice(start, end)
        p = next(kept) if keeps and kept else _probabilities(scaled[:, block], k32[:, seen], mask, dtype)
        rows, grad_rows = (_grouped(x[:, block], kv_heads) for x in (q, grad))
        grad_p, p32 = torch.bmm(grad_rows, v[:, seen].transpose(1, 2)).float(), p.float()
        # The mean gradient of a row is computed from the same rounded numbers as the row. If one key has nearly all of the
        # probability (an attention sink), their difference is small and would otherwise be rounding error.
        mean = (p32 * grad_p).sum(-1, keepdim=True).div_(p32.sum(-1, keepdim=True))
        grad_scores = grad_p.sub_(mean).mul_(p32).to(dtype)
        product = torch.bmm(grad_scores, k[:, seen]).view(len(q), end - start, -1)
        grad_q[block].copy_(product.transpose(0, 1))
        grad_k[:, seen] += torch.bmm(grad_scores.transpose(1, 2), rows)
        grad_v[:, seen] += torch.bmm(p.transpose(1, 2), grad_rows)
    grad_q = grad_q.mul_(scaling).transpose(0, 1)
    return grad_q[None], grad_k.mul_(scaling).to(dtype)[None], grad_v.to(dtype)[None]
