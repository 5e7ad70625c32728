"""The diagonal of the Fisher information of a language model on a domain's documents, on local shards.

Per target token, with N target tokens in all documents d:

    model      F = 1/N sum_d sum_t E_{y ~ p(. | x_<t)} (d log p(y | x_<t) / d theta)^2
    empirical  F = 1/N sum_d (sum_t d log p(x_t | x_<t) / d theta)^2

The first is the Fisher information: what the second derivative of KL(p_0 || p_theta) at theta_0 is, whatever the data's
labels are. The second squares each document's own gradient; it is not the Fisher information, and differs from it the
more the worse the model predicts the data (Kunstner et al., arXiv:1905.12558).

Neither needs a backward for each document. In the square of a batch's summed gradient the cross terms of two documents
must vanish on average: of labels sampled from the model every score has mean zero, given its context; the gradients of
the data's labels have not, so each document's loss gets a random sign. Each square is thus right on average and off by
about sqrt(2) of itself, whatever number of documents it holds: of n documents, b a square, the relative error is about
sqrt(2 b / n).
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from common.errors import UserError
from distributed.process_group import Ranks, StopSignal, agree_any
from distributed.sharding import before_micro_batch, local_shard, reshard
from model.label_sampling import make_draw
from model.language_model import Batch, PackedLanguageModel, parameter_names

REPORT_EVERY = 30.0  # seconds


class Squares(Protocol):
    """The documents, square by square (model/ewc/batches.py: model and data do not know each other)."""

    num_documents: int
    num_squares: int
    num_targets: int  # over all squares and ranks

    def micro_batches(self, square: int, rank: int, world_size: int) -> Sequence[tuple[Batch, torch.Tensor]]:
        """A rank's, as many on every rank, each with its documents' numbers in the whole data, int64."""
        ...


def estimate_fisher(
    model: PackedLanguageModel,
    squares: Squares,
    estimator: str,
    seed: int,
    strategy: str,
    ranks: Ranks,
    stop: StopSignal,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, torch.Tensor] | None:
    """The local shard of the Fisher diagonal of every parameter by name, fp32, 1 / (unit of the parameter)^2 a target token.

    estimator: `model` or `empirical`. Tied weights stand once, with the gradient of both uses. FSDP must add gradients up
    over ranks (distributed/sharding.py: sum_gradients): its mean would make the result `ranks^2` times too small. Every
    rank calls it. None if a signal came. Raises UserError where it is not finite.
    """
    reshard(model)  # after an evaluation under grad_op the model's parameters are not the shards
    parameters = parameter_names(model)
    sums = {n: torch.zeros_like(local_shard(p)[0], dtype=torch.float32) for n, p in parameters.items()}
    started = reported = time.perf_counter()
    for square in range(squares.num_squares):
        dealt = squares.micro_batches(square, ranks.rank, ranks.world_size)
        for number, (batch, documents) in enumerate(dealt, 1):
            if agree_any(stop.name is not None, ranks):
                for parameter in parameters.values():
                    parameter.grad = None
                reshard(model)
                return None
            before_micro_batch(model, strategy, number == len(dealt))
            batch = batch.to(ranks.device)
            draw = make_draw(estimator, batch, documents.to(ranks.device), seed)
            model(batch, None, None, draw).backward()
        for name, parameter in parameters.items():
            gradient = local_shard(parameter.grad)[0].float()
            sums[name].addcmul_(gradient, gradient)
            parameter.grad = None
        now = time.perf_counter()
        if now - reported > REPORT_EVERY:
            reported, left = now, (now - started) / (square + 1) * (squares.num_squares - square - 1)
            say(f"EWC: Fisher diagonal, square {square + 1}/{squares.num_squares}, {left / 60:.1f} min to go")
    bad = not all(bool(torch.isfinite(total).all()) for total in sums.values())
    if agree_any(bad, ranks):
        raise UserError("the Fisher diagonal is not finite: look at the data of ewc.data, or compute in fp32")
    for total in sums.values():
        total.div_(squares.num_targets)
    return sums
