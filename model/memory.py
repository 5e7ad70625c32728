"""The memory of a training step on the fullest rank, by arithmetic over the model's shapes and its layers without data.

    what a rank holds during the whole run   shards of weights, gradients, moments, EWC: exact, from the shapes
    activations of a micro-batch             a few of the model's own layers run without data, each kind of layer once
    what comes and goes within a step        the moments at which the peak can be; the fullest one counts

FSDP2 cuts a parameter like torch.chunk, so no rank holds more than rank 0 (distributed/sharding.py: local_shape).
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import bisect
import copy
import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from configs.config import Config, LoRA, Model
from distributed.activation_checkpointing import checkpoint_activations, tile_mlps
from distributed.low_memory import new_moments
from distributed.optimizer import parameter_dtype
from distributed.sharding import decoder_layers, local_shape, sharded_dimension
from model.architectures import head_settings
from model.dtypes import DTYPES
from model.flops import Work, count_work
from model.language_model import PackedLanguageModel, build_on_meta
from model.lora import add_adapters
from model.loss import HEAD_ROWS, LOSS_TOKENS, targets_per_chunk
from model.packed_attention import DocumentLengths
from model.product_attention import KEEP_PROBABILITIES

FP32, MIB = 4, 2**20  # bytes
# With lazy loading of kernels (CUDA >= 11.7) about 300 MB, on a GPU that a PyTorch maintainer looked at (pytorch#107667);
# more kernels are loaded as they are used. Uncertain by a factor of 1.5.
CUDA_CONTEXT = 400 * MIB
# 544 MB for 2 and 688 MB for more A100s with NVLink (nccl#964). It depends on the number of channels: uncertain by a factor
# of 2, and more with NVLink SHARP.
NCCL_COMMUNICATOR = 688 * MIB
# Python, torch and transformers before any tensor, on a CPU.
CPU_PROCESS = 380 * MIB
# Of what comes and goes in a step. The caching allocator rounds blocks up (to 2 MiB above 1 MiB), does not join blocks of
# different segments, and keeps those of FSDP's streams apart.
# https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf
FRAGMENTATION = 0.1
USABLE = {"cuda": 0.85, "cpu": 0.7}  # of the free memory, by `auto`: the rest is for fragments and what is not counted
COUNTED_ROWS = 8  # of a full micro-batch, on CUDA; more are extrapolated, because each count takes time


# ---- The model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Unit:
    """Parameters that FSDP gathers together. shapes: of each parameter; trained: of those that are not frozen.

    Equal layers are one object (`_one_unit`), so that caches compare units by identity, which is quick.
    """

    shapes: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def num_parameters(self) -> int:
        """Number of elements."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @functools.cached_property
    def num_trained(self) -> int:
        """Number of elements that have gradients and moments."""
        return sum(torch.Size(shape).numel() for shape in self.trained)


@dataclass(frozen=True, eq=False)  # compared by identity, so that it can be the key of a cache
class ModelShape:
    """What memory and time depend on. Tied parameters count once."""

    config: PretrainedConfig
    layers: tuple[Unit, ...]  # decoder layers, in order
    extra: tuple[Unit, ...]  # (embedding, head) if they are not tied, else ()
    root: Unit  # the rest: the final norm, and a tied embedding
    num_tokens: int  # rows of the head that are tokens
    work: Work
    frozen_itemsize: int  # bytes of an element of a frozen weight; 0 if all are trained

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units, the root last."""
        return *self.layers, *self.extra, self.root

    @property
    def trained(self) -> Iterable[tuple[int, ...]]:
        """The shapes of all trained parameters."""
        return (shape for unit in self.units for shape in unit.trained)

    @functools.cached_property
    def num_parameters(self) -> int:
        """Number of parameters of the whole model."""
        return sum(unit.num_parameters for unit in self.units)

    @functools.cached_property
    def num_trained(self) -> int:
        """Number of parameters that have gradients and moments: all, or those of LoRA's adapters."""
        return sum(unit.num_trained for unit in self.units)

    @functools.cached_property
    def adapter_outputs(self) -> int:
        """Elements per token that LoRA's adapters add to the outputs of matrices, in all layers."""
        if not self.frozen_itemsize:
            return 0
        return sum(rows for unit in self.layers for rows, _ in unit.trained[1::2])  # B; A comes before it

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the base model's files and of the export; bf16 if config.json names none."""
        return getattr(self.config, "dtype", None) or torch.bfloat16


