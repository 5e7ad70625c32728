"""The time of a training step on a machine, as a range: a roofline of products, memory traffic and communication.

    products         matrix products of the layers and the head, at a fraction of the peak that grows with the micro-batch
    attention        FLOPs within documents, at the fraction of the peak that the attention kernel reaches
    memory           norms, activations, RoPE, residuals, softmax of the head, FSDP's casts and copies
    communication    the part of the all-gathers and reductions that computation does not hide
    optimizer        norm of the gradients, and AdamW
    offload          copies to and from the host, and AdamW on the host
    balance          waiting for the slowest rank
    host             the device waiting for Python, which starts the kernels

Evaluations, saves, compilation and reading of data are left out. docs/planning.md states the errors against published runs;
tests/scripts/plan/published.py fits the constants to these runs.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PretrainedConfig

from configs.config import Config
from distributed.optimizer import parameter_dtype
from model.dtypes import DTYPES
from model.flops import attention_heads
from model.loss import CHUNK_TOKENS
from model.memory import ModelShape, all_elements, gradient_itemsize, layout_of, trained_elements
from scripts.plan.machines import Cluster


@dataclass(frozen=True)
class Assumptions:
    """Constants that are the same for all models and all machines of a kind."""

    products: float  # fraction of `Device.sustained` that products of many tokens reach
    attention: float  # fraction of `Device.attention` that the kernel reaches for long documents
    bandwidth: float  # fraction of the memory's bandwidth; kernels move more bytes than the model counts
    link: float  # fraction of a link's bandwidth that collectives reach
    contention: float  # a hidden collective slows the computation that hides it by this fraction of its own time
    host: float  # bytes/s of AdamW on the host, for the shard of one rank


# Kind of device -> slow, middle, fast. On CUDA, attention, bandwidth, link and contention of the middle are fitted; slow and
# fast enclose nine tenths of the fitted rows (tests/scripts/plan/published.py). Fast has the attention kernels of a newer
# generation. The host has the bandwidth of one core (torchrun sets OMP_NUM_THREADS=1), of three cores and of eight. On a CPU,
# slow and fast enclose the speeds measured with AVX2, AVX512-BF16 and AMX; the middle is not meant to be printed.
ASSUMPTIONS = {
    "cuda": (
        Assumptions(0.90, 0.70, 0.42, 0.50, 0.50, 10e9),
        Assumptions(1.00, 0.94, 0.56, 0.82, 0.32, 25e9),
        Assumptions(1.05, 1.75, 0.80, 0.95, 0.10, 60e9),
    ),
    "cpu": (
        Assumptions(0.45, 1.0, 0.30, 0.6, 0.0, 0.0),
        Assumptions(0.85, 1.0, 0.75, 0.8, 0.0, 0.0),
        Assumptions(1.00, 1.0, 1.00, 1.0, 0.0, 0.0),
    ),
}
BLOCK = 128  # tokens; flash attention computes both halves of the blocks on the diagonal
FP32_ON_CUDA = 1 / 16  # speed of fp32 relative to bf16 on an A100 or H100 without TF32; data sheets
BACKWARD_ATTENTION = 2.5  # flash attention recomputes the scores: 5 products in backward, 2 in forward
CPU_PAIR_BYTES = 144  # per pair and head: attention on a CPU writes its scores to memory; measured on an EPYC
# Seconds in which Python starts a layer's forward and backward: about 150 kernels of 5 us, and FSDP's hooks.
HOST_PER_LAYER = 1.5e-3
# Latency of a collective in seconds. NODE_LATENCY counts for each further node of the ring. It is fitted to runs on 128 to 512
# GPUs, so it includes the waiting of ranks. LOCAL_LATENCY is the time that NCCL's tests print for small messages in a node.
NODE_LATENCY, LOCAL_LATENCY = 120e-6, 20e-6
GLOO_REDUCES_AT = 0.5  # gloo adds on the processor: it reduces 0.77 GB/s and gathers 1.47 GB/s
# Bytes per logit that model/loss.py moves: written (2), cast to fp32 (2 + 4), log_softmax (8), exp (8), cast back (4 + 2),
# read by two products (4).
LOGIT_BYTES = 34


@dataclass(frozen=True)
class StepWork:
    """The work of a step, summed over all ranks."""

    step: int = field(compare=False)  # counts from 0; steps with the same work are equal
    tokens: int
    targets: float
    flops: float  # necessary FLOPs (model.flops.step_flops)
    micro_batches: int  # per rank
    balance: float  # fraction of a step during which the average rank computes (data.dealing.balance)


@dataclass(frozen=True)
class Speed:
    """The expected speed of a run, as a range."""

    tokens_per_second: tuple[float, float]  # of one device: slow, fast
    hours: tuple[float, float]  # of the whole run: fast, slow
    parts: dict[str, float]  # seconds of a mean step by part (see the module), in the middle of the range
    middle: float  # tokens per second of one device, in the middle of the range


def expected_speed(
    shape: ModelShape, config: Config, cluster: Cluster, steps: Sequence[StepWork], total_steps: int
) -> Speed:
    """Return the speed of a run of `total_steps` steps from a sample of them."""
    mean_tokens = sum(step.tokens for step in steps) / len(steps) / cluster.devices
    runs = (_Run(shape, config, cluster, assumptions) for assumptions in ASSUMPTIONS[cluster.device.kind])
    slow, middle, fast = (run.mean_parts(steps) for run in runs)
    slow_seconds, fast_seconds = sum(slow.values()), sum(fast.values())
    hours = total_steps / 3600
    return Speed(
        tokens_per_second=(mean_tokens / slow_seconds, mean_tokens / fast_seconds),
        hours=(hours * fast_seconds, hours * slow_seconds),
        parts=middle,
        middle=mean_tokens / sum(middle.values()),
    )


def layer_elements(config: PretrainedConfig, is_compiled: bool) -> float:
    """Return the elements per token that a decoder layer's forward reads and writes outside of its matrix products.

    Eager: two norms in fp32 (16 per hidden element, counted in elements of bf16), two residual additions (3 per hidden
    element), RoPE (10 per element of queries and keys), attention (2 per element of queries and keys), SiLU and gate (5 per
    intermediate element). Compiled: each group reads its inputs and writes its outputs once.
    """
    heads, keys, head_dim = attention_heads(config)
    intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    if experts_per_token := getattr(config, "num_experts_per_tok", None):
        intermediate = experts_per_token * getattr(config, "moe_intermediate_size", intermediate)
        intermediate += getattr(config, "shared_expert_intermediate_size", 0)
    rotated = (heads + keys) * head_dim  # queries and keys; counted again for the values and the result of attention
    if is_compiled:
        return 8 * config.hidden_size + 4 * rotated + 3 * intermediate
    return (2 * 16 + 2 * 3) * config.hidden_size + 12 * rotated + 5 * intermediate


def share_of_tiles(shape: ModelShape) -> float:
    """Return the fraction of the layers' products that backward computes again under `model.mlp_tiles`.

    These are the MLP's products with an intermediate result. torch's checkpoint stops before the MLP's last product, because
    backward does not need its result. Experts compute all of their products again, because the router's gradient needs
    their results.
    """
    if experts := share_of_experts(shape):
        return experts
    size = getattr(shape.config, "intermediate_size", None) or 4 * shape.config.hidden_size
    matrices = [tensor for tensor in shape.layers[0].shapes if len(tensor) == 2]
    again = sum(rows * columns for rows, columns in matrices if rows in (size, 2 * size))
    return again / sum(rows * columns for rows, columns in matrices)


def share_of_experts(shape: ModelShape) -> float:
    """Return the fraction of the layers' products that experts compute. A token counts only at the experts it is sent to."""
    experts_per_token = getattr(shape.config, "num_experts_per_tok", None) or 0
    tensors = [tensor for layer in shape.layers for tensor in layer.shapes]
    experts = sum(experts_per_token * math.prod(tensor[1:]) for tensor in tensors if len(tensor) == 3)
    return experts / (experts + sum(math.prod(tensor) for tensor in tensors if len(tensor) == 2))


