"""Compare the head's gradient that the loss adds to the shards in pieces with the gradient that FSDP reduces as a whole.

The tests run on 1 rank and on 2 ranks, whose worker is this file.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn

import distributed.sharding as sharding
import model.loss
from configs.config import Sharding
from distributed.sharding import before_micro_batch, gathering_strategy, local, local_shard, make_mesh, shard
from model.loss import HeadSettings, chunked, lend_weight, negative_log_likelihood
from tests.losses import targets_of
from tests.processes import ROOT, run_ranks

ROWS, TOKENS, WIDTH = 131, 127, 16  # rows that do not divide over two ranks, the last ones padding


class Small(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS, bias=False)
        self.norm = nn.Parameter(torch.ones(WIDTH))
        self.unused = nn.Parameter(torch.ones(WIDTH))
        if tied:
            self.head.weight = self.embedding.weight
        lend_weight(self.head, HeadSettings(num_tokens=TOKENS))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids) * self.norm


def gradients(strategy: str, tied: bool, dtype: torch.dtype, in_pieces: bool) -> list[torch.Tensor]:
    """Return this rank's gradients after two micro-batches. The last of several ranks has no target in the second micro-batch."""
    rank, ranks, small = dist.get_rank(), dist.get_world_size(), Small(tied)
    settings = Sharding(strategy=strategy, shard_size=1)
    mesh = make_mesh("cpu", ranks, settings)
    shard(small, [], [] if tied else [small.embedding, small.head], mesh, dtype, settings)
    # FSDP reduces a tied head's gradient together with the embedding's.
    assert (small.head.add_gradient is not None) == ((strategy in ("full", "grad_op") and not tied) or ranks == 1)
    add, calls = small.head.add_gradient, []
    small.head.add_gradient = (lambda *arguments: calls.append(1) or add(*arguments)) if in_pieces and add else None
    generator = torch.Generator().manual_seed(rank)
    for targets, is_last in ((40, False), (0 if rank == ranks - 1 and rank else 30, True)):
        before_micro_batch(small, gathering_strategy(settings, mesh), is_last)
        ids = torch.randint(0, TOKENS, (2, targets), generator=generator)
        loss = chunked(small.head, small(ids[0]), targets_of(ids[1]), negative_log_likelihood)
        (loss / 70).backward()
    sharding.reshard(small)
    assert len(calls) == (2 if in_pieces and add else 0)
    if not tied:  # rows of padding
        gradient, _, start = local_shard(small.head.weight.grad)
        assert not gradient[max(0, TOKENS - start) :].any()
    assert small.unused.grad is None  # with a gradient of 0, AdamW would apply weight decay
    results = [local(parameter.grad) for parameter in small.parameters() if parameter is not small.unused]
    if calls:  # no gradient is a view of the gradients of a whole unit, which would keep a second gradient of the head
        filled = WIDTH * results[0].itemsize  # the last shard may be filled up by a row
        assert all(gradient.untyped_storage().nbytes() <= gradient.nbytes + filled for gradient in results)
    return results


def check_gradients() -> None:
    for chunk, piece in ((1024, 4096), (9, 50)):
        model.loss.CHUNK_TOKENS, sharding.PIECE_ROWS = chunk, piece
        for strategy in ("full", "grad_op", "hybrid", "none"):
            for tied in (True, False):
                for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
                    pair = [gradients(strategy, tied, dtype, in_pieces) for in_pieces in (True, False)]
                    for ours, expected in zip(*pair, strict=True):
                        assert ours.dtype == expected.dtype == torch.float32 and expected.abs().max() > 0
                        assert (ours - expected).abs().max() <= tolerance * expected.abs().max(), (
                            strategy,
                            tied,
                            dtype,
                        )


def test_on_one_rank(monkeypatch) -> None:
    monkeypatch.setattr(model.loss, "CHUNK_TOKENS", model.loss.CHUNK_TOKENS)
    monkeypatch.setattr(sharding, "PIECE_ROWS", sharding.PIECE_ROWS)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        check_gradients()
    finally:
        dist.destroy_process_group()


def test_on_two_ranks() -> None:
    process = run_ranks(2, __file__, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("equal") == 2


if __name__ == "__main__":
    dist.init_process_group("gloo")
    check_gradients()
    print("equal", file=sys.stdout)
    dist.destroy_process_group()
