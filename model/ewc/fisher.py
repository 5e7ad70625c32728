"""The diagonal of the Fisher information of a language model on a domain's documents, on local shards.

Per target token, with N target tokens in all documents d:

    model      F = 1/N sum_d sum_t E_{y ~ p(. | x_<t)} (d log p(y | x_<t) / d theta)^2
    empirical  F = 1/N sum_d (sum_t d log p(x_t | x_<t) / d theta)^2

With weights (data/encoding.py) the scores of a token of weight w get the factor sqrt(w), and N is the sum of the weights:
a token, or a document, of weight w counts like w of them.

The first is the Fisher information: the second derivative of KL(p_0 || p_theta) at theta_0, whatever the labels of the
data are. The second squares each document's own gradient. It is not the Fisher information, and differs from it more the
worse the model predicts the data (Kunstner et al., arXiv:1905.12558).

Neither needs a backward per document. In the square of a group's summed gradient the cross terms of two documents must
vanish on average. With labels sampled from the model they do, because every score has mean zero given its context. With
the data's labels they do not, so each document's loss gets a random sign. The square of one group is then unbiased, with
a relative error of about sqrt(2) whatever the number of its documents. With n documents in groups of b, the relative
error is about sqrt(2 b / n).
"""

import time
from collections.abc import Callable

import torch

from common.errors import UserError
from distributed.gradients import gradient_of
from distributed.process_group import StopSignal, agree_any
from distributed.sharding import before_micro_batch, local, local_shard, reshard
from model.ewc.batches import FisherBatches
from model.label_sampling import draw
from model.language_model import PackedLanguageModel, trained_parameters
from model.loss import chunked

REPORT_EVERY = 30.0  # seconds


def estimate_fisher(
    model: PackedLanguageModel,
    batches: FisherBatches,
    estimator: str,
    seed: int,
    strategy: str,
    stop: StopSignal,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, torch.Tensor] | None:
    """The local shard of the Fisher diagonal of every parameter, fp32, in 1 / (unit of the parameter)^2 per target token.

    A collective. `estimator` is `model` or `empirical`. Tied weights appear once, with the gradient of both uses. FSDP
    must sum gradients over ranks (distributed/sharding.py: sum_gradients), because its mean would make the result
    `ranks^2` times too small. Returns None after a signal. Raises UserError if the result is not finite.
    """
    reshard(model)  # after an evaluation under grad_op the model's parameters are not shards
    ranks = stop.ranks
    parameters = trained_parameters(model)
    sums = {n: torch.zeros_like(local_shard(p)[0], dtype=torch.float32) for n, p in parameters.items()}
    started = reported = time.perf_counter()
    for group in range(batches.num_groups):
        dealt = batches.micro_batches(group, ranks.rank, ranks.world_size)
        for number, (batch, documents) in enumerate(dealt, 1):
            if stop.agreed():
                for parameter in parameters.values():
                    parameter.grad = None
                reshard(model)
                return None
            before_micro_batch(model, strategy, number == len(dealt))
            batch = batch.to(ranks.device)
            drawn, token_losses = draw(estimator, batch, documents.to(ranks.device), seed)
            chunked(model.head, model(drawn), drawn, token_losses).backward()
        for name, parameter in parameters.items():
            gradient = local(gradient_of(parameter)).float()
            sums[name].addcmul_(gradient, gradient)
            parameter.grad = None
        now = time.perf_counter()
        if now - reported > REPORT_EVERY:
            reported, left = now, (now - started) / (group + 1) * (batches.num_groups - group - 1)
            say(f"EWC: Fisher diagonal, group {group + 1}/{batches.num_groups}, {left / 60:.1f} min left")
    bad = not all(bool(torch.isfinite(total).all()) for total in sums.values())
    if agree_any(bad, ranks):
        raise UserError("the Fisher diagonal is not finite: check the data of ewc.data, or compute in fp32")
    for total in sums.values():
        total.div_(batches.num_targets)
    return sums
