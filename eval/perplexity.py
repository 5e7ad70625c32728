"""Losses of target tokens by the model's own forward, so that softcaps, scales and windows of any model are in them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from eval.generate import left_padded

TOKENS_PER_BATCH = 4096  # padding included; bounds the memory of the logits


@dataclass(frozen=True)
class LossSum:
    """Loss in nats over target tokens, and how many they are. Sums add up over documents and ranks; means do not."""

    nats: float
    targets: int

    @property
    def mean(self) -> float:
        """Nats per target token, every token weighing the same whatever document it is in; NaN without targets."""
        return self.nats / self.targets if self.targets else math.nan


def total(losses: list[LossSum]) -> LossSum:
    """The sum over documents."""
    return LossSum(math.fsum(loss.nats for loss in losses), sum(loss.targets for loss in losses))


def target_losses(
    model: PreTrainedModel,
    sequences: list[tuple[list[int], list[bool]]],
    advance: Callable[[int], object] = lambda finished: None,
) -> list[LossSum]:
    """For each (token ids, is_target) the loss of its target tokens; `is_target[0]` counts as False (nothing precedes it).

    advance: called with the number of sequences just done, e.g. a progress bar's `update`.
    """
    losses = [LossSum(0.0, 0)] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]))
    start = 0
    while start < len(order):
        # The longest comes first, so it gives the width of the batch.
        rows = max(1, TOKENS_PER_BATCH // max(1, len(sequences[order[start]][0])))
        chosen = order[start : start + rows]
        with_targets = [i for i in chosen if any(sequences[i][1][1:])]
        if with_targets:
            batch = _batch_losses(model, [sequences[i] for i in with_targets])
            for i, loss in zip(with_targets, batch, strict=True):
                losses[i] = loss
        advance(len(chosen))
        start += rows
    return losses


@torch.inference_mode()
def _batch_losses(model: PreTrainedModel, sequences: list[tuple[list[int], list[bool]]]) -> list[LossSum]:
    ids, mask, positions = left_padded([ids for ids, _ in sequences], model.device)
    width = ids.shape[1]
    # Column of the first target of the batch: logits further left are not needed (answers stand at the right end).
    first = min(width - len(flags) + flags.index(True, 1) for _, flags in sequences)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=width - first + 1,
    ).logits[:, :-1]  # column c is predicted in column c - 1
    losses = []
    for row, (tokens, flags) in enumerate(sequences):
        columns = [width - len(tokens) + i for i in range(1, len(tokens)) if flags[i]]
        at = torch.tensor(columns, device=ids.device)
        nats = F.cross_entropy(logits[row, at - first].float(), ids[row, at], reduction="none")
        losses.append(LossSum(nats.double().sum().item(), len(columns)))
    return losses


def windows(ids: list[int], length: int) -> list[tuple[list[int], list[bool]]]:
    """A long text as sequences of at most `length` tokens in which every token but the text's first is a target once.

    Neighbours share one token, since the first of a sequence is not predicted.
    """
    return [
        (ids[start : start + length], [False] + [True] * (len(ids[start : start + length]) - 1))
        for start in range(0, max(1, len(ids) - 1), length - 1)
    ]
