"""Causal attention within each document of a micro-batch, without cross-document attention.

It is registered with transformers as the attention implementation `packed`. The model's own code computes queries, keys,
values and RoPE, and calls `packed_attention` with the document lengths, which we pass through its keyword arguments.
transformers builds no attention mask for a name that is not in its AttentionMaskInterface, so each document costs as much as if
it were alone. The sliding window of a layer also comes from transformers: a window of W includes the token itself and the W - 1
tokens before it.
"""

import functools
import inspect
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from model.product_attention import product_attention, product_gradients

if TYPE_CHECKING:
    from distributed.context import Context

NAME = "packed"
CHUNK_QUERIES = 512  # a chunk has heads x 512 x keys scores
_VARLEN_SUPPORTS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 may not


class DocumentLengths:
    """The boundaries of the documents in a row.

    `lengths` are in tokens. `cu_seq_lens` is int32 `(documents + 1)` on the device. `kernels` is `cuda` or `cpu` and selects the
    kernels; by default the queries' device selects them (a simulation of a GPU on fake CPU tensors sets `cuda`). `context` is the
    group of ranks that share the row, with a slice of the tokens on each; None means that this rank has all tokens.
    Compiled code reads `longest`, `cu_seq_lens` and `ends` (`cu_seq_lens` on the host), but not the tuple: torch.compile would
    guard on its length and compile a layer again for every new number of documents. The class is not a frozen dataclass, because
    torch 2.11 reads and guards all fields of a frozen dataclass.
    """

    def __init__(
        self,
        lengths: tuple[int, ...],
        cu_seq_lens: torch.Tensor,
        kernels: str | None = None,
        context: "Context | None" = None,
    ) -> None:
        self.lengths, self.cu_seq_lens, self.kernels, self.context = lengths, cu_seq_lens, kernels, context
        self.longest, self.ends = max(lengths), torch.tensor([0, *accumulate(lengths)])


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
    s_aux: torch.Tensor | None = None,
    **kwargs,  # noqa: ANN003  further arguments that transformers passes to every implementation
) -> tuple[torch.Tensor, None]:
    """Compute causal attention for each document separately.

    `query` is `(1, heads, tokens, head_dim)`, `key` and `value` are `(1, kv_heads, tokens, head_dim)`. Returns
    `(1, tokens, heads, head_dim)`, and None in place of attention weights: transformers dictates the signature. `s_aux` are
    attention sinks `(heads,)` (gpt-oss). Raises ValueError for an attention mask or dropout.

    On CUDA in half precision it runs torch's varlen flash kernel (`torch.nn.attention.varlen`), on a CPU in bf16 matrix
    products (model/product_attention.py). Otherwise, and for documents longer than the sliding window, it runs
    scaled_dot_product_attention for each document, or for chunks of its queries.
    No kernel in torch supports a softcap or sinks. With them the scores are plain matrix products for chunks of queries,
    recomputed in backward, which is slow but needs only the memory of a single chunk.
    torch.compile sees a single operator: torch's varlen operator, or `packed::attention` for all other kernels.
    If ranks share the row, arguments and result are slices with this rank's tokens, and each rank computes some heads for all
    tokens of the row.
    """
    if attention_mask is not None or kwargs.get("dropout"):
        raise ValueError("packed attention does not support attention masks or dropout")
    context, options = documents.context, (documents, scaling, sliding_window, softcap)
    if context is None:
        return _attention(query, key, value, *options, s_aux), None
    query, key, value = context.to_heads(query), context.keys_to_heads(key), context.keys_to_heads(value)
    sinks = None if s_aux is None else context.own_heads(s_aux)
    return context.to_tokens(_attention(query, key, value, *options, sinks)), None


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: DocumentLengths,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    kernels = documents.kernels or query.device.type
    settings = _Settings(kernels, scaling, sliding_window, softcap, sinks)
    if kernels == "cuda" and query.dtype in (torch.bfloat16, torch.float16) and settings.is_plain:
        return _varlen(query, key, value, documents.cu_seq_lens, documents.longest, scaling, sliding_window)
    if torch.compiler.is_compiling():  # never with sinks: layers of experts are not compiled
        return _attention_operator(query, key, value, documents.ends, scaling, sliding_window, softcap)
    return _documents(query, key, value, documents.lengths, settings)


