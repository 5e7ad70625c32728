"""The documents of each optimizer step, as a pure function of (seed, step).

There is no data loader state: the step number determines the batch, so resuming is immediate. A plan does not depend on
the number of ranks; data/dealing.py distributes the documents of a step over ranks and micro-batches.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch

from data.dealing import Items
from data.examples import Documents
from data.mixing import StreamOfDocuments, StreamOfWindows, main_order, mean_step_targets, total_targets
from data.sources import Corpus, Windows, as_corpus, exact_sum

T = TypeVar("T")


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step over all ranks and micro-batches."""

    items: Items  # documents, or windows of a token store
    # Divisor of the step's loss: the number of target tokens or the sum of their weights. 1 if a step of windows of a token
    # store has no target, because its loss is then 0 / 1
    num_target_tokens: int | float
    targets_by_source: tuple[int | float, ...]  # number of target tokens, or the sum of their weights
    document_lengths: tuple[int, ...]  # in tokens


@dataclass(frozen=True)
class TrainingPlan:
    """The steps of a run, each computed on demand. An epoch contains every item of the main source exactly once."""

    num_steps: int
    batch: Callable[[int], StepBatch]
    steps_per_epoch: tuple[int, ...]
    items: Callable[[int], list[int]]  # step -> its items; much faster than `batch`
    passes: Callable[[int], tuple[float, ...]]  # number of steps -> passes over each source
    # For each mixed-in source, the number of steps over which its share holds (data/mixing.py)
    steps_of_shares: tuple[int, ...]
    warnings: tuple[str, ...]  # for the log: steps above `global_tokens`


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass on one rank: documents concatenated without padding.

    input_ids, position_ids: int64 `(1, tokens)`; positions restart at each document.
    document_lengths: in tokens, as Python ints, so that reading them does not synchronise with the device.
    target_positions: int64 `(targets,)`, indices of the hidden states that predict `target_ids` `(targets,)`. In a `part`
    they count from the part's first token.
    target_sources: int64 `(targets,)`, index of each target's source. None if there is only one source.
    target_weights: fp32 `(targets,)`, the factor of each target's loss. None if all are 1.
    base_rows: numpy int64 `(targets,)`, each target's row in base_log_p and base_ids, numbered from 0 in order; -1 if the
    target is not anchored. These three fields are None if no target is anchored.
    base_ids: int32 `(rows, k)`, the tokens whose log-probabilities under the base model are stored.
    base_log_p: fp16 `(rows, k + 1)`, log-probabilities of `base_ids` under the base model, then of all remaining tokens together.
    first: in a `part`, the index of its first token in the whole micro-batch.
    filling: the number of tokens at the end that belong to no document. No loss and no router counts them.
    divisor: the number by which the loop divides the loss. `chunked` computes gradients at that scale, so that bf16 rounds
    them once. A loop that divides by another number still gets correct gradients.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    document_lengths: tuple[int, ...]
    cu_seq_lens: torch.Tensor  # int32 (documents + 1,): document boundaries, for variable-length attention
    target_positions: torch.Tensor
    target_ids: torch.Tensor
    target_sources: torch.Tensor | None = None
    target_weights: torch.Tensor | None = None
    base_rows: np.ndarray | None = None
    base_log_p: torch.Tensor | None = None
    base_ids: torch.Tensor | None = None
    first: int = 0
    filling: int = 0
    divisor: int | float = 1

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same micro-batch on another device. The copy to CUDA is asynchronous."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: value.pin_memory().to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }
        return MicroBatch(**moved)

    def part(self, part: int, parts: int) -> "MicroBatch":
        """Return the `part`-th of `parts` equal slices of the tokens, with the targets that their hidden states predict.

        A rank of a context group computes such a part (distributed/context.py). Document boundaries describe the whole
        micro-batch, because attention sees all its tokens. If the number of tokens is no multiple of `parts`, the tokens that are
        added become a document of their own without targets.
        """
        tokens, lengths = self.input_ids.shape[1], self.document_lengths
        size = -(-tokens // parts)
        ids, positions = self.input_ids, self.position_ids
        if filling := parts * size - tokens:
            lengths = (*lengths, filling)
            ids = torch.cat([ids, ids.new_zeros(1, filling)], dim=1)
            positions = torch.cat([positions, torch.arange(filling, device=positions.device)[None]], dim=1)
        span = slice(part * size, (part + 1) * size)
        num_counted = tokens - self.filling - span.start  # tokens of documents in the whole, from this part's first on
        is_inside = (self.target_positions >= span.start) & (self.target_positions < span.stop)
        sources, weights = self.target_sources, self.target_weights
        return replace(
            self,
            # Copies: for a view, the compiler guards on the whole tensor and compiles again when its shape changes.
            input_ids=ids[:, span].clone(),
            position_ids=positions[:, span].clone(),
            document_lengths=lengths,
            cu_seq_lens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=ids.device),
            target_positions=self.target_positions[is_inside] - span.start,
            target_ids=self.target_ids[is_inside],
            target_sources=None if sources is None else sources[is_inside],
            target_weights=None if weights is None else weights[is_inside],
            first=span.start,
            filling=size - min(size, max(0, num_counted)),
        )


