"""The steps that the ranks of a run compute, and its largest micro-batch: from the run's data, or from equal examples."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.dealing import Dealer, balance
from model.flops import PAIR_WEIGHTS, step_flops
from model.memory import ModelShape
from scripts.plan.step_time import StepWork
from training.inputs import Inputs

MOST_DEALS = 2000  # steps that are dealt in search of the largest micro-batch
MOST_ITEMS = 150_000  # documents of these steps together: about ten seconds
MOST_STEPS = 200  # steps that the time model computes


@dataclass(frozen=True)
class Load:
    """One micro-batch on one rank. `lengths` are its documents' tokens, `step` counts from 0."""

    lengths: tuple[int, ...]
    targets: int
    step: int = 0
    rank: int = 0

    @property
    def tokens(self) -> int:
        """Return the tokens of all documents."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Workload:
    """The steps of a run. `steps` is an evenly spaced sample of them; `worst` is the micro-batch with the most tokens."""

    total_steps: int
    steps: Sequence[StepWork]
    worst: Load
    is_exact: bool  # whether every step was searched for `worst`

    @property
    def mean_tokens(self) -> float:
        """Return the mean number of tokens in a step, over all ranks."""
        return sum(step.tokens for step in self.steps) / len(self.steps)

    @property
    def tokens(self) -> float:
        """Return the number of tokens of the whole run."""
        return self.mean_tokens * self.total_steps


def planned_workload(
    inputs: Inputs,
    shape: ModelShape,
    rows: int,
    sequence_length: int,
    ranks: int,
    kind: str = "cuda",
    context: int = 1,
) -> Workload:
    """Deal the steps of a run to `ranks` ranks, and return its workload.

    The documents of a step do not depend on the number of ranks; how they are dealt does. A micro-batch has
    `rows * sequence_length` tokens, or without packing `rows` documents. `kind` (cuda | cpu) is the planned device: the
    cost of its attention decides the deal (`model.flops.PAIR_WEIGHTS`). `context` ranks share a micro-batch. A long run is
    sampled at evenly spaced steps.
    """
    packs, corpus, total = inputs.dealer.packing, inputs.train, inputs.total_steps
    costs = functools.partial(shape.work.costs, pair_weight=PAIR_WEIGHTS[kind])
    dealer = Dealer(rows * sequence_length if packs else rows, costs, packs, context)
    items_per_step = max(1, len(inputs.plan.batch(0).items))
    dealt_steps = _evenly_spaced(total, min(MOST_DEALS, max(20, MOST_ITEMS // items_per_step)))
    timed_steps = {dealt_steps[i] for i in _evenly_spaced(len(dealt_steps), MOST_STEPS)}
    steps: list[StepWork] = []
    most, worst = -1, (0, 0, ())  # tokens; step, rank, items
    for step in dealt_steps:
        batch = inputs.plan.batch(step)
        deal = dealer.deal(batch.items, corpus, ranks)
        for micro_batch in deal.items:
            tokens = [sum(map(corpus.num_tokens, items)) for items in micro_batch]
            rank = int(np.argmax(tokens))
            if tokens[rank] > most:  # the first of equal micro-batches
                most, worst = tokens[rank], (step, rank * context, micro_batch[rank])
        if step in timed_steps:
            targets, tokens = sum(batch.targets_by_source), sum(batch.document_lengths)
            flops = step_flops(shape.work, batch.document_lengths, targets)
            steps.append(StepWork(step, tokens, targets, flops, len(deal.items), balance([deal])))
    step, rank, items = worst
    lengths = tuple(length for item in items for length in corpus.document_lengths(item))
    targets = sum(int(np.count_nonzero(corpus.get(item)[1])) for item in items)
    return Workload(total, steps, Load(lengths, targets, step, rank), is_exact=len(dealt_steps) == total)


def uniform_workload(
    shape: ModelShape, examples: int, length: int, global_examples: int, epochs: int, rows: int, ranks: int
) -> Workload:
    """Return the workload of `examples` documents of `length` tokens, all of them targets.

    A micro-batch has up to `rows` documents; `ranks` counts the ranks that have micro-batches of their own. As in training,
    an epoch ends with a smaller step, and a step has as few micro-batches as hold it, filled as evenly as possible.
    """
    whole, rest = divmod(examples, global_examples)
    epoch = [global_examples] * whole + [rest] * bool(rest)

    def micro_batches(documents: int) -> int:
        return -(-documents // (rows * ranks))

    fullest = [-(-documents // (micro_batches(documents) * ranks)) for documents in epoch]
    most = max(fullest)  # the smaller last step may have the fullest micro-batch, because it has fewer of them
    steps = []
    for step in _evenly_spaced(len(epoch) * epochs, MOST_STEPS):
        documents = epoch[step % len(epoch)]
        count, tokens = micro_batches(documents), documents * length
        less, more = divmod(documents, count * ranks)  # `more` micro-batches have `less + 1` documents
        flops = step_flops(shape.work, [length] * documents, tokens)
        slowest = count * less + -(-more // ranks)
        steps.append(StepWork(step, tokens, tokens, flops, count, documents / ranks / slowest))
    worst = Load((length,) * most, most * length, fullest.index(most))
    return Workload(len(epoch) * epochs, steps, worst, is_exact=True)


def _evenly_spaced(count: int, at_most: int) -> list[int]:
    """Return up to `at_most` numbers below `count`, with the first and the last."""
    if count <= at_most:
        return list(range(count))
    return [round(i * (count - 1) / (at_most - 1)) for i in range(at_most)]
