"""What a run computes on a number of ranks: its steps, and the micro-batch that needs the most memory."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.dealing import Deal, Dealer, balance
from model.flops import PAIR_WEIGHTS, step_flops
from planner.shape import ModelShape
from training.inputs import Inputs

MOST_DEALS = 2000  # steps that are dealt in search of the worst micro-batch
MOST_ITEMS = 150_000  # documents of these steps together: about ten seconds
MOST_STEPS = 200  # steps whose work is kept


@dataclass(frozen=True)
class Load:
    """Forward and backward of one micro-batch on one rank."""

    lengths: tuple[int, ...]  # of its documents, in tokens
    targets: int
    step: int = 0  # 0-based
    rank: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(self.lengths)


@dataclass(frozen=True)
class StepWork:
    """One step over all ranks."""

    step: int  # 0-based
    tokens: int
    targets: float
    flops: float  # that are necessary (model.flops.step_flops)
    micro_batches: int  # of each rank
    balance: float  # share of the time in which a mean rank computes (data.dealing.balance)


@dataclass(frozen=True)
class Workload:
    """steps: those that were looked at, evenly spaced over `total_steps`. worst: the micro-batch with the most tokens."""

    total_steps: int
    steps: Sequence[StepWork]
    worst: Load
    is_exact: bool  # whether all steps were looked at for `worst`


def planned_workload(
    inputs: Inputs, shape: ModelShape, rows: int, sequence_length: int, ranks: int, kind: str = "cuda"
) -> Workload:
    """The workload of a run's real plan, dealt to `ranks` ranks with micro-batches of `rows * sequence_length` tokens.

    The plan does not depend on the number of ranks; the deals do, and they are what the ranks of such a run will compute.
    kind: of the planned device, whose cost of attention decides the deals (`model.flops.PAIR_WEIGHTS`). Without
    packing a micro-batch has `rows` documents. All steps are looked at where that is cheap, else evenly spaced ones.
    """
    dealer = inputs.dealer
    costs = functools.partial(shape.work.costs, pair_weight=PAIR_WEIGHTS[kind])
    dealer = Dealer(rows * sequence_length if dealer.packing else rows, costs, dealer.packing)
    total, corpus = inputs.total_steps, inputs.train
    items_per_step = max(1, inputs.plan.batch(0).num_examples)
    looked_at = _evenly_spaced(total, min(MOST_DEALS, max(20, MOST_ITEMS // items_per_step)))
    kept = {looked_at[i] for i in _evenly_spaced(len(looked_at), MOST_STEPS)}
    steps: list[StepWork] = []
    most, worst = -1, (0, 0, ())  # tokens; step, rank, items
    for step in looked_at:
        batch = inputs.plan.batch(step)
        deal = dealer.deal(batch.items, corpus, ranks)
        for micro_batch in deal.items:
            tokens = [sum(map(corpus.num_tokens, items)) for items in micro_batch]
            rank = int(np.argmax(tokens))
            if tokens[rank] > most:  # of equal ones the first
                most, worst = tokens[rank], (step, rank, micro_batch[rank])
        if step in kept:
            targets = sum(batch.targets_by_source)
            flops = step_flops(shape.work, batch.document_lengths, targets)
            tokens = sum(batch.document_lengths)
            steps.append(StepWork(step, tokens, targets, flops, len(deal.items), balance([deal])))
    step, rank, items = worst
    lengths = tuple(length for item in items for length in corpus.document_lengths(item))
    targets = sum(int(np.count_nonzero(corpus.get(item)[1])) for item in items)
    return Workload(total, steps, Load(lengths, targets, step, rank), is_exact=len(looked_at) == total)


def uniform_workload(
    shape: ModelShape, examples: int, length: int, global_examples: int, epochs: int, rows: int, ranks: int
) -> Workload:
    """A workload before there is data: `examples` documents of `length` tokens, all of them targets.

    rows: documents of one micro-batch on one rank. As in training, an epoch ends with a smaller step, and a step has the
    fewest micro-batches that hold it.
    """
    whole, rest = divmod(examples, global_examples)
    epoch = [global_examples] * whole + [rest] * bool(rest)
    total = len(epoch) * epochs
    steps = []
    for step in _evenly_spaced(total, MOST_STEPS):
        documents = epoch[step % len(epoch)]
        deal = _uniform_deal(documents, rows, ranks)
        flops = step_flops(shape.work, [length] * documents, documents * length)
        tokens = documents * length
        steps.append(StepWork(step, tokens, float(tokens), flops, len(deal.items), balance([deal])))
    # A smaller step in fewer micro-batches may have the fullest of them.
    kinds = {documents: step for step, documents in reversed(list(enumerate(epoch)))}  # the first step of each size
    fullest = [(len(_uniform_deal(documents, rows, ranks).items[0][0]), -step) for documents, step in kinds.items()]
    documents, step = max(fullest)
    return Workload(total, steps, Load((length,) * documents, documents * length, -step), is_exact=True)


def _uniform_deal(documents: int, rows: int, ranks: int) -> Deal:
    """`documents` equal items, spread as evenly as possible; the first micro-batches and ranks have the most."""
    micro_batches = -(-documents // (rows * ranks))
    bins = micro_batches * ranks
    sizes = [documents // bins + (i < documents % bins) for i in range(bins)]
    items = tuple(tuple((0,) * size for size in sizes[m : m + ranks]) for m in range(0, bins, ranks))
    return Deal(items, np.array(sizes, dtype=np.int64).reshape(-1, ranks))


def _evenly_spaced(count: int, at_most: int) -> list[int]:
    """Up to `at_most` of the numbers below `count`, the first one and the last one among them."""
    if count <= at_most:
        return list(range(count))
    return [round(i * (count - 1) / (at_most - 1)) for i in range(at_most)]