def plan_training(
    source: Corpus | Documents | Windows,
    epochs: int,
    seed: int,
    global_examples: int | None = None,
    global_tokens: int | None = None,
) -> TrainingPlan:
    """Plan `epochs` passes over the main source, with the other sources mixed in (data/mixing.py).

    Pass one of the two step sizes. With `global_examples`, a step has that many examples of the main source, and mixed-in
    examples come on top. With `global_tokens`, a step has at most that many target tokens over all sources. Only a step with a
    single example of the main source may exceed this.
    """
    corpus = as_corpus(source)
    main, main_share = corpus.sources[0], corpus.shares[0]
    step_targets = mean_step_targets(main, global_examples, global_tokens and global_tokens * main_share)
    streams = [
        StreamOfWindows(part, seed, number, share / main_share)
        if isinstance(part, Windows)
        else StreamOfDocuments(part, seed, number, share / main_share)
        for number, (part, share) in enumerate(zip(corpus.sources[1:], corpus.shares[1:], strict=True), 1)
    ]
    order = main_order(main, epochs, seed, global_examples, global_tokens, streams)

    def items_of(step: int) -> list[int]:
        items = order.items(step)
        before, after = order.targets_before(step), order.targets_before(step + 1)
        for offset, stream in zip(corpus.offsets[1:-1], streams, strict=True):
            items += [offset + index for index in stream.items_of_step(before, after)]
        return items

    @functools.lru_cache(maxsize=16)  # called by the prefetch thread, then by the training loop
    def batch(step: int) -> StepBatch:
        return step_batch(items_of(step), corpus)

    def passes(steps: int) -> tuple[float, ...]:
        targets = order.targets_before(steps)
        mixed_passes = (
            stream.ratio * targets / total_targets(part)
            for stream, part in zip(streams, corpus.sources[1:], strict=True)
        )
        ends = np.cumsum([0, *order.steps_per_epoch])
        return float(np.interp(steps, ends, range(len(ends)))), *mixed_passes

    num_steps = sum(order.steps_per_epoch)
    warnings = []
    if order.num_too_large:
        warnings.append(
            f"warning: {order.num_too_large} of {num_steps} steps may have more than batch.global_tokens="
            f"{global_tokens} target tokens, up to {order.largest:,.0f}: one example of the main source, with what is mixed "
            "in with it, has more"
        )
    steps = tuple(stream.steps_of_share(step_targets) for stream in streams)
    return TrainingPlan(num_steps, batch, order.steps_per_epoch, items_of, passes, steps, tuple(warnings))


def plan_pass(source: Corpus | Documents | Windows, tokens_per_step: int) -> tuple[StepBatch, ...]:
    """Return the steps of one pass over every item of every source, in file order.

    A step has at most `tokens_per_step` tokens over all ranks, or a single item that is longer.
    """
    corpus = as_corpus(source)
    steps: list[list[int]] = []
    tokens = 0
    for item in range(len(corpus)):
        length = corpus.num_tokens(item)
        if not steps or tokens + length > tokens_per_step:
            steps.append([])
            tokens = 0
        steps[-1].append(item)
        tokens += length
    return tuple(step_batch(items, corpus) for items in steps)


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """Yield the same items, computed by a thread up to 2 items in advance. Items must not be None."""
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, items, None) for _ in range(2))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, items, None))
            yield item


def collate(items: Items, source: Corpus | Documents | Windows) -> MicroBatch:
    """Concatenate the documents of `items` into tensors. An empty micro-batch becomes two tokens without a target.

    A rank with an empty micro-batch still runs forward and backward, because every rank must join the all-gathers.
    """
    corpus = as_corpus(source)
    encoded = [corpus.get(item) for item in items] or [(np.zeros(2, dtype=np.int64), np.zeros(2, dtype=bool))]
    lengths = tuple(length for item in items for length in corpus.document_lengths(item)) or (2,)
    flat = np.concatenate([ids for ids, _ in encoded])
    weights = np.concatenate([weights for _, weights in encoded])
    target_indices = np.flatnonzero(weights)
    weights = weights[target_indices]
    target_sources = None
    if len(corpus.sources) > 1:
        targets = [np.count_nonzero(weights) for _, weights in encoded]
        numbers = [corpus.locate(item)[0] for item in items] or [0]
        target_sources = torch.from_numpy(np.repeat(numbers, targets))
    return MicroBatch(
        input_ids=torch.from_numpy(flat)[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        document_lengths=lengths,
        cu_seq_lens=torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32),
        target_positions=torch.from_numpy(target_indices - 1),  # position t - 1 predicts token t of the same document
        target_ids=torch.from_numpy(flat[target_indices]),
        target_sources=target_sources,
        target_weights=None if (weights == 1).all() else torch.from_numpy(weights),
        filling=0 if items else 2,
    )


def step_batch(items: list[int], corpus: Corpus) -> StepBatch:
    """Return the step of these items."""
    targets = [[] for _ in corpus.sources]
    for item in items:
        targets[corpus.locate(item)[0]].append(corpus.num_targets(item))
    sums = tuple(exact_sum(weights) for weights in targets)
    documents = tuple(length for item in items for length in corpus.document_lengths(item))
    return StepBatch(tuple(items), exact_sum(sums) or 1, sums, documents)