class _Settings(NamedTuple):
    """The settings of a layer's attention.

    `kernels` is `cuda` or `cpu` and selects the kernels. `window` is the number of tokens that a token attends to, including
    itself; None means that it attends to all tokens before it. `sinks` `(heads,)` adds one score per head to the softmax. The
    sink takes a part of the probability but has no value, so that a head need not attend to any token (gpt-oss,
    arXiv:2508.10925).
    """

    kernels: str
    scaling: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch has kernels for these settings."""
        return self.softcap is None and self.sinks is None


def _documents(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], settings: _Settings
) -> torch.Tensor:
    outputs = [
        product_attention(q, k, v, part_lengths, settings.scaling) if by_products else _document(q, k, v, settings)
        for by_products, part_lengths, (q, k, v) in _parts((query, key, value), lengths, settings)
    ]
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


def _parts(
    tensors: tuple[torch.Tensor, ...], lengths: tuple[int, ...], settings: _Settings
) -> list[tuple[bool, tuple[int, ...], tuple[torch.Tensor, ...]]]:
    """Split `tensors` `(1, heads, tokens, head_dim)` into parts: one per document, or a single part with all documents.

    Returns (whether model/product_attention.py computes the part, lengths of its documents, its slices of `tensors`) for each
    part. All documents are a single part if matrix products compute all of them.
    """
    has_products = settings.kernels == "cpu" and tensors[0].dtype == torch.bfloat16 and settings.is_plain
    longest = (settings.window or max(lengths)) if has_products else 0
    if max(lengths) <= longest:
        return [(True, lengths, tensors)]
    parts = zip(*(x.split(lengths, dim=2) for x in tensors), strict=True)
    return [(length <= longest, (length,), part) for length, part in zip(lengths, parts, strict=True)]


@torch.library.custom_op("packed::attention", mutates_args=())
def _attention_operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Run `_documents` as an operator for compiled code. For backward it keeps only its arguments."""
    settings = _Settings(query.device.type, scaling, window, softcap)
    with torch.no_grad():
        return _documents(query, key, value, tuple(ends.diff().tolist()), settings).contiguous()


