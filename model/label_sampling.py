"""Random signs and labels for the Fisher diagonal (model/ewc/fisher.py): pure functions of (seed, document, position).

So they are the same for any number of ranks and however documents are packed.
"""

from typing import Protocol

import torch

from distributed.optimizer import scramble_
from model.loss import visit_logits

ESTIMATORS = ("model", "empirical")


class Batch(Protocol):
    """What is read of a micro-batch."""

    position_ids: torch.Tensor  # (1, tokens), from 0 in each document
    cu_seq_lens: torch.Tensor  # int32 (documents + 1)
    target_positions: torch.Tensor  # (targets,)


class Draw:
    """What a forward takes instead of the plain loss; one of the two is given.

    signs: fp32 `(targets,)`, the factor of each target's loss. keys: int64 `(targets,)`, from which each target's label is
    sampled. No dataclass: FSDP looks into those for tensors to cast.
    """

    def __init__(self, signs: torch.Tensor | None = None, keys: torch.Tensor | None = None) -> None:
        self.signs, self.keys = signs, keys

    def labels(
        self,
        hidden: torch.Tensor,
        head_weight: torch.Tensor,
        target_ids: torch.Tensor,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """The labels of the loss, `(targets,)`: the data's, or with keys sampled from the softmax of the logits."""
        if self.keys is None:
            return target_ids
        sampled = torch.empty_like(target_ids)

        def sample(logits: torch.Tensor, start: int) -> None:
            sampled[start : start + len(logits)] = sample_labels(logits, self.keys[start : start + len(logits)])

        with torch.no_grad():
            visit_logits(hidden, head_weight, sample, scale, softcap)
        return sampled


def make_draw(estimator: str, batch: Batch, documents: torch.Tensor, seed: int) -> Draw:
    """The draw of a micro-batch. documents: int64 `(documents,)`, the number of each in the whole data.

    `empirical`: an independent random sign for each document. `model`: labels sampled from the model's own distribution.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"{estimator!r} is none of {', '.join(ESTIMATORS)}")
    targets = batch.target_positions
    document = documents[torch.searchsorted(batch.cu_seq_lens[1:].contiguous(), targets.int(), right=True)]
    if estimator == "empirical":
        sign = mixed(seed, document, torch.full_like(document, -1)) & 1  # no position is -1
        return Draw(signs=(1 - 2 * sign).float())
    return Draw(keys=mixed(seed, document, batch.position_ids[0, targets]))


def sample_labels(logits: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """int64 `(rows,)`: a label for each row of `logits` `(rows, vocabulary)`, with the probabilities of their softmax.

    The first of exponential clocks that ring at the rates exp(logits) (the Gumbel-max trick). Unlike the inverse of the
    distribution function it changes with a rounding error of the logits only where two labels are that close.
    """
    word = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    low, high = (keys & 0xFFFFFFFF).int(), (keys >> 32).int()
    word = scramble_(word + low[:, None], high[:, None])
    # 31 bits that are exact where they are few: an early ring, by which an unlikely label wins.
    time = word.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(-(2.0**-31)).log1p_().neg_()
    return torch.sub(logits, time.log_(), out=time).argmax(dim=1)


def mixed(seed: int, *words: torch.Tensor) -> torch.Tensor:
    """int64 hash of the seed and of int64 tensors, element by element: splitmix64's finaliser (Steele et al., 2014)."""
    value = torch.full_like(words[0], seed)
    for word in (torch.zeros_like(value), *words):
        value = value + word + _signed(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            value = (value ^ (value >> shift & (1 << (64 - shift)) - 1)) * _signed(factor)
        value = value ^ (value >> 31 & (1 << 33) - 1)
    return value


def _signed(word: int) -> int:
    """The int64 with the same bits."""
    return word - 2**64 if word >= 2**63 else word
