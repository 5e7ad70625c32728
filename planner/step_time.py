"""The time of a step by a roofline of compute, memory traffic and communication, as a range.

    products         matrix products of the layers and the head, at a share of the peak that grows with their size
    attention        FLOPs within documents, at the share of the peak that its kernel reaches
    memory           norms, activations, RoPE, residuals, softmax of the head, FSDP's casts and copies
    communication    what of the all-gathers and reductions the computation does not hide
    optimizer        norm of the gradients and AdamW
    offload          copies to and from the host, and AdamW there
    balance          waiting for the slowest rank
    host             Python, where it starts kernels more slowly than the device runs them

Evaluations, saves, compilation and reading of data are not in it (docs/planning.md has the errors against published runs).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.dtypes import DTYPES
from configs.config import Config
from planner.assumptions import (
    ASSUMPTIONS,
    BACKWARD_ATTENTION,
    CPU_PAIR_BYTES,
    FP32_ON_CUDA,
    HALF_LENGTH,
    HOST_PER_LAYER,
    Assumptions,
)
from planner.cluster import Cluster
from planner.communication import Collectives, collectives, shard_ranks
from planner.shape import ModelShape
from planner.traffic import STATE_BYTES, Widths, copies_bytes, head_bytes, layers_bytes, optimizer_bytes
from planner.workload import StepWork, Workload


@dataclass(frozen=True)
class Speed:
    """low and high bound of the tokens per second and device, and the hours of the whole run that follow from them."""

    tokens_per_second: tuple[float, float]  # of one device, low and high
    hours: tuple[float, float]  # of the run, short and long
    parts: dict[str, float]  # seconds of a mean step: compute, memory traffic, communication in the open, ...
    middle: float = 0.0  # tokens per second and device in `sum(parts)` seconds


def expected_speed(shape: ModelShape, config: Config, cluster: Cluster, workload: Workload) -> Speed:
    """The speed of a run of `config`."""
    steps = workload.steps
    mean_tokens = sum(step.tokens for step in steps) / len(steps) / cluster.devices
    slow, middle, fast = (
        _mean_parts(shape, config, cluster, steps, assumptions) for assumptions in ASSUMPTIONS[cluster.device.kind]
    )
    slow_seconds, fast_seconds = sum(slow.values()), sum(fast.values())
    hours = workload.total_steps / 3600
    return Speed(
        tokens_per_second=(mean_tokens / slow_seconds, mean_tokens / fast_seconds),
        hours=(hours * fast_seconds, hours * slow_seconds),
        parts=middle,
        middle=mean_tokens / sum(middle.values()),
    )


def _mean_parts(
    shape: ModelShape, config: Config, cluster: Cluster, steps: Sequence[StepWork], assumptions: Assumptions
) -> dict[str, float]:
    """Seconds of each part of a mean step."""
    model = _Model(shape, config, cluster, assumptions)
    parts = [model.parts(step) for step in steps]
    return {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}


@dataclass(frozen=True)
class _Compute:
    """Seconds of forward or backward of a micro-batch on a mean rank."""

    products: float
    attention: float
    memory: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.memory


class _Model:
    """The model of one run under one set of assumptions."""

    def __init__(self, shape: ModelShape, config: Config, cluster: Cluster, assumptions: Assumptions) -> None:
        self.shape, self.config, self.cluster = shape, config, cluster
        self.device, self.assumptions = cluster.device, assumptions
        self.is_cuda = cluster.device.kind == "cuda"
        self.parameters = shape.num_parameters
        self.shards = shard_ranks(config, cluster)
        self.trained = shape.num_trained
        self.local = self.trained / self.shards
        self.bandwidth = self.device.bandwidth * assumptions.bandwidth
        self.collectives = collectives(
            shape, config, cluster, self.parameters, assumptions.link if self.is_cuda else 1.0
        )
        layers, settings = len(shape.layers), config.model
        share = math.ceil(layers / settings.checkpoint_every) / layers
        mode = settings.activation_checkpointing
        self.recomputed = 0.0 if mode in ("none", "selective") else share  # of products and attention
        self.repeated = 0.0 if mode == "none" else share  # of what is elementwise
        self.kept_on_host = share * layers if mode == "offload" else 0.0  # layers

    def parts(self, step: StepWork) -> dict[str, float]:
        """Seconds of each part of a step."""
        count = step.micro_batches
        forward, backward = self._compute(step)
        copies = self._copies(count)
        compute = count * (forward.total + backward.total) + copies
        communication = self._communication(count, forward.total, backward.total)
        # Python waits for neither, so it delays only what both leave idle.
        busy = compute + communication
        host = max(0.0, count * HOST_PER_LAYER * len(self.shape.layers) - busy) if self.is_cuda else 0.0
        offload = self._offload(step)
        optimizer = 0.0
        if not (self.config.sharding.cpu_offload and self.is_cuda):
            optimizer = self.local * optimizer_bytes(self.config) / self.bandwidth
        return {
            "products": count * (forward.products + backward.products),
            "attention": count * (forward.attention + backward.attention),
            "memory": count * (forward.memory + backward.memory) + copies,
            "communication": communication,
            "optimizer": optimizer,
            "offload": offload,
            "balance": compute * (1 / step.balance - 1),
            "host": host,
        }

    def _compute(self, step: StepWork) -> tuple[_Compute, _Compute]:
        """Forward and backward of a micro-batch."""
        work = self.shape.work
        rows = self.cluster.devices * step.micro_batches
        tokens, targets = max(step.tokens, 1) / rows, step.targets / rows
        layers, head = work.per_token * tokens, work.per_target * targets
        pairs = max(0.0, step.flops / rows - layers - head)
        rate = self._products_rate(tokens)
        outputs = self.shape.adapter_outputs
        memory = layers_bytes(self.config, self.shape.config, len(self.shape.layers), self.repeated, outputs)
        head_traffic = head_bytes(self.shape.config, self.shape.num_tokens, is_trained=not self.shape.frozen_itemsize)
        attention = self._attention(pairs, tokens)
        # The head computes its gradients in forward (model/loss.py).
        forward = _Compute(
            (layers * work.forward + head) / rate,
            attention,
            (memory[0] * tokens + head_traffic * targets) / self.bandwidth,
        )
        backward = _Compute(
            layers * (1 - work.forward * (1 - self.recomputed)) / rate,
            attention * (BACKWARD_ATTENTION + self.recomputed),
            memory[1] * tokens / self.bandwidth,
        )
        return forward, backward

    def _products_rate(self, tokens: float) -> float:
        """FLOP/s of the products of a micro-batch of so many tokens."""
        peak = self.device.flops * self.device.sustained
        if self.is_cuda and self.config.model.compute_dtype == "fp32":
            peak *= FP32_ON_CUDA
        return peak * self.assumptions.products * tokens / (tokens + self.assumptions.half_tokens)

    def _attention(self, flops: float, tokens: float) -> float:
        """Seconds of attention's forward. flops: of forward and backward, as counted."""
        if not flops:
            return 0.0
        work, peak = self.shape.work, self.device.flops
        if not self.is_cuda:
            heads = self.shape.config.num_attention_heads
            pairs = flops / work.per_pair * heads
            seconds = flops / peak + pairs * CPU_PAIR_BYTES / self.bandwidth
            return seconds / (1 + BACKWARD_ATTENTION)
        layers = sum(count for _, count in work.windows)
        length = 2 * flops / (work.per_pair * layers * tokens)  # of documents, as the pairs of a token say
        kernel = self.device.attention * self.assumptions.attention * length / (length + HALF_LENGTH)
        return flops / 3 / (peak * kernel)

    def _copies(self, count: int) -> float:
        """Seconds of FSDP's casts and copies in a step."""
        plan = self.collectives
        gathers = plan.forward_gathers + plan.backward_gathers
        ranks = self.cluster.devices
        numbers = self.config, self.parameters, self.trained, self.shards, ranks
        once, later = (copies_bytes(*numbers, often, self.is_cuda) for often in (gathers, 0.0))
        repeated = later if plan.is_gathered_once else once
        return (once + (count - 1) * repeated) / self.bandwidth

    def _communication(self, count: int, forward: float, backward: float) -> float:
        """Seconds of a step's collectives that delay it."""
        plan = self.collectives
        first = self._exposed(plan, forward, backward, gathers=True, last=count == 1)
        if count == 1:
            return first
        again = not plan.is_gathered_once
        middle = self._exposed(plan, forward, backward, gathers=again, last=False)
        return first + (count - 2) * middle + self._exposed(plan, forward, backward, gathers=again, last=True)

    def _exposed(self, plan: Collectives, forward: float, backward: float, gathers: bool, last: bool) -> float:
        """Of one micro-batch. gathers: it gathers the parameters; last: of the step."""
        ahead = plan.gather * plan.forward_gathers if gathers else 0.0
        behind = plan.reduce + (plan.gather * plan.backward_gathers if gathers else 0.0) + plan.all_reduce * last
        if not self.is_cuda:
            return ahead + behind  # gloo runs on the processors that compute
        open_ends = (plan.first_gather if gathers else 0.0) + (plan.last_reduce if last or not plan.all_reduce else 0.0)
        hidden = min(ahead, forward) + min(behind, backward)
        excess = max(0.0, ahead - forward) + max(0.0, behind - backward)
        return max(excess, min(open_ends, ahead + behind)) + self.assumptions.contention * hidden

    def _offload(self, step: StepWork) -> float:
        """Seconds of copies over the link to the host, and of AdamW there."""
        if not self.is_cuda:
            return 0.0
        count, seconds = step.micro_batches, 0.0
        if self.config.sharding.cpu_offload:
            weight, gradient, _ = STATE_BYTES[self.config.optimizer.memory]
            plan = self.collectives
            gathers = (plan.forward_gathers + plan.backward_gathers) * (1 if plan.is_gathered_once else count)
            frozen = (self.parameters - self.trained) / self.shards * self.shape.frozen_itemsize
            copied = gathers * (self.local * weight + frozen) + count * self.local * gradient
            # Of several micro-batches the gradients are added on the host.
            added = self.local * 3 * gradient * (count - 1)
            host = self.local * optimizer_bytes(self.config) + added
            seconds += copied / self.device.host_link + host / self.assumptions.host
        if self.kept_on_host:
            tokens = step.tokens / self.cluster.devices
            size = DTYPES[self.config.model.compute_dtype].itemsize
            kept = 2 * tokens * Widths.of(self.shape.config).hidden * size * self.kept_on_host  # there and back
            seconds += kept / self.device.host_link
        return seconds
