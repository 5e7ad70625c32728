"""Labels sampled from the softmax, and random signs of losses: pure functions of (seed, document, position).

They do not depend on the number of ranks or on packing. The Fisher diagonal (model/ewc/fisher.py) and sampled generation
(eval/generate.py) draw from here.
"""

from typing import Protocol

import torch

from common.random_bits import hash64_tensor, mix32_
from model.loss import HeadSettings, visit_logits

ESTIMATORS = ("model", "empirical")


class PackedInputs(Protocol):
    """The part of a micro-batch that is used here."""

    position_ids: torch.Tensor  # (1, tokens), from 0 in each document
    cu_seq_lens: torch.Tensor  # int32 (documents + 1)
    target_positions: torch.Tensor  # (targets,)


class Draw:
    """Random numbers that change a forward's loss; exactly one of the two is set.

    signs: fp32 `(targets,)`, a factor of each target's loss. keys: int64 `(targets,)`; each selects the label that is
    sampled for its target. Not a dataclass, because FSDP casts the tensors inside dataclasses.
    """

    def __init__(self, signs: torch.Tensor | None = None, keys: torch.Tensor | None = None) -> None:
        self.signs, self.keys = signs, keys

    def factors(self, weights: torch.Tensor | None) -> torch.Tensor | None:
        """The factor of each target's loss, fp32 `(targets,)`, or None if all are 1: its sign times the root of its weight.

        The Fisher diagonal is made of squared gradients. With the roots a target of weight w counts like w such targets.
        """
        if weights is None:
            return self.signs
        return weights.sqrt() if self.signs is None else self.signs * weights.sqrt()

    def labels(
        self, hidden: torch.Tensor, head_weight: torch.Tensor, target_ids: torch.Tensor, settings: HeadSettings
    ) -> torch.Tensor:
        """The labels of the loss, `(targets,)`: `target_ids`, or with keys labels sampled from the softmax."""
        keys = self.keys
        if keys is None:
            return target_ids
        sampled = torch.empty_like(target_ids)

        def sample(logits: torch.Tensor, start: int) -> None:
            sampled[start : start + len(logits)] = sample_labels(logits, keys[start : start + len(logits)])

        with torch.no_grad():
            visit_logits(hidden, head_weight, sample, settings)
        return sampled


def make_draw(estimator: str, batch: PackedInputs, documents: torch.Tensor, seed: int) -> Draw:
    """The draw of a micro-batch. `documents` int64 `(documents,)` are the numbers of its documents in the whole data.

    `empirical`: an independent random sign for each document. `model`: labels sampled from the model's own distribution.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"{estimator!r} is none of {', '.join(ESTIMATORS)}")
    targets = batch.target_positions
    document = documents[torch.searchsorted(batch.cu_seq_lens[1:].contiguous(), targets.int(), right=True)]
    if estimator == "empirical":
        sign = hash64_tensor(seed, document, torch.full_like(document, -1)) & 1  # -1 is not a position
        return Draw(signs=(1 - 2 * sign).float())
    return Draw(keys=hash64_tensor(seed, document, batch.position_ids[0, targets]))


def sample_labels(logits: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """int64 `(rows,)`: a label for each row of `logits` `(rows, vocabulary)`, with the probabilities of its softmax.

    The label is the first of exponential clocks with rates exp(logits) (the Gumbel-max trick). A rounding error of the
    logits changes it only if two labels are that close, unlike with the inverse of the distribution function.
    """
    words = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    low, high = (keys & 0xFFFFFFFF).int(), (keys >> 32).int()
    words = mix32_(words + low[:, None], high[:, None])
    # 31 bits, exact near zero: an unlikely label wins by an early ring.
    time = words.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(-(2.0**-31)).log1p_().neg_()
    return torch.sub(logits, time.log_(), out=time).argmax(dim=1)
