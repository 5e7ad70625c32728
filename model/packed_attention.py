"""Causal attention that never crosses from one packed document into the next.

Registered with transformers as the attention implementation `packed`: the model's own code computes queries, keys,
values and RoPE, and calls this function with the document lengths that we pass through its keyword arguments. No mask
of the whole row is built (transformers makes none for a name that is not in its AttentionMaskInterface), so the cost is
that of each document alone. A layer's sliding window comes from transformers too: a window of W is a token and the
W - 1 before it.
"""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

NAME = "packed"
CHUNK_QUERIES = 512  # scores of one chunk: heads x 512 x keys
_VARLEN_KNOWS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 may not


@dataclass(frozen=True)
class DocumentLengths:
    """Where the documents of a row begin and end, as one object that torch.compile does not look into.

    Of a tuple among a layer's arguments it would guard the length, and compile the layer anew for every other number
    of documents.
    """

    lengths: tuple[int, ...]
    cu_seq_lens: torch.Tensor  # int32 (documents + 1), on the device


@torch.compiler.disable  # document lengths differ in every micro-batch: compiled, it would be compiled anew each time
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    documents: DocumentLengths,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,  # noqa: ANN003  what transformers passes to every implementation
) -> tuple[torch.Tensor, None]:
    """Attention per document. query `(1, heads, tokens, head_dim)`, key and value `(1, kv_heads, tokens, head_dim)`.

    Returns `(1, tokens, heads, head_dim)`. On CUDA in half precision the varlen flash kernel of torch runs
    (`torch.nn.attention.varlen`); elsewhere scaled_dot_product_attention, document by document, and for documents
    longer than the window chunk by chunk of queries. No kernel of torch has a softcap: with one the scores are plain
    matrix products in chunks of queries, computed again in backward. That is slow, but its memory is one chunk's.
    """
    if attention_mask is not None or kwargs.get("s_aux") is not None or kwargs.get("dropout"):
        raise ValueError("packed attention has no attention mask, no attention sinks and no dropout")
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and softcap is None:
        return _varlen(query, key, value, documents.cu_seq_lens, max(documents.lengths), scaling, sliding_window), None
    dtype = query.dtype
    if query.device.type == "cpu":  # torch's CPU flash backward is 3 times slower in bf16 than in fp32
        query, key, value = query.float(), key.float(), value.float()
    outputs = [
        _document(q, k, v, scaling, sliding_window, softcap)
        for q, k, v in zip(*(x.split(documents.lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype), None


def _document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    """Causal attention of one document; `(1, heads, tokens, head_dim)`."""
    length = q.shape[2]
    window = window or length
    if softcap is None and length <= window:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    chunks = []
    for start in range(0, length, CHUNK_QUERIES):
        end = min(length, start + CHUNK_QUERIES)
        first = max(0, start - window + 1)  # keys before it are out of the reach of every query in the chunk
        # Without the checkpoint autograd would keep every chunk's scores, which is the whole square after all.
        chunks.append(
            checkpoint(
                _chunk,
                *(q[:, :, start:end], k[:, :, first:end], v[:, :, first:end]),
                *(start - first, scaling, window, softcap),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return torch.cat(chunks, dim=2)


def _chunk(q, k, v, offset, scaling, window, softcap) -> torch.Tensor:  # noqa: ANN001
    """Attention of some queries of a document, the first of them at key `offset`, to the keys they can reach.

    Softcap: softmax(softcap * tanh(scores / softcap)) in fp32 (Gemma 2, arXiv:2408.00118, section 2).
    """
    queries = torch.arange(offset, offset + q.shape[2], device=q.device)[:, None]
    keys = torch.arange(k.shape[2], device=q.device)[None]
    seen = (keys <= queries) & (keys > queries - window)
    if softcap is None:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=grouped)
    heads_of_each_key = q.reshape(1, k.shape[1], -1, *q.shape[2:])
    scores = (heads_of_each_key @ k[:, :, None].transpose(3, 4)).float() * scaling
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).to(v.dtype)
    return (weights @ v[:, :, None]).reshape(*q.shape[:3], v.shape[3])


def _varlen(query, key, value, cu_seq_lens, longest, scaling, window) -> torch.Tensor:  # noqa: ANN001
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    if _VARLEN_KNOWS_GQA:
        options = {"enable_gqa": True}
    else:
        options = {}
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    # (keys to the left, keys to the right) besides the token itself; -1 is no limit.
    reach = (window - 1 if window and window < longest else -1, 0)
    return varlen_attn(
        q, k, v, cu_seq_lens, cu_seq_lens, longest, longest, scale=scaling, window_size=reach, **options
    )[None]


AttentionInterface.register(NAME, packed_attention)
