"""Context parallel: ranks that share the tokens of a micro-batch (`sharding.context`), for documents that one rank cannot hold.

Every rank of a context group has a slice of the tokens of the group's micro-batch (data/batches.py), and computes on it all that
a token needs for itself. Attention needs all tokens of a document. So two all-to-alls surround it (Ulysses, arXiv:2309.14509):
before it each rank gives its tokens' other heads away and gets the other tokens of its own heads; after it the way back.
The ranks of a group have different tokens of one loss, as ranks with different documents have: the groups are no dimension of FSDP's
mesh, and a checkpoint does not depend on them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd

from distributed.sharding import bound_collectives

Exchange = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Context:
    """The group of this rank.

    members: the ranks of the group, as many as each has parts. Compiled code reads only how many there are, which is a constant
    to it; an int would be a symbol, and every shape below an expression that takes the compiler seconds.
    exchange: sends the i-th of `ranks` equal parts of dimension 0 to the group's i-th rank, and puts what comes from the i-th
    rank at the i-th place; with gradients.
    """

    rank: int
    members: tuple[int, ...]
    exchange: Exchange

    @property
    def ranks(self) -> int:
        return len(self.members)

    def to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of all heads `(1, heads, tokens, head_dim)` -> all tokens of this rank's heads
        `(1, heads / ranks, ranks x tokens, head_dim)`. A collective.
        """
        _, heads, tokens, width = x.shape
        parts = x.view(self.ranks, heads // self.ranks, tokens, width).transpose(1, 2).contiguous()
        return self.exchange(parts).view(1, self.ranks * tokens, heads // self.ranks, width).transpose(1, 2)

    def keys_to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """`to_heads` of keys or values. Each of too few heads is repeated, for as many ranks as share its queries."""
        repeats = 1
        while x.shape[1] * repeats % self.ranks:  # a loop, because the compiler cannot read math.gcd of a symbol
            repeats += 1
        return self.to_heads(x.repeat_interleave(repeats, dim=1) if repeats > 1 else x)

    def own_heads(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's heads `(heads / ranks,)` of what every rank has for all heads `(heads,)`."""
        return x.view(self.ranks, -1)[self.rank]

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens of this rank's heads `(1, ranks x tokens, heads / ranks, head_dim)` -> this rank's tokens of all heads
        `(1, tokens, heads, head_dim)`. A collective.
        """
        _, tokens, heads, width = x.shape
        parts = self.exchange(x.contiguous().view(self.ranks, tokens // self.ranks, heads, width))
        return parts.transpose(0, 1).reshape(1, tokens // self.ranks, self.ranks * heads, width)


def join_context(ranks: int) -> Context:
    """The group of this rank: neighbours, such as those of a node. A collective of all ranks; it makes all groups."""
    group, _ = dist.new_subgroups(ranks, group_desc="context")
    assert isinstance(group, dist.ProcessGroup)  # an int on processes outside of all groups, and there is none
    bound_collectives([group])
    return Context(dist.get_rank(group), tuple(range(ranks)), functools.partial(_all_to_all, group))


def pretended_context(ranks: int) -> Context:
    """A context without other ranks, for a simulation: it takes the memory of a real one, forward and backward."""
    return Context(0, tuple(range(ranks)), lambda x: x * 1)


def _all_to_all(group: dist.ProcessGroup, x: torch.Tensor) -> torch.Tensor:
    return all_to_all_single_autograd(x, None, None, group)
