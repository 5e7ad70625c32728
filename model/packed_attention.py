"""Causal attention that never crosses from one packed document into the next.

Registered with transformers as the attention implementation `packed`: the model's own code computes queries, keys,
values and RoPE, and calls this function with the document lengths that we pass through its keyword arguments. No mask
is built, so the cost is that of each document alone.
"""

import inspect

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

NAME = "packed"
_VARLEN_KNOWS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 may not


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    document_lengths: tuple[int, ...],
    cu_seq_lens: torch.Tensor,
    **kwargs,  # noqa: ANN003  what transformers passes to every implementation
) -> tuple[torch.Tensor, None]:
    """Attention per document. query `(1, heads, tokens, head_dim)`, key and value `(1, kv_heads, tokens, head_dim)`.

    Returns `(1, tokens, heads, head_dim)`. On CUDA in half precision the varlen flash kernel of torch runs
    (`torch.nn.attention.varlen`); elsewhere scaled_dot_product_attention, document by document.
    """
    unsupported = {"sliding_window", "softcap", "s_aux"} & {k for k, v in kwargs.items() if v is not None}
    if unsupported or kwargs.get("dropout"):
        raise ValueError(f"packed attention has no {', '.join(sorted(unsupported)) or 'dropout'}")
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, cu_seq_lens, max(document_lengths), scaling), None
    dtype = query.dtype
    if query.device.type == "cpu":  # torch's CPU flash backward is 3 times slower in bf16 than in fp32
        query, key, value = query.float(), key.float(), value.float()
    grouped = query.shape[1] != key.shape[1]
    documents = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in zip(*(x.split(document_lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(documents, dim=2).transpose(1, 2).to(dtype), None


def _varlen(query, key, value, cu_seq_lens, longest, scaling) -> torch.Tensor:  # noqa: ANN001
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    if _VARLEN_KNOWS_GQA:
        options = {"enable_gqa": True}
    else:
        options = {}
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    window = (-1, 0)  # no tokens to the right: causal
    return varlen_attn(
        q, k, v, cu_seq_lens, cu_seq_lens, longest, longest, scale=scaling, window_size=window, **options
    )[None]


AttentionInterface.register(NAME, packed_attention)
