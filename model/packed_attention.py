"""Causal attention within each document of a micro-batch, without cross-document attention.

It is registered with transformers as the attention implementation `packed`. The model's own code computes queries, keys,
values and RoPE, and calls `packed_attention` with the document lengths, which we pass through its keyword arguments.
transformers builds no attention mask for a name that is not in its AttentionMaskInterface, so the cost is that of each
document alone. The sliding window of a layer also comes from transformers: a window of W includes the token itself and the
W - 1 tokens before it.
"""

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from model.product_attention import product_attention

NAME = "packed"
CHUNK_QUERIES = 512  # scores of one chunk: heads x 512 x keys
_VARLEN_SUPPORTS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 may not


class DocumentLengths:
    """The boundaries of the documents in a row, as an object that is opaque to torch.compile.

    lengths: in tokens. cu_seq_lens: int32 `(documents + 1)`, on the device. kernels: cuda | cpu, whose kernels run; None:
    those of the queries' device (a simulation of a GPU on fake CPU tensors names them).
    If a layer had a tuple as argument, torch.compile would guard on its length and recompile the layer for every new
    number of documents. Not a frozen dataclass, because torch 2.11 reads and guards all fields of one.
    """

    def __init__(self, lengths: tuple[int, ...], cu_seq_lens: torch.Tensor, kernels: str | None = None) -> None:
        self.lengths, self.cu_seq_lens, self.kernels = lengths, cu_seq_lens, kernels


@torch.compiler.disable  # document lengths differ in every micro-batch, so it would be recompiled every time
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
    **kwargs,  # noqa: ANN003  further arguments that transformers passes to every implementation
) -> tuple[torch.Tensor, None]:
    """Attention per document. query `(1, heads, tokens, head_dim)`, key and value `(1, kv_heads, tokens, head_dim)`.

    Returns `(1, tokens, heads, head_dim)` and None in place of attention weights. transformers dictates the signature.
    Raises ValueError for an attention mask, attention sinks or dropout.

    On CUDA in half precision it runs torch's varlen flash kernel (`torch.nn.attention.varlen`), on a CPU in bf16 matrix
    products (model/product_attention.py). Otherwise, and for documents longer than the sliding window, it runs
    scaled_dot_product_attention for each document, or for chunks of its queries.
    No kernel in torch supports a softcap. With a softcap the scores are plain matrix products for chunks of queries,
    recomputed in backward, which is slow but needs the memory of one chunk only.
    """
    if attention_mask is not None or kwargs.get("s_aux") is not None or kwargs.get("dropout"):
        raise ValueError("packed attention does not support attention masks, attention sinks or dropout")
    kernels = documents.kernels or query.device.type
    if kernels == "cuda" and query.dtype in (torch.bfloat16, torch.float16) and softcap is None:
        return _varlen(query, key, value, documents.cu_seq_lens, max(documents.lengths), scaling, sliding_window), None
    window = sliding_window or max(documents.lengths)
    by_products = kernels == "cpu" and query.dtype == torch.bfloat16 and softcap is None
    if by_products and max(documents.lengths) <= window:
        return product_attention(query, key, value, documents.lengths, scaling), None
    outputs = [
        product_attention(q, k, v, (q.shape[2],), scaling)
        if by_products and q.shape[2] <= window
        else _document(q, k, v, kernels, scaling, sliding_window, softcap)
        for q, k, v in zip(*(x.split(documents.lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def _document(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kernels: str,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Causal attention of one document, `(1, tokens, heads, head_dim)`."""
    length, dtype = q.shape[2], q.dtype
    if kernels == "cpu":  # in bf16, the backward of torch's CPU kernel takes up to 3 times as long as in fp32
        q, k, v = q.float(), k.float(), v.float()
    window = window or length
    if softcap is None and length <= window:
        grouped = q.shape[1] != k.shape[1]
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        return output.transpose(1, 2).to(dtype)
    chunks = []
    for start in range(0, length, CHUNK_QUERIES):
        end = min(length, start + CHUNK_QUERIES)
        first = max(0, start - window + 1)  # no query of the chunk attends to keys before it
        # Without checkpointing, autograd would keep the scores of all chunks, which is the full score matrix.
        chunks.append(
            checkpoint(
                _chunk,
                *(q[:, :, start:end], k[:, :, first:end], v[:, :, first:end]),
                *(start - first, scaling, window, softcap),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return torch.cat(chunks, dim=2).transpose(1, 2).to(dtype)


def _chunk(q, k, v, offset, scaling, window, softcap) -> torch.Tensor:  # noqa: ANN001
    """Attention of a chunk of queries of one document. The first query has the position of key `offset`.

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
    if _VARLEN_SUPPORTS_GQA:
        options: dict[str, Any] = {"enable_gqa": True}
    else:
        options = {}
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    # (keys to the left, keys to the right) besides the token itself; -1: no limit
    window_size = (window - 1 if window and window < longest else -1, 0)
    output = varlen_attn(
        q, k, v, cu_seq_lens, cu_seq_lens, longest, longest, scale=scaling, window_size=window_size, **options
    )
    return cast(torch.Tensor, output)[None]


AttentionInterface.register(NAME, packed_attention)
