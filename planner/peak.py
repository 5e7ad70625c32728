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
from planner.terms import FP32, Layout, all_shapes, gradient_itemsize, local_elements, model_elements, shard_elements

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

    def parameters(self, unit: Unit) -> int:
        """A gathered unit in the compute dtype, with the rows that fill up the last rank."""
        return shard_elements(unit, self.spread.shards) * self.spread.shards * self.compute

    def gathered(self, *units: Unit, buffer: Unit | None = None) -> int:
        """Gathered units, and the buffer of a unit between its all-gather and its copy-out."""
        held = self.all_gathered if self.spread.keeps_gathered else sum(map(self.parameters, units))
        return held + (self.parameters(buffer) if buffer and self.spread.shards > 1 else 0)

    def gradients(self, unit: Unit) -> int:
        """Whole gradients of a unit as autograd makes them."""
        return unit.num_parameters * self.compute

    def scatter_input(self, unit: Unit) -> int:
        """The input of a unit's reduce-scatter."""
        return shard_elements(unit, self.spread.shards) * self.spread.shards * self.reduce

    def reducing(self, unit: Unit) -> int:
        """Input and output of a unit's reduce-scatter. On a single CPU rank they are one (distributed/sharding.py)."""
        one = self.spread.ranks == 1 and not self.spread.on_cuda
        return self.scatter_input(unit) + (0 if one else shard_elements(unit, self.spread.shards) * self.reduce)

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
        yield self.end_of_backward()
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
        rows, chunks = min(CHUNK_TOKENS, self.targets), -(-self.targets // CHUNK_TOKENS)
        vocabulary, width = self.head_shape()
        settings = head_settings(self.shape.config, self.shape.num_tokens)
        slope = FP32 if settings.softcap is not None else 0
        cast = self.compute if self.compute < FP32 else 0  # what a product in bf16 takes beside its fp32 copy
        product = FP32 + cast
        if settings.scale != 1.0 or settings.softcap is not None:
            product = 2 * FP32 if settings.softcap is None else 3 * FP32
        # Bytes of a logit (while they are made; at log_softmax; when the head is multiplied), and of an element of the head.
        makes, softmax, multiplies = product, 2 * FP32 + slope, FP32 + cast + slope
        previous = FP32 + cast + slope if chunks > 1 else 0  # the chunk before lives until its names are bound again
        head = {0: 0, 1: 0, 2: self.compute}.get(chunks, FP32 + self.compute)
        head_at_end = {0: 0, 1: self.compute}.get(chunks, FP32 + 2 * self.compute)
        logits, weights = rows * vocabulary, vocabulary * width
        return max(
            logits * max(makes + previous, softmax) + weights * head, logits * multiplies + weights * head_at_end
        )

    def head_shape(self) -> tuple[int, ...]:
        """(vocabulary, hidden size), with rows of padding."""
        return max(self.head.shapes, key=lambda shape: shape[0] * len(shape))

    def head_gradient(self) -> int:
        """A tied head's gradient waits in the root for that of the embedding."""
        vocabulary, width = self.head_shape()
        return 0 if self.shape.extra else vocabulary * width * self.compute

    def head_in_backward(self) -> Moment:
        """The reduction of an untied head's gradient, when its parameters are freed."""
        return Moment(
            "head in backward",
            self.gathered(self.shape.root, buffer=self.shape.layers[-1]),
            self.gradients(self.head) + self.reducing(self.head) + self.partial_sums(False),
            self.activations.saved + self.activations.gradient,
        )

    def layers_in_backward(self) -> Iterator[Moment]:
        """Each layer in backward, then the reduction of its gradients, which no longer needs its activations."""
        acts, kept = self.activations, self.activations.saved
        before = self.head if self.shape.extra else None
        for index, layer in reversed(list(enumerate(self.shape.layers))):
            following = self.shape.layers[max(0, index - 1)]
            in_flight = self.scatter_input(before) if before else 0
            weights = min(self.gradients(layer), acts.in_backward[index])
            yield Moment(
                f"{layer.name} in backward",
                self.gathered(self.shape.root, layer, buffer=following),
                in_flight + weights + self.partial_sums(False),
                kept + acts.gradient + acts.in_backward[index] - weights,
                self.head_gradient(),
            )
            kept -= acts.kept[index]
            yield Moment(
                f"gradients of {layer.name}",
                self.gathered(self.shape.root, buffer=following),
                self.gradients(layer) + self.reducing(layer) + self.partial_sums(False),
                kept + acts.gradient,
                self.head_gradient(),
            )
            before = layer

    def end_of_backward(self) -> Moment:
        """The gradient of the embedding, and its reduction. Tied, it is added to that of the head."""
        last = self.shape.extra[0] if self.shape.extra else self.shape.root
        added = self.gradients(last) + self.head_gradient() + self.scatter_input(self.shape.layers[0])
        return Moment(
            "end of backward",
            self.gathered(self.shape.root),
            max(added, self.gradients(last) + self.reducing(last)) + self.partial_sums(True),
            self.activations.rest + self.activations.gradient,
        )

    def update(self) -> Moment:
        """The optimizer's buffers (distributed/optimizer.py); torch's fused AdamW under 16N has none."""
        if self.memory == "16N" or self.spread.offloads:
            return Moment("update")
        largest = max(local_elements(shape, self.spread.shards) for shape in all_shapes(self.shape))
        chunk = min(CHUNK["cuda" if self.spread.on_cuda else "cpu"], largest)
        return Moment("update", reduction=OPTIMIZER_COPIES * FP32 * chunk)
