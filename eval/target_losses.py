"""Losses of target tokens, from the forward of transformers' own model, so that its softcaps, scales and windows apply."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from eval.generate import left_padded

LOSS_TOKENS = 4096  # of a batch, with padding; bounds the memory of the logits


@dataclass(frozen=True)
class LossSum:
    """A sum of losses of target tokens in nats, and the number of these targets or the sum of their weights."""

    nats: float
    targets: float

    @property
    def mean(self) -> float:
        """Nats per target token. NaN without targets."""
        return self.nats / self.targets if self.targets else math.nan


def total(losses: list[LossSum]) -> LossSum:
    """Add the losses of several sequences."""
    return LossSum(math.fsum(loss.nats for loss in losses), sum(loss.targets for loss in losses))


def target_losses(model: PreTrainedModel, sequences: Sequence[tuple[list[int], Sequence[float]]]) -> list[LossSum]:
    """Return the loss of the target tokens of each (token ids, weights), from one forward. A collective if the model is sharded.

    weights: bool, or factors of the tokens' losses. The first weight is treated as 0, because nothing precedes the first token.
    All ranks of a sharded model must call this equally often; a rank without sequences passes an empty list.
    """
    losses = [LossSum(0.0, 0)] * len(sequences)
    with_targets = [i for i, sequence in enumerate(sequences) if loss_work(sequence)]
    if with_targets:
        batch = _batch_losses(model, [sequences[i] for i in with_targets])
        for i, loss in zip(with_targets, batch, strict=True):
            losses[i] = loss
    elif isinstance(model, FSDPModule):
        _batch_losses(model, [([0, 0], [0, 1])])  # takes part in gathering the parameters
    return losses


def loss_work(sequence: tuple[list[int], Sequence[float]]) -> int:
    """Return the number of tokens that must be read for the loss of a sequence: 0 if it has no target."""
    return len(sequence[0]) if any(sequence[1][1:]) else 0


@torch.no_grad()  # as in distributed.sharding.evaluating, because the model may be sharded
def _batch_losses(model: PreTrainedModel, sequences: list[tuple[list[int], Sequence[float]]]) -> list[LossSum]:
    ids, mask = left_padded([ids for ids, _ in sequences], model.device)
    width = ids.shape[1]
    # Answers are at the right end, so logits are needed only from the column of the batch's first target on.
    first = min(width - len(w) + next(i for i in range(1, len(w)) if w[i]) for _, w in sequences)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=width - first + 1,
    )
    logits = output.logits[:, :-1]  # column c is predicted in column c - 1
    losses = []
    for row, (tokens, weights) in enumerate(sequences):
        targets = [i for i in range(1, len(tokens)) if weights[i]]
        columns = [width - len(tokens) + i for i in targets]
        at = torch.tensor(columns, device=ids.device)
        nats = F.cross_entropy(logits[row, at - first].float(), ids[row, at], reduction="none")
        factors = torch.tensor([float(weights[i]) for i in targets], dtype=torch.float64, device=ids.device)
        losses.append(LossSum((nats.double() * factors).sum().item(), sum(weights[i] for i in targets)))
    return losses