def shape_of(model: PackedLanguageModel, config: PretrainedConfig, layer_class: str | None = None) -> ModelShape:
    """The shape of a model that is not sharded yet; it may be on `meta`."""
    layers, extra = decoder_layers(model, layer_class), model.extra_fsdp_units()
    used = {id(parameter) for module in [*layers, *extra] for parameter in module.parameters()}
    frozen = [parameter.dtype.itemsize for parameter in model.parameters() if not parameter.requires_grad]
    return ModelShape(
        config,
        tuple(_unit(module.parameters()) for module in layers),
        tuple(_unit(module.parameters()) for module in extra),
        _unit(parameter for parameter in model.parameters() if id(parameter) not in used),
        model.num_tokens,
        count_work(model, config),
        max(frozen, default=0),
    )


def _unit(parameters: Iterable[nn.Parameter]) -> Unit:
    shapes = [(tuple(parameter.shape), parameter.requires_grad) for parameter in parameters]
    return _one_unit(tuple(shape for shape, _ in shapes), tuple(shape for shape, is_trained in shapes if is_trained))


_one_unit = functools.cache(Unit)


# ---- What a rank holds during the whole run ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a run is spread: what distributed/sharding.py makes of the settings."""

    kind: str  # cuda | cpu
    ranks: int
    shards: int  # ranks that share one copy of the model
    keeps_gathered: bool  # parameters stay gathered from the first forward of a step to its last backward
    offloads: bool  # parameters, gradients and moments are in host memory, and forward and backward are not
    context: int = 1  # ranks that share the tokens of a micro-batch

    @property
    def on_cuda(self) -> bool:
        """Whether the ranks are GPUs."""
        return self.kind == "cuda"

    @property
    def replicates(self) -> bool:
        """Whether the mesh has a second dimension, over which gradients are all-reduced."""
        return self.shards != self.ranks


def layout_of(config: Config, ranks: int, per_node: int, kind: str) -> Layout:
    """The layout of a run on so many ranks (distributed/sharding.py: make_mesh, gathering_strategy). kind: cuda | cpu."""
    sharding = config.sharding
    shards = {"hybrid": sharding.shard_size or per_node, "none": 1}.get(sharding.strategy, ranks)
    keeps = sharding.strategy in ("grad_op", "none") or (ranks == 1 and kind == "cpu" and sharding.strategy == "full")
    return Layout(kind, ranks, shards, keeps, sharding.cpu_offload and kind == "cuda", sharding.context)


@functools.lru_cache(maxsize=1024)
def _elements(shapes: tuple[tuple[int, ...], ...], shards: int) -> int:
    return sum(local_shape(shape, shards).numel() for shape in shapes)


@functools.lru_cache(maxsize=256)
def trained_elements(shape: ModelShape, shards: int) -> int:
    """Elements on rank 0 that have gradients and moments."""
    return sum(_elements(unit.trained, shards) for unit in shape.units)


@functools.lru_cache(maxsize=256)
def all_elements(shape: ModelShape, shards: int) -> int:
    """Elements on rank 0."""
    return sum(_elements(unit.shapes, shards) for unit in shape.units)


def parameter_bytes(shape: ModelShape, memory: str, shards: int) -> int:
    """Sharded weights: trained ones in fp32 under 16N, else bf16; those beside LoRA's adapters in the compute dtype."""
    trained, every = trained_elements(shape, shards), all_elements(shape, shards)
    return trained * parameter_dtype(memory).itemsize + (every - trained) * shape.frozen_itemsize


def gradient_itemsize(memory: str) -> int:
    """Bytes of an element of a sharded gradient, which is there from the first backward to the end of the step."""
    return FP32 if memory in ("16N", "14N") else 2


@functools.lru_cache(maxsize=256)
def moment_bytes(shape: ModelShape, memory: str, shards: int) -> int:
    """Both moments of all parameters on rank 0, as distributed/low_memory.py makes them (16N: the same fp32 as 12N)."""
    local = [torch.empty(local_shape(one, shards), device="meta") for one in shape.trained]
    return sum(moment.nbytes for one in local for moment in new_moments(nn.Parameter(one), memory).values())


def optimizer_bytes(shape: ModelShape, memory: str, shards: int) -> int:
    """The moments, with AdamW's step counters: one for each parameter under 16N, else one."""
    return moment_bytes(shape, memory, shards) + FP32 * (len(list(shape.trained)) if memory == "16N" else 1)