@_attention_operator.register_fake
def _(query, key, value, ends, scaling, window, softcap) -> torch.Tensor:  # noqa: ANN001
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op("packed::attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value. Autograd is disabled inside an operator, hence `torch.func.vjp`."""
    settings = _Settings(query.device.type, scaling, window, softcap)
    tensors = grad.transpose(1, 2), query, key, value
    gradients = [
        product_gradients(g.transpose(1, 2), q, k, v, part_lengths, scaling)
        if by_products
        else _document_gradients(g, q, k, v, settings)
        for by_products, part_lengths, (g, q, k, v) in _parts(tensors, tuple(ends.diff().tolist()), settings)
    ]
    grad_query, grad_key, grad_value = (torch.cat(parts, dim=2).contiguous() for parts in zip(*gradients, strict=True))
    return grad_query, grad_key, grad_value


@_attention_backward.register_fake
def _(grad, query, key, value, ends, scaling, window, softcap) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # noqa: ANN001
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_arguments(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


_attention_operator.register_autograd(
    lambda ctx, grad: (*_attention_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None),
    setup_context=_keep_arguments,
)


def _document(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: _Settings) -> torch.Tensor:
    """Return causal attention of one document, `(1, tokens, heads, head_dim)`."""
    dtype = q.dtype
    if settings.kernels == "cpu":  # in bf16, backward of torch's CPU kernel takes up to 3 times as long as in fp32
        q, k, v = q.float(), k.float(), v.float()
    # Without checkpointing, autograd would keep the scores of all chunks, which is the full score matrix.
    outputs = [
        chunk(q, k, v)
        if chunk.func is _whole
        else checkpoint(
            chunk, q[:, :, queries], k[:, :, keys], v[:, :, keys], use_reentrant=False, preserve_rng_state=False
        )
        for queries, keys, chunk in _chunks(q.shape[2], settings)
    ]
    return (torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]).transpose(1, 2).to(dtype)


def _document_gradients(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: _Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value of `_document`, computed chunk by chunk. Sums over chunks are fp32."""
    dtype = q.dtype
    if settings.kernels == "cpu":
        q, k, v = q.float(), k.float(), v.float()
    grad = grad.to(q.dtype)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    for queries, keys, chunk in _chunks(q.shape[2], settings):
        arguments = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        chunk_grad_q, chunk_grad_k, chunk_grad_v = torch.func.vjp(chunk, *arguments)[1](grad[:, :, queries])
        grad_q[:, :, queries] = chunk_grad_q
        grad_k[:, :, keys] += chunk_grad_k
        grad_v[:, :, keys] += chunk_grad_v
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


def _chunks(length: int, settings: _Settings) -> list[tuple[slice, slice, functools.partial[torch.Tensor]]]:
    """Split a document of `length` tokens into chunks: (slice of queries, slice of keys, function that computes the chunk)."""
    scaling, window = settings.scaling, settings.window or length
    if settings.is_plain and length <= window:
        return [(slice(None), slice(None), functools.partial(_whole, scaling=scaling))]
    chunks = []
    for start in range(0, length, CHUNK_QUERIES):
        end = min(length, start + CHUNK_QUERIES)
        first = max(0, start - window + 1)  # no query of the chunk attends to keys before it
        chunk = functools.partial(_chunk, offset=start - first, window=window, settings=settings)
        chunks.append((slice(start, end), slice(first, end), chunk))
    return chunks


def _whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)


def _chunk(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offset: int, window: int, settings: _Settings
) -> torch.Tensor:
    """Return attention of a chunk of queries of one document. The first query has the position of key `offset`.

    With a softcap it is softmax(softcap * tanh(scores / softcap)) in fp32 (Gemma 2, arXiv:2408.00118, section 2).
    """
    scaling, softcap, sinks = settings.scaling, settings.softcap, settings.sinks
    queries = torch.arange(offset, offset + q.shape[2], device=q.device)[:, None]
    keys = torch.arange(k.shape[2], device=q.device)[None]
    seen = (keys <= queries) & (keys > queries - window)
    if settings.is_plain:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=grouped)
    grouped_q = q.reshape(1, k.shape[1], -1, *q.shape[2:])  # the query heads that share a key head
    scores = (grouped_q @ k[:, :, None].transpose(3, 4)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        sink_scores = sinks.to(scores.dtype).view(1, k.shape[1], -1, 1, 1).expand(*scores.shape[:4], 1)
        scores = torch.cat([scores, sink_scores], dim=-1)
    weights = scores.softmax(dim=-1)[..., : k.shape[2]].to(v.dtype)
    return (weights @ v[:, :, None]).reshape(*q.shape[:3], v.shape[3])


def _varlen(query, key, value, cu_seq_lens, longest, scaling, window) -> torch.Tensor:  # noqa: ANN001
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    if _VARLEN_SUPPORTS_GQA:
        options: dict[str, Any] = {"enable_gqa": True}
    else:
        options = {}
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    window_size = (window - 1 if window else -1, 0)  # keys to the left and to the right of the token; -1: no limit
    output = varlen_attn(
        q, k, v, cu_seq_lens, cu_seq_lens, longest, longest, scale=scaling, window_size=window_size, **options
    )
    return cast(torch.Tensor, output)[None]


AttentionInterface.register(NAME, packed_attention)
