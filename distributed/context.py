"""Context parallel: ranks share the tokens of a micro-batch (`sharding.context`), for documents too long for a single rank.

Every rank of a context group has a slice of the tokens of the group's micro-batch (data/batches.py) and computes everything
except attention on it. Attention needs all tokens of a document, so two all-to-alls surround it (Ulysses, arXiv:2309.14509). The
first exchanges slices of tokens with all heads for slices of heads with all tokens, and the second reverses the exchange.
For FSDP, ranks with different tokens of a document are the same as ranks with different documents. The groups are therefore no
dimension of its mesh, and a checkpoint does not depend on them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from common.torch_private import private
from distributed.sharding import set_timeouts

all_to_all_single_autograd = private("distributed._functional_collectives.all_to_all_single_autograd")
Exchange = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Context:
    """The context group of this rank, whose index in the group is `rank`.

    `members` are the indices of the group's ranks. Compiled code reads only the length of this tuple, which is a constant to the
    compiler. An int would be a symbol, and all shapes that depend on it expressions, which cost the compiler seconds.
    `exchange` is an all-to-all with gradients: it splits dimension 0 into `ranks` equal parts, sends part i to rank i of the
    group, and returns the parts that the ranks sent, in the order of the ranks.
    """

    rank: int
    members: tuple[int, ...]
    exchange: Exchange

    @property
    def ranks(self) -> int:
        return len(self.members)

    def to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Exchange this rank's tokens of all heads for all tokens of this rank's heads. A collective.

        `(1, heads, tokens, head_dim)` -> `(1, heads / ranks, ranks x tokens, head_dim)`.
        """
        _, heads, tokens, width = x.shape
        parts = x.view(self.ranks, heads // self.ranks, tokens, width).transpose(1, 2).contiguous()
        return self.exchange(parts).view(1, self.ranks * tokens, heads // self.ranks, width).transpose(1, 2)

    def keys_to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Apply `to_heads` to keys or values. If the ranks do not divide the heads, repeat each head for the ranks that need it."""
        repeats = 1
        while x.shape[1] * repeats % self.ranks:  # a loop, because the compiler does not support math.gcd of a symbol
            repeats += 1
        return self.to_heads(x.repeat_interleave(repeats, dim=1) if repeats > 1 else x)

    def own_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice `(heads / ranks,)` of `x` `(heads,)`, which has a value for each head. No communication."""
        return x.view(self.ranks, -1)[self.rank]

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Exchange all tokens of this rank's heads for this rank's tokens of all heads. A collective.

        `(1, ranks x tokens, heads / ranks, head_dim)` -> `(1, tokens, heads, head_dim)`.
        """
        _, tokens, heads, width = x.shape
        parts = self.exchange(x.contiguous().view(self.ranks, tokens // self.ranks, heads, width))
        return parts.transpose(0, 1).reshape(1, tokens // self.ranks, self.ranks * heads, width)


def join_context(ranks: int) -> Context:
    """Create groups of `ranks` neighbouring ranks (on a node, if it has so many) and return this rank's. All ranks must call it."""
    group, _ = dist.new_subgroups(ranks, group_desc="context")
    assert isinstance(group, dist.ProcessGroup)  # an int would mean a process without a group; every rank has one
    set_timeouts([group])
    return Context(dist.get_rank(group), tuple(range(ranks)), functools.partial(_all_to_all, group))


def pretended_context(ranks: int) -> Context:
    """Return a context without communication, for a simulation. It takes the memory of a real context in forward and backward."""
    return Context(0, tuple(range(ranks)), lambda x: x * 1)


def _all_to_all(group: dist.ProcessGroup, x: torch.Tensor) -> torch.Tensor:
    return all_to_all_single_autograd(x, None, None, group)
