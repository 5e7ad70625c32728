"""The time of a step's collectives by the formulas of a ring: (n - 1) / n of a tensor passes each link.

Bandwidth is that of the slowest link of the ring: NVLink or PCIe inside of a node, all of a node's network cards together
between nodes, because NCCL makes a ring for each of them.
https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

from dataclasses import dataclass

from common.dtypes import DTYPES
from configs.config import Config
from planner.cluster import Cluster
from planner.shape import ModelShape

# Seconds that a collective takes in addition for each node of its ring, and inside of one: the order of what NCCL's tests
# print for small messages.
NODE_LATENCY, LOCAL_LATENCY = 20e-6, 20e-6
GLOO_REDUCES_AT = 0.5  # gloo adds on the processor: 0.77 GB/s where it gathers 1.47 GB/s (docs/performance.md)


@dataclass(frozen=True)
class Collectives:
    """Seconds on each rank, all for the whole model.

    gather: one all-gather of all parameters; reduce: one reduce-scatter of all gradients; all_reduce: of the replicas'
    gradients, once in a step. first_gather, last_reduce: of the units whose collective nothing can hide.
    """

    gather: float
    reduce: float
    all_reduce: float
    first_gather: float
    last_reduce: float
    forward_gathers: float  # per micro-batch
    backward_gathers: float
    is_gathered_once: bool  # in a step, and not in every micro-batch


def shard_ranks(config: Config, cluster: Cluster) -> int:
    """Ranks that share one copy of the model (distributed/sharding.py: make_mesh)."""
    strategy = config.sharding.strategy
    return {"hybrid": config.sharding.shard_size or cluster.per_node, "none": 1}.get(strategy, cluster.devices)


def collectives(shape: ModelShape, config: Config, cluster: Cluster, parameters: int, link: float) -> Collectives:
    """The collectives of a step. link: share of a link's bandwidth that NCCL reaches."""
    shards = shard_ranks(config, cluster)
    copies = cluster.devices // shards
    compute = DTYPES[config.model.compute_dtype].itemsize
    reduced = DTYPES[config.sharding.reduce_dtype].itemsize
    units = len(shape.layers) + len(shape.extra) + 1
    inner = _Ring(cluster, shards, -(-shards // cluster.per_node), link)
    outer = _Ring(cluster, copies, min(copies, cluster.nodes), link, sharing=min(shards, cluster.per_node))
    slower = 1 / GLOO_REDUCES_AT if cluster.device.kind == "cpu" else 1.0
    gather = inner.seconds(parameters * compute, units)
    reduce = inner.seconds(shape.num_trained * reduced, units) * slower
    # An all-reduce is a reduce-scatter and an all-gather of what this rank holds.
    all_reduce = outer.seconds(shape.num_trained * reduced / shards, units) * (1 + slower)
    vocabulary = shape.extra[0] if shape.extra else shape.root
    first = vocabulary.num_parameters + shape.layers[0].num_parameters
    last = vocabulary.num_trained or shape.layers[0].num_trained  # LoRA trains no vocabulary
    once = config.sharding.strategy in ("grad_op", "none") or _is_alone(cluster)
    # The units of an untied embedding and head are gathered once, the others also for backward (distributed/sharding.py).
    twice = 1 - sum(unit.num_parameters for unit in shape.extra) / parameters
    return Collectives(
        gather=gather,
        reduce=reduce,
        all_reduce=all_reduce,
        first_gather=gather * first / parameters,
        last_reduce=(reduce + all_reduce) * last / shape.num_trained,
        forward_gathers=1.0,
        backward_gathers=0.0 if once else twice,
        is_gathered_once=once,
    )


def _is_alone(cluster: Cluster) -> bool:
    return cluster.devices == 1 and cluster.device.kind == "cpu"


@dataclass(frozen=True)
class _Ring:
    """`ranks` on `nodes` nodes. sharing: rings like this one that share a node's network at the same time."""

    cluster: Cluster
    ranks: int
    nodes: int
    share: float
    sharing: int = 1

    def seconds(self, size: float, collectives: int) -> float:
        """Seconds of all-gathers or reduce-scatters of `size` bytes together, in so many collectives."""
        if self.ranks == 1:
            return 0.0
        bandwidth = self.cluster.device.link
        if self.nodes > 1:
            bandwidth = min(bandwidth, self.cluster.network / self.sharing)
        latency = LOCAL_LATENCY + NODE_LATENCY * (self.nodes - 1)
        return size * (self.ranks - 1) / self.ranks / (bandwidth * self.share) + collectives * latency