def ewc_bytes(shape: ModelShape, config: Config, shards: int) -> int:
    """The Fisher diagonal and the reference on rank 0 (model/ewc.py); 0 without EWC.

    The reference is stored in `ewc.dtype` if that is exact. For bf16 this is taken to depend on the dtype in which the base
    model is stored; a file whose fp32 tensors hold bf16 numbers takes less.
    """
    if not config.ewc.strength:
        return 0
    itemsize = DTYPES[config.ewc.dtype].itemsize
    is_exact = torch.bfloat16 in (parameter_dtype(config.optimizer.memory), shape.stored_dtype)
    return trained_elements(shape, shards) * (itemsize + (itemsize if is_exact else FP32))


# ---- Activations ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch, without the head.

    kept: by each layer from its forward to its backward. in_backward: most that the backward of each layer takes beside
    what was kept before: the gradients of its input, output and weights, and what is recomputed. rest: embedding and RoPE.
    final: the final norm, until its backward. on_host: kept in host memory (checkpointing `offload` on CUDA). gradient: of a
    layer's output.
    """

    kept: tuple[int, ...]
    in_backward: tuple[int, ...]
    rest: int
    final: int
    on_host: int
    gradient: int

    @property
    def saved(self) -> int:
        """Bytes on the device at the end of forward."""
        return sum(self.kept) + self.rest + self.final

    def times(self, factor: float) -> "Activations":
        """Those of `factor` as many documents of the same lengths; `in_backward` is then an upper bound if factor > 1."""
        kept, in_backward, *rest = vars(self).values()
        kept, in_backward = (tuple(round(factor * size) for size in sizes) for sizes in (kept, in_backward))
        return Activations(kept, in_backward, *(round(factor * size) for size in rest))


@functools.lru_cache(maxsize=256)  # a table of settings asks for the same micro-batch at many strategies
def count_activations(
    shape: ModelShape, settings: Model, lora: LoRA, kind: str, lengths: tuple[int, ...], context: int = 1
) -> Activations:
    """Count the activations of a micro-batch with documents of `lengths` tokens, in eager mode, at any model size.

    context: of one of so many ranks that share it. kind: `cuda` in bf16 counts torch's varlen kernel, everything else the
    kernels of a CPU (model/packed_attention.py).

    The model's own layers run forward and backward on tensors without data, under the run's activation checkpointing. Each
    kind of layer (sliding window, no RoPE, checkpointed or not) runs once and counts for all of its kind. Every storage
    counts once; parameters do not count, their gradients do (`in_backward`).
    """
    dtype, mode = DTYPES[settings.compute_dtype], settings.activation_checkpointing
    is_checkpointed = [
        mode != "none" and i % settings.checkpoint_every == 0 for i in range(shape.config.num_hidden_layers)
    ]
    if mode == "offload":  # as `full`; on CUDA an input that is kept on the host comes back for the recomputation
        settings = replace(settings, activation_checkpointing="full")
        full = count_activations(shape, settings, lora, kind, lengths, context)
        moved = [full.gradient * (kind == "cuda" and one) for one in is_checkpointed]
        kept, in_backward = map(operator.sub, full.kept, moved), map(operator.add, full.in_backward, moved)
        return replace(full, kept=tuple(kept), in_backward=tuple(in_backward), on_host=sum(moved))
    kinds = list(zip(*_of_layers(shape.config).values(), is_checkpointed, strict=True))
    distinct = list(dict.fromkeys(kinds))
    # What all layers share (RoPE) is made or first kept by the first layer of a kind, and the last layer has no successor.
    chosen = [kinds.index(kind) for kind in distinct + distinct + distinct[:1]]
    model = build_on_meta(_with_layers(shape.config, chosen))
    if lora.rank:
        add_adapters(model.causal_lm, lora, settings.path)
    model.to(dtype)
    layers = decoder_layers(model, settings.layer_class)
    if settings.mlp_tiles > 1:
        tile_mlps(layers, settings.mlp_tiles)
    checkpointed = [layer for layer, index in zip(layers, chosen, strict=True) if kinds[index][-1]]
    checkpoint_activations(checkpointed, mode)
    # The kernels of a CPU need tensors that say they are on it; all others run on `meta` in a third of the time.
    on_meta = kind == "cuda" and dtype == torch.bfloat16
    with nullcontext() if on_meta else FakeTensorMode(allow_non_fake_inputs=True):
        for module in () if on_meta else model.modules():  # each once: one that two share cannot be moved twice
            module.to_empty(device="cpu", recurse=False)
        live = _run_layers(model, layers, lengths, kind, context)
    kept, in_backward = {}, {}
    for index, one in enumerate(distinct, len(distinct)):
        kept[one] = live.before[index + 1] - live.before[index]
        in_backward[one] = live.peaks[index] - live.at_backward[index]
    of_layers = sum(kept[kinds[index]] for index in chosen)
    inputs = shape.config.hidden_size * dtype.itemsize * -(-sum(lengths) // context)
    rest = live.at_backward[len(chosen) - 1] - of_layers - inputs  # with the gradient of the final norm's weight
    return Activations(
        kept=tuple(kept[one] for one in kinds),
        in_backward=tuple(in_backward[one] for one in kinds),
        rest=rest,
        final=live.saved - of_layers - rest,
        on_host=0,
        gradient=inputs,
    )


def _of_layers(config: PretrainedConfig) -> dict[str, list]:
    """What the config says of each layer: its lists by name, and `is_dense`, true of a layer without experts in a Qwen model
    with experts. Layers with the same values are of one kind.
    """
    count = config.num_hidden_layers
    lists = {
        name: list(value)
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == count
    }
    every, listed = getattr(config, "decoder_sparse_step", None) or 1, getattr(config, "mlp_only_layers", None) or ()
    return lists | {"is_dense": [index in listed or (index + 1) % every > 0 for index in range(count)]}


def _with_layers(config: PretrainedConfig, chosen: Sequence[int]) -> PretrainedConfig:
    """The configuration of a model with these layers of `config` only."""
    short = copy.deepcopy(config)
    for name, values in _of_layers(config).items():
        values = [values[index] for index in chosen]
        if name != "is_dense":
            setattr(short, name, values)
        elif any(values):
            short.decoder_sparse_step, short.mlp_only_layers = 1, [i for i, is_dense in enumerate(values) if is_dense]
    short.num_hidden_layers = len(chosen)
    return short


def _run_layers(
    model: PackedLanguageModel, layers: Sequence[nn.Module], lengths: tuple[int, ...], kernels: str, context: int
) -> "_LiveBytes":
    """Forward and backward of everything but the head over documents of `lengths` tokens, by the kernels of cuda or cpu.

    context: on one of so many ranks that share the tokens.
    """
    tokens, group = -(-sum(lengths) // context), None
    if context > 1:
        from distributed.context import pretended_context

        group = pretended_context(context)
        lengths = (*lengths, *[context * tokens - sum(lengths)] * (sum(lengths) % context > 0))
    live, order = _LiveBytes([*model.parameters(), *model.buffers()]), {layer: i for i, layer in enumerate(layers)}

    def before(layer: nn.Module, *_: object) -> None:
        live.before.append(live.now)

    def after(layer: nn.Module, _: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        hidden.register_hook(lambda _: start_backward(order[layer]))

    def start_backward(index: int) -> None:
        if live.at_backward:
            live.peaks[min(live.at_backward)] = live.peak
        live.at_backward[index] = live.peak = live.now

    for layer in layers:
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)
    device = next(model.parameters()).device
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    with live:
        hidden = model.causal_lm.base_model(
            input_ids=torch.zeros(1, tokens, dtype=torch.int64, device=device),
            position_ids=torch.arange(tokens, device=device)[None],  # of one document: only their number matters
            use_cache=False,
            documents=DocumentLengths(lengths, ends, kernels, group),
        ).last_hidden_state
        loss = hidden.sum()  # keeps no tensor
        del hidden
        live.saved = live.now
        loss.backward()
    live.peaks[0] = live.peak
    return live


class _LiveBytes(TorchDispatchMode):
    """Sums the bytes of all storages that operations make while it is entered, for as long as something refers to them.

    Storages of `others` do not count.
    """

    def __init__(self, others: Sequence[torch.Tensor]) -> None:
        super().__init__()
        # saved: at the end of forward, when the last layer's output has been used
        self.now = self.peak = self.saved = 0
        self.before: list[int] = []  # when the forward of each layer starts
        self.at_backward: dict[int, int] = {}  # when the backward of a layer starts
        self.peaks: dict[int, int] = {}  # the most during the backward of a layer
        self._others = {tensor.untyped_storage()._cdata for tensor in others}
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = kwargs or {}
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # Products of experts: fake tensors have those of bf16 alone, and results of every dtype have the same shape.
            result = func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs).to(args[0].dtype)
        else:
            result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._others:
            return

        def free(_: weakref.ref) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, free)  # torch keeps the Python object as long as the storage lives
        self.now += size
        self.peak = max(self.peak, self.now)


# ---- The peak of a step --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepMemory:
    """Bytes on the device of the fullest rank at the peak of a step."""

    parameters: int  # this rank's shards
    gradients: int
    optimizer: int  # moments and their scales
    ewc: int  # Fisher diagonal and reference, where ewc.device=device
    gathered: int  # whole parameters in the compute dtype
    reduction: int  # gradients of a unit before and while they are reduced
    activations: int  # of the worst micro-batch, with what one recomputed layer needs
    logits: int  # chunk of the head, gradient of hidden states and head
    other: int  # CUDA context, NCCL buffers; on a CPU the process itself
    headroom: int  # for fragmentation

    @property
    def total(self) -> int:
        """Sum of all terms."""
        return sum(vars(self).values())

    @property
    def tensors(self) -> int:
        """Sum of all terms that are tensors: what torch.cuda.max_memory_allocated reports."""
        return self.total - self.other - self.headroom


def step_memory(
    shape: ModelShape, config: Config, layout: Layout, lengths: tuple[int, ...], targets: int, times: float = 1
) -> StepMemory:
    """Peak memory of a step whose worst micro-batch has documents of `lengths` tokens, `targets` of them targets.

    times: it has so many times these documents. The peak is that of a micro-batch other than the first: the gradients of
    those before it are there. Layers are counted as eager code; torch.compile keeps less. `other` and `headroom` are
    estimates, everything else is tensors.
    """
    memory, shards = config.optimizer.memory, layout.shards
    counts = count_activations(shape, config.model, config.lora, layout.kind, lengths, layout.context).times(times)
    targets = min(targets, -(-sum(lengths) // layout.context))  # one of the ranks may have all of them
    moments = _moments(shape, config, layout, counts, round(times * targets))
    gathered, reduction, kept, logits = max(moments, key=sum)
    on_device = 0 if layout.offloads else 1
    ewc_on_device = config.ewc.device == "device" and not layout.offloads or not layout.on_cuda
    # A mesh of one dimension uses the default group; of two, it adds a group for each one that has several ranks.
    groups = 0 if layout.ranks == 1 else 1 + (layout.replicates and 1 + (shards > 1)) + (layout.context > 1)
    return StepMemory(
        parameters=on_device * parameter_bytes(shape, memory, shards),
        gradients=on_device * trained_elements(shape, shards) * gradient_itemsize(memory),
        optimizer=on_device * optimizer_bytes(shape, memory, shards),
        ewc=ewc_bytes(shape, config, shards) if ewc_on_device else 0,
        gathered=gathered,
        reduction=reduction,
        activations=kept,
        logits=logits,
        other=CUDA_CONTEXT + groups * NCCL_COMMUNICATOR if layout.on_cuda else CPU_PROCESS,
        headroom=round(FRAGMENTATION * (gathered + reduction + kept + logits)),
    )


def full_memory(shape: ModelShape, config: Config, layout: Layout, rows: int) -> StepMemory:
    """`step_memory` of a micro-batch of `rows` full rows, all of it targets, of documents of the length that needs the most.

    That is the length of a row, on a CPU in bf16 at most the 512 tokens up to which the probabilities of attention are kept
    (model/product_attention.py).
    """
    counted, length = min(rows, COUNTED_ROWS if layout.on_cuda else 1), config.data.sequence_length
    keeps = not layout.on_cuda and config.model.compute_dtype == "bf16"
    document = min(length, KEEP_PROBABILITIES) if keeps else length
    whole, rest = divmod(counted * length, document)
    lengths = (document,) * whole + (rest,) * bool(rest)
    return step_memory(shape, config, layout, lengths, counted * length, rows / counted)


def largest_rows(
    shape: ModelShape, config: Config, layout: Layout, fits: Callable[[StepMemory], bool], at_most: int
) -> int:
    """The largest `batch.micro_batch` up to `at_most` whose full micro-batches fit; 0 if not even 1 does."""
    rows = range(1, at_most + 1)
    return bisect.bisect_left(rows, True, key=lambda one: not fits(full_memory(shape, config, layout, one)))


def rows_of_auto(shape: ModelShape, config: Config, layout: Layout, free: int, at_most: int) -> int:
    """The `batch.micro_batch` up to `at_most` that `auto` stands for where each rank has `free` bytes; 0 if not even 1 fits."""
    usable = int(USABLE[layout.kind] * free)
    return largest_rows(shape, config, layout, lambda memory: memory.tensors <= usable, at_most)


def _moments(
    shape: ModelShape, config: Config, layout: Layout, acts: Activations, targets: int
) -> Iterator[tuple[int, int, int, int]]:
    """(gathered, reduction, activations, logits) in bytes at each moment of a step that can be its peak.

    FSDP2's part is read from its source (torch 2.13, torch/distributed/fsdp/_fully_shard):

    - A unit is gathered into one flat buffer, then copied out. In backward the next unit is gathered while one runs; in forward
      a buffer lives until the next one has been copied out. A unit that is not sharded has only a copy in the compute dtype.
      Experts that are cut along dimension 1 are copied out by way of another copy, when the layer that ran has been freed.
    - Gradients of a unit are copied into a flat input of the reduce-scatter in `sharding.reduce_dtype`, which lives until
      the next unit has its gradients. gloo reduces a copy of it, which a thread frees at some later time. The last gradient that
      is cut along dimension 1 lives as long, and is copied before.
    - Where gradients are also all-reduced (hybrid, none), those of earlier micro-batches are kept in the reduce dtype until the
      last one, and the inputs of the all-reduces until backward has ended.
    """
    shards, memory = layout.shards, config.optimizer.memory
    compute, own = DTYPES[config.model.compute_dtype].itemsize, parameter_dtype(memory).itemsize
    # A single rank reduces in the dtype of the weights (distributed/sharding.py: shard), on a CPU in place.
    reduce = own if layout.ranks == 1 else DTYPES[config.sharding.reduce_dtype].itemsize
    in_place = layout.ranks == 1 and not layout.on_cuda
    copies = 2 if shards > 1 and not layout.on_cuda else 1  # of the input of a reduction, with gloo's
    root, head = shape.root, shape.extra[1] if shape.extra else shape.root
    vocabulary, width = max(head.shapes, key=lambda one: one[0] * len(one))  # with rows of padding

    @functools.cache  # most layers are one unit
    def whole(unit: Unit) -> int:  # gathered, with the rows that fill up the last rank
        return _elements(unit.shapes, shards) * shards * compute

    # Where parameters stay gathered, only the first forward of a step gathers, before there are gradients: the buffer then
    # counts for as much as it exceeds them. Under 14N and offload the device has the same gradients all the time.
    everything = all_elements(shape, shards) * shards * compute
    later = 0 if memory == "14N" or layout.offloads else trained_elements(shape, shards) * gradient_itemsize(memory)

    @functools.cache
    def gathered(*units: Unit, buffer: Unit | None = None) -> int:
        size = whole(buffer) if buffer and shards > 1 else 0
        return everything + max(0, size - later) if layout.keeps_gathered else sum(map(whole, units)) + size

    @functools.cache
    def scatter(unit: Unit | None) -> int:  # the input of a unit's reduction
        return _elements(unit.trained, shards) * shards * reduce if unit else 0

    @functools.cache
    def reducing(unit: Unit, before: Unit | None) -> int:  # whole gradients with the input, then input and output
        output = 0 if in_place else _elements(unit.trained, shards) * (reduce + (own if own != reduce else 0))
        cut = [torch.Size(one).numel() * compute for one in unit.trained if sharded_dimension(one, shards)]
        most = max(unit.num_trained * compute + scatter(unit), copies * scatter(unit) + output) + sum(cut[-1:])
        return most + (copies - 1) * scatter(before)

    sums = sums_at_end = 0  # of earlier micro-batches; and of all, or the inputs of their all-reduces
    if layout.replicates:
        elements = trained_elements(shape, shards)
        apart = memory == "14N" or layout.offloads  # from the gradients, whose place they do not take later
        sums = elements * (reduce if apart else max(0, reduce - gradient_itemsize(memory)))
        sums_at_end = elements * (reduce if apart or own != reduce else 0)
    # The gradient of the head is reduced in pieces, where FSDP sees none of it (distributed/sharding.py: shard). Else a tied
    # one waits in the root for that of the embedding.
    in_pieces = not layout.replicates and (bool(shape.extra) or shards == 1) and not layout.offloads
    in_pieces = in_pieces and not shape.frozen_itemsize  # not of LoRA's rows of new tokens
    tied = 0 if shape.extra or not head.trained or in_pieces else vocabulary * width * compute

    # The loss computes its gradients. The last buffer of forward is still there.
    units, buffer = ((root, head), head) if shape.extra else ((root,), shape.layers[-1])
    hidden = targets * shape.config.hidden_size * (compute + FP32)  # of the targets, and its gradient
    softcap, is_anchored = head_settings(shape.config).softcap, any(source.anchor for source in config.data.mix)
    of_logits = loss_copies(softcap is not None, is_anchored, compute)
    lent = vocabulary * width * compute if head.trained and shape.frozen_itemsize else 0
    options = bool(head.trained), compute, in_pieces and shards, of_logits, lent
    chunk = _loss_memory(targets, (vocabulary, width), *options)
    yield gathered(*units, buffer=buffer), sums, acts.saved, chunk + hidden
    before = None
    if shape.extra and not in_pieces:  # the reduction of the head's gradient, when its parameters are freed
        before = head
        yield gathered(root, buffer=shape.layers[-1]), reducing(head, None) + sums, acts.saved + acts.gradient, 0
    kept = acts.saved - acts.final
    for index, layer in reversed(list(enumerate(shape.layers))):
        following = shape.layers[max(0, index - 1)]
        in_backward = kept + acts.gradient + acts.in_backward[index]  # with the gradients of its weights
        yield gathered(root, layer, buffer=following), copies * scatter(before) + sums, in_backward, tied
        # The reduction of the layer's gradients no longer needs its activations.
        kept -= acts.kept[index]
        yield gathered(root, buffer=following), reducing(layer, before) + sums, kept + acts.gradient, tied
        before = layer
    # The gradient of the embedding; tied, it is added to that of the head. Only the last micro-batch frees parameters that
    # stay gathered until then.
    last = shape.extra[0] if shape.extra else root
    reduction = max(last.num_trained * compute + tied + copies * scatter(before), reducing(last, before))
    remaining = whole(root) + (whole(last) if layout.keeps_gathered else 0)
    yield gathered(root), reduction + sums, acts.rest + acts.gradient, 0
    yield remaining, reduction + sums_at_end, acts.rest + acts.gradient, 0


def loss_copies(has_softcap: bool, is_anchored: bool, compute: int) -> int:
    """How many times model/loss.py holds fp32 logits of up to `LOSS_TOKENS` targets. compute: bytes of an element of a product.

    Cross-entropy takes the product (in fp32 it is there anyway), its log-softmax and the gradients of both. A cap keeps its
    tanh. KL to the base (`Source.anchor`) takes the logits of all other tokens, and their gradient.
    """
    return 4 - (compute == FP32) + has_softcap + 2 * is_anchored


def _loss_memory(
    targets: int, head: tuple[int, int], is_trained: bool, compute: int, shards: int, copies: int, lent: int
) -> int:
    """Most that model/loss.py takes: copies of the logits of a chunk, and what becomes of the gradient of the head.

    head: its rows and columns. compute: bytes of an element of a product. shards: over which the gradient is reduced in
    pieces, 0 if FSDP reduces it. copies: `loss_copies`. lent: bytes of a copy of the head with LoRA's rows of new tokens.
    """
    vocabulary, width = head
    rows = min(targets, targets_per_chunk(targets, width if is_trained else 0, compute, shards > 0))
    product, losses = rows * vocabulary * compute, min(rows, LOSS_TOKENS) * vocabulary * FP32 * copies
    if not is_trained:
        return product + losses
    block = min(vocabulary, HEAD_ROWS)
    # The factors of a block in fp32, where a product is not to be rounded, and the product.
    exact = (block * width + ((block + width) * rows if compute < FP32 else 0)) * FP32
    kept, summed = product, 0  # until backward
    if rows < targets:
        kept = summed = vocabulary * width * FP32
    chunk = lent + summed + product + max(losses, exact if summed else 0)
    if shards:
        # A piece: a copy of its columns, if they are of several shards, then its product, which is cast and reduced.
        columns = rows * compute if shards > 1 and not summed else 0
        return max(chunk, kept + block * max(columns + width * compute, width * (compute + FP32)))
    return max(chunk, kept + vocabulary * width * compute + exact)
