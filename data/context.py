"""One rank's part of the micro-batch of a context group (distributed/context.py)."""

from dataclasses import replace
from itertools import accumulate

import torch

from data.batches import MicroBatch


def part_of(batch: MicroBatch, part: int, parts: int) -> MicroBatch:
    """The `part`-th of `parts` equal slices of the tokens, with the targets that their hidden states predict.

    The boundaries of documents stay those of the whole micro-batch, because attention sees all of it. Tokens that are missing
    to a multiple of `parts` become a document of their own, which has no target.
    """
    tokens, lengths = batch.input_ids.shape[1], batch.document_lengths
    size = -(-tokens // parts)
    filling = parts * size - tokens
    ids, positions = batch.input_ids, batch.position_ids
    if filling:
        lengths = (*lengths, filling)
        ids = torch.cat([ids, ids.new_zeros(1, filling)], dim=1)
        positions = torch.cat([positions, torch.arange(filling, device=positions.device)[None]], dim=1)
    mine = slice(part * size, (part + 1) * size)
    counted = tokens - batch.filling - mine.start  # of the whole's tokens, from this part's first on
    chosen = (batch.target_positions >= mine.start) & (batch.target_positions < mine.stop)
    sources, weights = batch.target_sources, batch.target_weights
    return replace(
        batch,
        # Copies, because the compiler would read a view's whole and compile again where that has another form.
        input_ids=ids[:, mine].clone(),
        position_ids=positions[:, mine].clone(),
        document_lengths=lengths,
        cu_seq_lens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=ids.device),
        target_positions=batch.target_positions[chosen] - mine.start,
        target_ids=batch.target_ids[chosen],
        target_sources=None if sources is None else sources[chosen],
        target_weights=None if weights is None else weights[chosen],
        filling=size - min(size, max(0, counted)),
    )
