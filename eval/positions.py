"""Mean loss by position in the document: whether a model reads as far back as its window says, and beyond.

By our own packed model, one document a forward: its attention holds no square of the document for any architecture
(transformers' SDPA leaves out Gemma 2's softcap, and its eager attention of 12,288 tokens would need gigabytes a layer).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data.batches import MicroBatch
from model.architectures import head_settings
from model.language_model import PackedLanguageModel
from model.loss import logits

CHUNK_TOKENS = 512  # logits of one chunk in fp32: 512 x 49,152 x 4 bytes = 101 MB, and as much again for the softmax


@dataclass(frozen=True)
class Bucket:
    """The tokens at positions `start` to `end - 1` of all documents, and their loss in nats."""

    start: int
    end: int
    nats: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token; NaN without tokens."""
        return self.nats / self.tokens if self.tokens else math.nan


def cut(ids: Sequence[int], length: int, most: int, first: Sequence[int] = ()) -> list[list[int]]:
    """At most `most` documents of exactly `length` tokens from a long text, spread evenly over it; none overlap.

    first: tokens that each document begins with, e.g. BOS. A text that is too short gives no document.
    """
    body = length - len(first)
    fit = len(ids) // body
    count = min(most, fit)
    starts = [i * fit // count * body for i in range(count)]
    return [[*first, *ids[start : start + body]] for start in starts]


@torch.inference_mode()
def losses_by_position(
    model: PackedLanguageModel,
    documents: Sequence[Sequence[int]],
    device: torch.device,
    advance: Callable[[int], object] = lambda finished: None,
) -> list[torch.Tensor]:
    """Of each document the loss of its tokens, fp64 `(length - 1,)` in nats: entry t is of the token at position t + 1.

    advance: called with 1 after each document, e.g. a progress bar's `update`. Nothing limits the length to the window.
    """
    head = model.causal_lm.get_output_embeddings().weight[: model.num_tokens]  # without padding
    settings = head_settings(model.causal_lm.config)
    losses = []
    for document in documents:
        ids = torch.tensor(document, device=device)
        hidden = model.hidden_states(_alone(ids))[0]
        parts = [
            F.cross_entropy(logits(rows, head, settings), targets, reduction="none").double().cpu()
            for rows, targets in zip(hidden[:-1].split(CHUNK_TOKENS), ids[1:].split(CHUNK_TOKENS), strict=True)
        ]
        losses.append(torch.cat(parts))
        advance(1)
    return losses


def buckets(losses: Sequence[torch.Tensor], width: int) -> list[Bucket]:
    """Buckets of `width` positions, as many as the longest document fills; position 0 is never predicted."""
    longest = max((len(loss) + 1 for loss in losses), default=0)
    result = []
    for start in range(0, longest, width):
        parts = [loss[max(0, start - 1) : start + width - 1] for loss in losses]
        result.append(
            Bucket(start, min(start + width, longest), math.fsum(p.sum().item() for p in parts), sum(map(len, parts)))
        )
    return result


def _alone(ids: torch.Tensor) -> MicroBatch:
    """One document as a micro-batch without targets: only its hidden states are asked for."""
    length = len(ids)
    none = torch.zeros(0, dtype=torch.int64, device=ids.device)
    ends = torch.tensor([0, length], dtype=torch.int32, device=ids.device)
    return MicroBatch(ids[None], torch.arange(length, device=ids.device)[None], (length,), ends, none, none)