def _state_bytes(config: Config) -> tuple[int, int, int]:
    """Return the bytes of a parameter, of its gradient, and of its two moments. They sum to the N of `optimizer.memory`."""
    memory = config.optimizer.memory
    weight, gradient = parameter_dtype(memory).itemsize, gradient_itemsize(memory)
    return weight, gradient, int(memory.removesuffix("N")) - weight - gradient


class _Run:
    """A run under one set of assumptions: slow, middle or fast."""

    def __init__(self, shape: ModelShape, config: Config, cluster: Cluster, assumptions: Assumptions) -> None:
        self.shape, self.config, self.cluster, self.assumptions = shape, config, cluster, assumptions
        self.device, self.is_cuda = cluster.device, cluster.device.kind == "cuda"
        self.bandwidth = self.device.bandwidth * assumptions.bandwidth
        self.itemsize = DTYPES[config.model.compute_dtype].itemsize
        self.reduced = DTYPES[config.sharding.reduce_dtype].itemsize
        layout = layout_of(config, cluster.devices, cluster.per_node, self.device.kind)
        self.shards, self.is_gathered_once = layout.shards, layout.keeps_gathered  # in a step
        # Includes the rows of padding that FSDP adds on the last ranks.
        self.parameters = self.shards * all_elements(shape, self.shards)
        self.local = trained_elements(shape, self.shards)
        self.trained = self.shards * self.local
        mode, layers = config.model.activation_checkpointing, len(shape.layers)
        share = 0.0 if mode == "none" else math.ceil(layers / config.model.checkpoint_every) / layers
        # Fractions that backward computes again.
        self.repeated = share  # elementwise operations
        self.recomputed = 0.0 if mode == "selective" else share  # attention
        self.again = share * share_of_experts(shape) if mode == "selective" else share  # matrix products
        self.tiled = share_of_tiles(shape) if config.model.mlp_tiles > 1 else 0.0  # matrix products, once more
        self.kept_on_host = share * layers if mode == "offload" else 0.0  # number of layers
        self.is_compiled = config.model.compile
        # A micro-batch gathers an untied embedding and head once, and the layers for forward and for backward.
        once = sum(unit.num_parameters for unit in shape.extra) / self.parameters
        self.gathers = 1.0 if self.is_gathered_once else 2 - once
        # Seconds of one gather of all parameters, of one reduction of all gradients among the ranks that share a copy of the
        # model, and of one all-reduce (a reduce-scatter and an all-gather) of each rank's part among the copies.
        slower = 1.0 if self.is_cuda else 1 / GLOO_REDUCES_AT
        self.gather = self._ring(self.parameters * self.itemsize, inner=True)
        self.reduce = self._ring(self.trained * self.reduced, inner=True) * slower
        self.all_reduce = self._ring(self.local * self.reduced, inner=False) * (1 + slower)
        # The first gather and the last reduction of a step, as fractions of all. Nothing hides them. LoRA trains no vocabulary.
        vocabulary, layer = shape.extra[0] if shape.extra else shape.root, shape.layers[0]
        self.first = (vocabulary.num_parameters + layer.num_parameters) / self.parameters
        self.last = (vocabulary.num_trained or layer.num_trained) / self.trained

    def _ring(self, size: float, inner: bool) -> float:
        """Return the seconds in which rings gather or reduce `size` bytes, with one collective for each unit of the model.

        `inner` rings join the ranks that share a copy of the model, the rest join the copies. (n - 1) / n of a tensor
        passes each link (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md), and the slowest link decides:
        NVLink or PCIe within a node, and all network cards of a node together between nodes, because NCCL makes a ring for
        each card.
        """
        cluster, copies = self.cluster, self.cluster.devices // self.shards
        ranks = self.shards if inner else copies
        if ranks == 1:
            return 0.0
        nodes = -(-self.shards // cluster.per_node) if inner else min(copies, cluster.nodes)
        sharing = 1 if inner else min(self.shards, cluster.per_node)  # rings that share a node's network
        bandwidth = self.device.link if nodes == 1 else min(self.device.link, cluster.network / sharing)
        latency = (len(self.shape.layers) + len(self.shape.extra) + 1) * (LOCAL_LATENCY + NODE_LATENCY * (nodes - 1))
        return size * (ranks - 1) / ranks / (bandwidth * self.assumptions.link) + latency

    def _all_to_alls(self, tokens: float) -> float:
        """Return the seconds of the all-to-alls of a micro-batch with `tokens` tokens on each rank of a group (distributed/context.py).

        Forward sends queries, keys, values and the result, backward sends their gradients, and a checkpointed layer sends
        again. Attention waits for all of them. Between nodes, GPUs share the network.
        """
        ranks = self.config.sharding.context
        if ranks == 1:
            return 0.0
        heads, keys, width = attention_heads(self.shape.config)
        size = tokens * width * (2 * heads + 2 * math.lcm(keys, ranks)) * self.itemsize
        between = self.cluster.network / self.cluster.per_node if ranks > self.cluster.per_node else self.device.link
        seconds = size * (ranks - 1) / ranks / (min(between, self.device.link) * self.assumptions.link)
        latency = 4 * (LOCAL_LATENCY + NODE_LATENCY * (-(-ranks // self.cluster.per_node) - 1))
        return len(self.shape.layers) * (2 + self.repeated) * (seconds + latency)

    def mean_parts(self, steps: Sequence[StepWork]) -> dict[str, float]:
        """Return the seconds of each part of a mean step."""
        parts = list(map(functools.cache(self.parts), steps))  # most steps are equal if all examples have one length
        return {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}

    def parts(self, step: StepWork) -> dict[str, float]:
        """Return the seconds of each part of a step."""
        count, work, model = step.micro_batches, self.shape.work, self.shape.config
        rows = self.cluster.devices * count
        tokens, targets = max(step.tokens, 1) / rows, step.targets / rows
        layers, head = work.per_token * tokens, work.per_target * targets
        pairs = self._attention(max(0.0, step.flops / rows - layers - head), tokens)
        rate = self._products_rate(tokens)
        # LoRA scales each output of an adapter (2 elements) and adds it (3).
        elements = layer_elements(model, self.is_compiled) * len(self.shape.layers) + 5 * self.shape.adapter_outputs
        moved = elements * self.itemsize * tokens / self.bandwidth
        # Each chunk of targets writes a part of the head's gradient (2 bytes) and adds it in fp32 (10).
        chunk = 0 if self.shape.frozen_itemsize else 12 * model.hidden_size / CHUNK_TOKENS
        logits = (LOGIT_BYTES + chunk) * self.shape.num_tokens * targets / self.bandwidth
        # The head computes its gradients in forward. The backward of an elementwise operation reads the kept activations and
        # the gradients, and writes gradients: twice the traffic of its forward.
        forward = (layers * work.forward + head) / rate, pairs, moved + logits
        backward = (
            layers * (1 - work.forward * (1 - self.again - self.tiled)) / rate,
            pairs * (BACKWARD_ATTENTION + self.recomputed),
            moved * (2 + self.repeated),
        )
        products, attention, memory = (count * (a + b) for a, b in zip(forward, backward, strict=True))
        memory += self._cast_and_copy_seconds(count)
        compute = products + attention + memory
        communication = self._communication(count, sum(forward), sum(backward))
        # Python runs ahead of computation and communication, so only the time beyond both counts.
        host = count * HOST_PER_LAYER * len(self.shape.layers) if self.is_cuda else 0.0
        updates_on_host = self.config.sharding.cpu_offload and self.is_cuda
        return {
            "products": products,
            "attention": attention,
            "memory": memory,
            "communication": communication + count * self._all_to_alls(tokens),
            "optimizer": 0.0 if updates_on_host else self.local * self._optimizer_bytes() / self.bandwidth,
            "offload": self._offload(step) if self.is_cuda else 0.0,
            "balance": compute * (1 / step.balance - 1),
            "host": max(0.0, host - compute - communication),
        }

    def _products_rate(self, tokens: float) -> float:
        """Return the FLOP/s of matrix products in a micro-batch of `tokens` tokens."""
        peak = self.device.flops * self.device.sustained
        if self.is_cuda and self.config.model.compute_dtype == "fp32":
            peak *= FP32_ON_CUDA
        rate = peak * self.assumptions.products
        return rate * tokens / (tokens + rate / self.bandwidth)  # products also read their weights

    def _attention(self, flops: float, tokens: float) -> float:
        """Return the seconds of attention's forward in a micro-batch. `flops` include its backward."""
        work, peak = self.shape.work, self.device.flops
        if not flops:
            return 0.0
        if not self.is_cuda:
            pairs = flops / work.per_pair * self.shape.config.num_attention_heads
            return (flops / peak + pairs * CPU_PAIR_BYTES / self.bandwidth) / (1 + BACKWARD_ATTENTION)
        layers = sum(count for _, count in work.windows)
        length = 2 * flops / (work.per_pair * layers * tokens)  # mean length of documents, from the pairs per token
        kernel = min(self.device.attention * self.assumptions.attention, self.device.sustained)
        return flops / 3 * (1 + BLOCK / length) / (peak * kernel)

    def _cast_and_copy_seconds(self, count: int) -> float:
        """Return the seconds of FSDP's casts and copies in a step of `count` micro-batches.

        A gather casts this rank's shard to the compute dtype and copies the gathered tensors out of a buffer. A gradient is
        copied into the buffer of its reduction and added to the shard's gradient. A single CPU rank reduces in place. Frozen
        parameters have the compute dtype already.
        """
        size, (weight, _, _) = self.itemsize, _state_bytes(self.config)
        copied_out = 2 * size if self.shards > 1 else 0
        gather = self.parameters * (2 * size / self.shards + copied_out) + self.trained * (weight - size) / self.shards
        in_buffer = size + self.reduced if self.cluster.devices > 1 or self.is_cuda else 0
        gradient = self.trained * (in_buffer + 3 * self.reduced / self.shards)
        return (self._gathers_of_step(count) * gather + count * gradient) / self.bandwidth

    def _gathers_of_step(self, count: int) -> float:
        """Return how many times a step of `count` micro-batches gathers the whole model."""
        return self.gathers * (1 if self.is_gathered_once else count)

    def _communication(self, count: int, forward: float, backward: float) -> float:
        """Return the seconds by which collectives delay a step of `count` micro-batches.

        `forward` and `backward` are the seconds of computation in one micro-batch.
        """
        again = not self.is_gathered_once
        if count == 1:
            return self._exposed(forward, backward, gathers=True, last=True)
        first = self._exposed(forward, backward, gathers=True, last=False)
        middle = self._exposed(forward, backward, gathers=again, last=False)
        return first + (count - 2) * middle + self._exposed(forward, backward, gathers=again, last=True)

    def _exposed(self, forward: float, backward: float, gathers: bool, last: bool) -> float:
        """Return the seconds by which collectives delay one micro-batch.

        With `gathers` it gathers the parameters. The `last` one of a step also all-reduces among the copies of the model.
        """
        ahead = self.gather if gathers else 0.0
        behind = self.reduce + ahead * (self.gathers - 1) + self.all_reduce * last
        if not self.is_cuda:
            return ahead + behind  # gloo runs on the processors that compute
        reduced = self.reduce + self.all_reduce if last or not self.all_reduce else 0.0
        open_ends = ahead * self.first + reduced * self.last
        hidden = min(ahead, forward) + min(behind, backward)
        excess = max(0.0, ahead - forward) + max(0.0, behind - backward)
        return max(excess, min(open_ends, ahead + behind)) + self.assumptions.contention * hidden

    def _optimizer_bytes(self) -> float:
        """Return the bytes that an update moves per local parameter.

        The norm reads the gradients; AdamW reads them again, and reads and writes weights and moments. A tensor that is not
        fp32 is converted in a buffer, whose 4 bytes are written and read before and after the update.
        """
        weight, gradient, moments = _state_bytes(self.config)
        converted = (weight < 4) * 2 + (gradient < 4) + 2 * (moments < 8) * 2
        ewc = self.config.ewc
        penalty = 2 * DTYPES[ewc.dtype].itemsize + weight + 2 * gradient if ewc.strength else 0
        return 2 * weight + 2 * gradient + 2 * moments + 8 * converted + penalty

    def _offload(self, step: StepWork) -> float:
        """Return the seconds of copies over the link to the host, and of AdamW on the host."""
        count, seconds, shape = step.micro_batches, 0.0, self.shape
        if self.config.sharding.cpu_offload:
            weight, gradient, _ = _state_bytes(self.config)
            frozen = (self.parameters - self.trained) / self.shards * shape.frozen_itemsize
            copied = self._gathers_of_step(count) * (self.local * weight + frozen) + count * self.local * gradient
            added = self.local * 3 * gradient * (count - 1)  # the host adds the gradients of several micro-batches
            host = self.local * self._optimizer_bytes() + added
            seconds += copied / self.device.host_link + host / self.assumptions.host
        if self.kept_on_host:
            size = step.tokens / self.cluster.devices * shape.config.hidden_size * self.itemsize
            seconds += 2 * size * self.kept_on_host / self.device.host_link  # there and back
        return seconds
