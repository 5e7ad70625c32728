"""Labels sampled from the softmax, and random signs of losses: pure functions of (seed, document, position).

They do not depend on the number of ranks or on packing. The Fisher diagonal (model/ewc.py) and sampled generation
(eval/generate.py) draw from here.
"""

import dataclasses

import torch

from common.random_bits import hash64_tensor, mix32_
from data.batches import MicroBatch
from model.loss import TokenLosses, negative_log_likelihood

ESTIMATORS = ("model", "empirical")


def draw(estimator: str, batch: MicroBatch, documents: torch.Tensor, seed: int) -> tuple[MicroBatch, TokenLosses]:
    """The micro-batch and the losses whose gradient is squared. `documents` int64 `(documents,)` are the numbers of its
    documents in the whole data.

    `empirical`: -log p of the data's labels, with an independent random sign for each document. `model`: -log p of labels
    sampled from the model's own distribution; the targets of the micro-batch are then the keys that select them.
    The Fisher diagonal is made of squared gradients, so a target of weight w gets the factor sqrt(w): it counts like w
    such targets.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"{estimator!r} is none of {', '.join(ESTIMATORS)}")
    targets = batch.target_positions
    document = documents[torch.searchsorted(batch.cu_seq_lens[1:].contiguous(), targets.int(), right=True)]
    factors = None if batch.target_weights is None else batch.target_weights.sqrt()
    if estimator == "empirical":
        sign = hash64_tensor(seed, document, torch.full_like(document, -1)) & 1  # -1 is not a position
        signs = (1 - 2 * sign).float()
        factors = signs if factors is None else signs * factors
        return dataclasses.replace(batch, target_weights=factors), negative_log_likelihood
    keys = hash64_tensor(seed, document, batch.position_ids[0, targets])
    return dataclasses.replace(batch, target_ids=keys, target_weights=factors), _loss_of_sampled_labels


def _loss_of_sampled_labels(logits: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return negative_log_likelihood(logits, sample_labels(logits.detach(), keys))


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
