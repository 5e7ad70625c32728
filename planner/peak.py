"""What comes and goes within a step: gathered parameters, reductions, activations and logits, moment by moment.

The terms have their maxima at different moments, and their sum at none of them. FSDP2's part is read from its source
(torch 2.13, torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py and _fsdp_collectives.py):

- A unit is gathered into one flat buffer, then copied out into its parameters. In backward the buffer of the next unit is
  gathered while a unit runs (prefetch). In forward the buffer of a unit lives until the next unit has been copied out.
  A unit that is not sharded has no buffer, only a copy in the compute dtype.
- Gradients of a unit are copied into a flat input of the reduce-scatter in `sharding.reduce_dtype`, which lives until the
  next unit has its gradients (reduce_scatter_max_input_buffers is 1).
- Where gradients are also all-reduced (hybrid, none), what was reduced of earlier micro-batches is kept in the reduce dtype
  until the last one, and the inputs of the all-reduces until backward has ended.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from common.dtypes import DTYPES
from configs.config import Config
from distributed.optimizer import CHUNK, parameter_dtype
from model.activations import Activations
from model.architectures import head_settings
from model.loss import CHUNK_TOKENS
from planner.shape import ModelShape, Unit
from planner.terms import (
    FP32,
    Layout,
    gradient_bytes,
    gradient_itemsize,
    local_elements,
    model_elements,
    shard_elements,
    trained_elements,
    trained_shapes,
)

# fp32 tensors of a chunk of weights in LowMemoryAdamW.step: weights, gradients, two moments, and those of the rounding.
OPTIMIZER_COPIES = 7


@dataclass(frozen=True)
class Moment:
    """Bytes on a rank's device at one moment of a step, beside what it holds during the whole run."""

    name: str
    gathered: int = 0
    reduction: int = 0
    activations: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.gathered + self.reduction + self.activations + self.logits


