"""The mathematics of torch's varlen kernel (torch.nn.attention.varlen), forward and backward, for CPU tensors."""

from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend


def varlen_forward(query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *rest):
    """Return (output, logsumexp, rng state) in the shapes of torch_attn::_varlen_attn. Check the kernel's requirements."""
    for tensor in (query, key, value):
        assert tensor.dtype in (torch.bfloat16, torch.float16) and tensor.dim() == 3 and tensor.stride(-1) == 1
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()
    assert isinstance(max_q, int) and max_q == int(cu_q.diff().max())
    assert rest[4:] in ((), (SDPBackend.FLASH_ATTENTION.value,)), "torch 2.15 chose cuDNN's kernel"
    output = torch.empty_like(query)
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    for part, probabilities, sums in _documents(query, key, cu_q, scale, is_causal, window_size):
        output[part] = (probabilities @ _heads(value[part], query)).transpose(0, 1).to(query.dtype)
        lse[:, part] = sums
    return output, lse, query.new_zeros(2, dtype=torch.int64)


def varlen_backward(
    grad, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, is_causal, rng, scale=None, window=None
):
    """Return the gradients of query, key and value, like torch_attn::_varlen_attn_backward."""
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    assert not warns, "with warn_only the kernel of CUDA is not deterministic (attention_backward.cu)"
    grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    for part, probabilities, _ in _documents(query, key, cu_q, scale, is_causal, window):
        upper, keys, values = _heads(grad[part], query), _heads(key[part], query), _heads(value[part], query)
        grad_scores = upper @ values.transpose(1, 2)
        grad_scores = probabilities * (grad_scores - (grad_scores * probabilities).sum(-1, keepdim=True))
        grad_scores = grad_scores * (scale or query.shape[-1] ** -0.5)
        grad_query = grad_scores @ keys
        grad_key = grad_scores.transpose(1, 2) @ _heads(query[part], query)
        grad_value = probabilities.transpose(1, 2) @ upper
        for gradient, by_head in zip(grads, (grad_query, grad_key, grad_value), strict=True):
            if gradient.shape[1] != by_head.shape[0]:  # the queries of a group share a key
                by_head = by_head.unflatten(0, (-1, groups)).sum(1)
            gradient[part] = by_head.transpose(0, 1).to(gradient.dtype)
    return tuple(grads)


def _heads(tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Return the tensor in fp32 as `(heads of the query, tokens, head_dim)`."""
    return tensor.float().transpose(0, 1).repeat_interleave(query.shape[1] // tensor.shape[1], dim=0)


def _documents(query, key, cu, scale, is_causal, window) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield (slice of tokens, probabilities `(heads, tokens, tokens)`, logsumexp of the scores) for each document."""
    left, right = window or (-1, -1)
    for start, end in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        part, length = slice(start, end), end - start
        scores = _heads(query[part], query) @ _heads(key[part], query).transpose(1, 2)
        scores = scores * (scale or query.shape[-1] ** -0.5)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = torch.ones(length, length, dtype=torch.bool)
        if is_causal or right == 0:
            seen &= distance >= 0
        if left >= 0:
            seen &= distance <= left
        scores = scores.masked_fill(~seen, -torch.inf)
        yield part, scores.softmax(-1), scores.logsumexp(-1)
