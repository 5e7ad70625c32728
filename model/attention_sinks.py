"""Packed attention with sinks (gpt-oss, arXiv:2508.10925): beside its keys each head has a score of its own in the softmax.

The score takes its share of the weights and has no value, so a head need not attend to anything. No kernel in torch has it: the
scores here are plain matrix products for chunks of queries, recomputed in backward, in the memory of one chunk.
"""

import functools

import torch
from torch.utils.checkpoint import checkpoint

from model import packed_attention


def attention_with_sinks(
    sinks: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: packed_attention.DocumentLengths,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention per document, `(1, tokens, heads, head_dim)`, of shapes as in `packed_attention`; sinks `(heads,)`.

    window: tokens that a token attends to, with itself.
    """
    assert softcap is None  # no architecture has both
    outputs = []
    for q, k, v in zip(*(x.split(documents.lengths, dim=2) for x in (query, key, value)), strict=True):
        length = q.shape[2]
        for start in range(0, length, packed_attention.CHUNK_QUERIES):
            end = min(length, start + packed_attention.CHUNK_QUERIES)
            first = max(0, start - (window or length) + 1)  # no query of the chunk attends to keys before it
            chunk = functools.partial(_chunk, offset=start - first, scaling=scaling, window=window or length)
            parts = q[:, :, start:end], k[:, :, first:end], v[:, :, first:end], sinks
            # Without checkpointing, autograd would keep the weights of all chunks, which is the full score matrix.
            outputs.append(checkpoint(chunk, *parts, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _chunk(q, k, v, sinks, offset, scaling, window) -> torch.Tensor:  # noqa: ANN001
    """Attention of a chunk of queries of one document. The first query has the position of key `offset`. Softmax is in fp32."""
    queries = torch.arange(offset, offset + q.shape[2], device=q.device)[:, None]
    keys = torch.arange(k.shape[2], device=q.device)[None]
    seen = (keys <= queries) & (keys > queries - window)
    heads_of_each_key = q.reshape(1, k.shape[1], -1, *q.shape[2:])
    scores = (heads_of_each_key @ k[:, :, None].transpose(3, 4)).float() * scaling
    of_heads = sinks.float().view(1, k.shape[1], -1, 1, 1).expand(*scores.shape[:4], 1)
    scores = torch.cat([scores.masked_fill(~seen, float("-inf")), of_heads], dim=-1)
    weights = scores.softmax(dim=-1)[..., :-1].to(v.dtype)
    return (weights @ v[:, :, None]).reshape(*q.shape[:3], v.shape[3])