class Step:
    """The moments of a step that can be its peak. `targets`: of the micro-batch."""

    def __init__(
        self, shape: ModelShape, config: Config, spread: Layout, activations: Activations, targets: int
    ) -> None:
        self.shape, self.spread, self.activations, self.targets = shape, spread, activations, targets
        self.memory = config.optimizer.memory
        self.compute = DTYPES[config.model.compute_dtype].itemsize
        # A single rank reduces in the dtype of the weights (distributed/sharding.py: shard).
        alone = parameter_dtype(self.memory).itemsize
        self.reduce = alone if spread.ranks == 1 else DTYPES[config.sharding.reduce_dtype].itemsize
        self.head = shape.extra[1] if shape.extra else shape.root
        self.all_gathered = sum(self.parameters(unit) for unit in shape.units)
        always = self.memory == "14N" or spread.offloads  # the device has the same gradients in every micro-batch
        self.later_gradients = 0 if always else gradient_bytes(shape, self.memory, spread.shards)

    def parameters(self, unit: Unit) -> int:
        """A gathered unit in the compute dtype, with the rows that fill up the last rank."""
        return shard_elements(unit, self.spread.shards) * self.spread.shards * self.compute

    def gathered(self, *units: Unit, buffer: Unit | None = None) -> int:
        """Gathered units, and the buffer of a unit between its all-gather and its copy-out.

        Where parameters stay gathered, only the first forward of a step gathers, before there are gradients: the buffer
        then counts for as much as it exceeds them.
        """
        size = self.parameters(buffer) if buffer and self.spread.shards > 1 else 0
        if self.spread.keeps_gathered:
            return self.all_gathered + max(0, size - self.later_gradients)
        return sum(map(self.parameters, units)) + size

    def gradients(self, unit: Unit) -> int:
        """Whole gradients of a unit as autograd makes them."""
        return unit.num_trained * self.compute

    def scatter_input(self, unit: Unit) -> int:
        """The input of a unit's reduce-scatter."""
        return trained_elements(unit, self.spread.shards) * self.spread.shards * self.reduce

    def clone(self, unit: Unit | None) -> int:
        """gloo reduces a copy of the input, which a thread of its own frees at some later time."""
        return self.scatter_input(unit) if unit and self.spread.shards > 1 and not self.spread.on_cuda else 0

    def in_flight(self, unit: Unit | None) -> int:
        """What remains of a unit's reduction while the next unit is in backward."""
        return self.scatter_input(unit) + self.clone(unit) if unit else 0

    def reducing(self, unit: Unit, before: Unit | None) -> int:
        """Most that the reduction of a unit's gradients takes: whole gradients with the input, then input and output.

        `before` was reduced before. On a single CPU rank input and output are one (distributed/sharding.py).
        """
        elements = trained_elements(unit, self.spread.shards)
        one = self.spread.ranks == 1 and not self.spread.on_cuda
        own = parameter_dtype(self.memory).itemsize
        output = 0 if one else elements * (self.reduce + (own if own != self.reduce else 0))
        scatter = self.scatter_input(unit)
        return max(self.gradients(unit) + scatter, scatter + self.clone(unit) + output) + self.clone(before)

    def partial_sums(self, at_the_end: bool) -> int:
        """hybrid, none: what the micro-batches before the last one have reduced, or the inputs of the all-reduces."""
        if not self.spread.replicates:
            return 0
        kept = gradient_itemsize(self.memory)
        same = parameter_dtype(self.memory).itemsize == self.reduce  # then the gradient itself is what was reduced
        if self.memory == "14N":
            size = self.reduce  # its gradients are allocated all the time
        else:
            size = (0 if same else self.reduce) if at_the_end else max(0, self.reduce - kept)
        return model_elements(self.shape, self.spread.shards) * size

    def moments(self) -> Iterator[Moment]:
        """All of them."""
        yield self.head_in_forward()
        yield from self.layers_in_backward()
        if self.shape.extra:
            yield self.head_in_backward()
        yield from self.end_of_backward()
        yield self.update()

    def head_in_forward(self) -> Moment:
        """The loss, which computes its gradients at once (model/loss.py). The last buffer of forward is still there."""
        buffer = self.head if self.shape.extra else self.shape.layers[-1]
        units = (self.shape.root, self.head) if self.shape.extra else (self.shape.root,)
        hidden = 2 * self.targets * self.shape.config.hidden_size * self.compute  # of the targets, and its gradient
        return Moment(
            "head in forward",
            self.gathered(*units, buffer=buffer),
            self.partial_sums(False),
            self.activations.saved,
            self.chunk() + hidden,
        )

    def chunk(self) -> int:
        """Most that the chunks of model/loss.py take: copies of their logits, and the gradient of the head."""
        vocabulary, width = self.head_shape()
        settings = head_settings(self.shape.config, self.shape.num_tokens)
        slope = FP32 if settings.softcap is not None else 0
        cast = self.compute if self.compute < FP32 else 0  # what a product in bf16 takes beside its fp32 copy
        copies = 3 if settings.softcap is not None else 2 if settings.scale != 1.0 else 1
        makes = max(FP32 + cast, copies * FP32)
        peak = 0
        whole, rest = divmod(self.targets, CHUNK_TOKENS)
        for number, rows in enumerate([CHUNK_TOKENS] * min(whole, 3) + [rest] * (rest > 0)):
            logits, weights = rows * vocabulary, vocabulary * width if self.head.trained else 0
            # The gradient of the head: that of the first chunk, then its sum in fp32; at the end of a chunk its part as well,
            # and in the second chunk the first one until it is in the sum.
            head = (0, self.compute)[number] if number < 2 else FP32
            head_at_end = (self.compute, FP32 + 2 * self.compute)[number] if number < 2 else FP32 + self.compute
            peak = max(
                peak,
                logits * makes + weights * head,
                logits * (2 * FP32 + slope) + weights * head,  # log_softmax
                logits * (FP32 + cast + slope) + weights * head,  # the gradient of the scores in both dtypes
                logits * (cast or FP32) + weights * head_at_end,
            )
        return peak

    def head_shape(self) -> tuple[int, ...]:
        """(vocabulary, hidden size), with rows of padding."""
        return max(self.head.shapes, key=lambda shape: shape[0] * len(shape))

    def head_gradient(self) -> int:
        """A tied head's gradient waits in the root for that of the embedding."""
        vocabulary, width = self.head_shape()
        return 0 if self.shape.extra or not self.head.trained else vocabulary * width * self.compute

    def head_in_backward(self) -> Moment:
        """The reduction of an untied head's gradient, when its parameters are freed."""
        return Moment(
            "head in backward",
            self.gathered(self.shape.root, buffer=self.shape.layers[-1]),
            self.reducing(self.head, None) + self.partial_sums(False),
            self.activations.saved + self.activations.gradient,
        )

    def layers_in_backward(self) -> Iterator[Moment]:
        """Each layer in backward, then the reduction of its gradients, which no longer needs its activations."""
        acts, kept = self.activations, self.activations.saved - self.activations.final
        before = self.head if self.shape.extra else None
        for index, layer in reversed(list(enumerate(self.shape.layers))):
            following = self.shape.layers[max(0, index - 1)]
            weights = min(self.gradients(layer), acts.in_backward[index])
            yield Moment(
                f"{layer.name} in backward",
                self.gathered(self.shape.root, layer, buffer=following),
                self.in_flight(before) + weights + self.partial_sums(False),
                kept + acts.gradient + acts.in_backward[index] - weights,
                self.head_gradient(),
            )
            kept -= acts.kept[index]
            yield Moment(
                f"gradients of {layer.name}",
                self.gathered(self.shape.root, buffer=following),
                self.reducing(layer, before) + self.partial_sums(False),
                kept + acts.gradient,
                self.head_gradient(),
            )
            before = layer

    def end_of_backward(self) -> Iterator[Moment]:
        """The gradient of the embedding, and its reduction, in the last micro-batch and in those before it.

        Tied, it is added to that of the head. Only the last micro-batch frees parameters that stay gathered till then.
        """
        last, before = self.shape.extra[0] if self.shape.extra else self.shape.root, self.shape.layers[0]
        added = self.gradients(last) + self.head_gradient() + self.in_flight(before)
        reduction = max(added, self.reducing(last, before))
        remaining = self.parameters(self.shape.root) + (self.parameters(last) if self.spread.keeps_gathered else 0)
        for is_last in (False, True):
            yield Moment(
                "end of backward",
                remaining if is_last else self.gathered(self.shape.root),
                reduction + self.partial_sums(is_last),
                self.activations.rest + self.activations.gradient,
            )

    def update(self) -> Moment:
        """The optimizer's buffers (distributed/optimizer.py); torch's fused AdamW under 16N has none."""
        if self.memory == "16N" or self.spread.offloads:
            return Moment("update")
        largest = max(local_elements(shape, self.spread.shards) for shape in trained_shapes(self.shape))
        chunk = min(CHUNK["cuda" if self.spread.on_cuda else "cpu"], largest)
        return Moment("update", reduction=OPTIMIZER_COPIES * FP32 * chunk)
