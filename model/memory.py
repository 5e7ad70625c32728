"""The memory of a training step on the fullest rank, computed without data.

    weights, gradients, moments, EWC   held during the whole run: exact, from the shapes of the shards
    activations of a micro-batch       a few of the model's own layers run without data, each kind of layer once
    temporary tensors of a step        computed at each point where the peak can be; the fullest point counts

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
from transformers import PretrainedConfig

from common.torch_private import private
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

FakeTensorMode = private("_subclasses.fake_tensor.FakeTensorMode")
TorchDispatchMode = private("utils._python_dispatch.TorchDispatchMode")
tree_leaves = private("utils._pytree.tree_leaves")
grouped_mm = private("ops.aten._grouped_mm.default")

FP32, MIB = 4, 2**20  # bytes
# About 300 MB with lazy loading of kernels (CUDA >= 11.7), on the GPU of a PyTorch maintainer (pytorch#107667); more kernels are
# loaded on their first use. Uncertain by a factor of 1.5.
CUDA_CONTEXT = 400 * MIB
# 544 MB for 2 and 688 MB for more A100s with NVLink (nccl#964). It depends on the number of channels, so it is uncertain by a
# factor of 2, and more with NVLink SHARP.
NCCL_COMMUNICATOR = 688 * MIB
# A CPU process with Python, torch and transformers, before any tensor.
CPU_PROCESS = 380 * MIB
# A fraction of the temporary tensors. The caching allocator rounds blocks up (to 2 MiB above 1 MiB), does not join blocks of
# different segments, and keeps the blocks of FSDP's streams apart.
# https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf
FRAGMENTATION = 0.1
# The fraction of the free memory that `auto` fills. The rest is for fragmentation and memory that is not counted.
USABLE = {"cuda": 0.85, "cpu": 0.7}
COUNTED_ROWS = 8  # rows of a micro-batch counted on CUDA; more rows are extrapolated, because each count takes time


# ---- The model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Unit:
    """The parameters that FSDP gathers together: the shapes of all, and of the trained ones.

    Equal layers are one object (`_one_unit`), so that caches compare units by identity, which is quick.
    """

    shapes: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def num_parameters(self) -> int:
        """Return the number of elements."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @functools.cached_property
    def num_trained(self) -> int:
        """Return the number of elements with gradients and moments."""
        return sum(torch.Size(shape).numel() for shape in self.trained)


@dataclass(frozen=True, eq=False)  # compared by identity, so that it can be the key of a cache
class ModelShape:
    """The shapes and FLOPs of a model, which decide memory and time. Tied parameters count once."""

    config: PretrainedConfig
    layers: tuple[Unit, ...]  # decoder layers, in order
    extra: tuple[Unit, ...]  # (embedding, head), or () if they are tied
    root: Unit  # the remaining parameters: the final norm, and a tied embedding
    num_tokens: int  # rows of the head without padding
    work: Work
    frozen_itemsize: int  # bytes of an element of a frozen weight; 0 if all are trained

    @property
    def units(self) -> tuple[Unit, ...]:
        """Return all units, the root last."""
        return *self.layers, *self.extra, self.root

    @property
    def trained(self) -> Iterable[tuple[int, ...]]:
        """Return the shapes of all trained parameters."""
        return (shape for unit in self.units for shape in unit.trained)

    @functools.cached_property
    def num_parameters(self) -> int:
        """Return the number of parameters of the whole model."""
        return sum(unit.num_parameters for unit in self.units)

    @functools.cached_property
    def num_trained(self) -> int:
        """Return the number of parameters with gradients and moments: all, or only LoRA's adapters."""
        return sum(unit.num_trained for unit in self.units)

    @functools.cached_property
    def adapter_outputs(self) -> int:
        """Return the elements per token that LoRA's adapters add to the outputs of matrices, in all layers."""
        if not self.frozen_itemsize:
            return 0
        return sum(rows for unit in self.layers for rows, _ in unit.trained[1::2])  # B; A comes before it

    @property
    def stored_dtype(self) -> torch.dtype:
        """Return the dtype of the base model's files and of the export; bf16 if config.json names none."""
        return getattr(self.config, "dtype", None) or torch.bfloat16


def shape_of(model: PackedLanguageModel, config: PretrainedConfig, layer_class: str | None = None) -> ModelShape:
    """Return the shape of a model that is not sharded yet; it may be on `meta`."""
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


# ---- Held during the whole run -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The distribution of a run over its ranks, as distributed/sharding.py sets it up."""

    kind: str  # cuda | cpu
    ranks: int
    shards: int  # ranks that share one copy of the model
    keeps_gathered: bool  # parameters stay gathered from the first forward of a step to its last backward
    offloads: bool  # parameters, gradients and moments are in host memory; forward and backward run on the GPU
    context: int = 1  # ranks that share the tokens of a micro-batch

    @property
    def on_cuda(self) -> bool:
        """Return whether the ranks are GPUs."""
        return self.kind == "cuda"

    @property
    def replicates(self) -> bool:
        """Return whether the mesh has a second dimension, over which gradients are all-reduced."""
        return self.shards != self.ranks


def layout_of(config: Config, ranks: int, per_node: int, kind: str) -> Layout:
    """Return the layout of a run (distributed/sharding.py: make_mesh, gathering_strategy). `kind` is cuda or cpu."""
    sharding = config.sharding
    shards = {"hybrid": sharding.shard_size or per_node, "none": 1}.get(sharding.strategy, ranks)
    keeps = sharding.strategy in ("grad_op", "none") or (ranks == 1 and kind == "cpu" and sharding.strategy == "full")
    return Layout(kind, ranks, shards, keeps, sharding.cpu_offload and kind == "cuda", sharding.context)


@functools.lru_cache(maxsize=1024)
def _elements(shapes: tuple[tuple[int, ...], ...], shards: int) -> int:
    return sum(local_shape(shape, shards).numel() for shape in shapes)


@functools.lru_cache(maxsize=256)
def trained_elements(shape: ModelShape, shards: int) -> int:
    """Return the number of elements on rank 0 with gradients and moments."""
    return sum(_elements(unit.trained, shards) for unit in shape.units)


@functools.lru_cache(maxsize=256)
def all_elements(shape: ModelShape, shards: int) -> int:
    """Return the number of elements on rank 0."""
    return sum(_elements(unit.shapes, shards) for unit in shape.units)


def parameter_bytes(shape: ModelShape, memory: str, shards: int) -> int:
    """Return the bytes of rank 0's weights: trained in fp32 under 16N, else bf16; frozen (LoRA) in the compute dtype."""
    trained, total = trained_elements(shape, shards), all_elements(shape, shards)
    return trained * parameter_dtype(memory).itemsize + (total - trained) * shape.frozen_itemsize


def gradient_itemsize(memory: str) -> int:
    """Return the bytes of an element of a sharded gradient, which lives from the first backward to the end of the step."""
    return FP32 if memory in ("16N", "14N") else 2


@functools.lru_cache(maxsize=256)
def moment_bytes(shape: ModelShape, memory: str, shards: int) -> int:
    """Return the bytes of both moments on rank 0, as distributed/low_memory.py makes them (16N: the same fp32 as 12N)."""
    parts = [torch.empty(local_shape(tensor, shards), device="meta") for tensor in shape.trained]
    return sum(moment.nbytes for part in parts for moment in new_moments(nn.Parameter(part), memory).values())


def optimizer_bytes(shape: ModelShape, memory: str, shards: int) -> int:
    """Return the bytes of the moments and of AdamW's step counters: one for each parameter under 16N, else a single one."""
    return moment_bytes(shape, memory, shards) + FP32 * (len(list(shape.trained)) if memory == "16N" else 1)


def ewc_bytes(shape: ModelShape, config: Config, shards: int) -> int:
    """Return the bytes of the Fisher diagonal and the reference on rank 0 (model/ewc.py); 0 without EWC.

    The reference is stored in `ewc.dtype` if that is exact. bf16 is assumed to be exact if the base model's files are in bf16;
    fp32 files whose numbers are all bf16 need less than planned.
    """
    if not config.ewc.strength:
        return 0
    itemsize = DTYPES[config.ewc.dtype].itemsize
    is_exact = torch.bfloat16 in (parameter_dtype(config.optimizer.memory), shape.stored_dtype)
    return trained_elements(shape, shards) * (itemsize + (itemsize if is_exact else FP32))


# ---- Activations ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """The activations of one micro-batch in bytes, without the head."""

    kept: tuple[int, ...]  # by each layer, from its forward to its backward
    # The most that each layer's backward adds: gradients of its input, output and weights, and recomputed activations.
    in_backward: tuple[int, ...]
    rest: int  # embedding and RoPE
    final: int  # the final norm, until its backward
    on_host: int  # kept in host memory (checkpointing `offload` on CUDA)
    gradient: int  # of a layer's output

    @property
    def saved(self) -> int:
        """Return the bytes on the device at the end of forward."""
        return sum(self.kept) + self.rest + self.final

    def times(self, factor: float) -> "Activations":
        """Scale to `factor` times as many documents of the same lengths. For factor > 1, `in_backward` is an upper bound."""
        kept, in_backward, *rest = vars(self).values()
        kept, in_backward = (tuple(round(factor * size) for size in sizes) for sizes in (kept, in_backward))
        return Activations(kept, in_backward, *(round(factor * size) for size in rest))


@functools.lru_cache(maxsize=256)  # the plan's table has the same micro-batch under many strategies
def count_activations(
    shape: ModelShape, settings: Model, lora: LoRA, kind: str, lengths: tuple[int, ...], context: int = 1
) -> Activations:
    """Count the activations of a micro-batch with documents of `lengths` tokens, in eager mode, at any model size.

    `context` ranks share the micro-batch; the result is the part of one rank. `cuda` in bf16 counts torch's varlen kernel,
    any other `kind` and dtype the kernels of a CPU (model/packed_attention.py).

    The model's own layers run forward and backward on tensors without data, under the run's activation checkpointing. Each
    kind of layer (sliding window, no RoPE, checkpointed or not) runs once and counts for all of its kind. Every storage
    counts once; parameters do not count, their gradients do (`in_backward`).
    """
    dtype, mode = DTYPES[settings.compute_dtype], settings.activation_checkpointing
    is_checkpointed = [
        mode != "none" and i % settings.checkpoint_every == 0 for i in range(shape.config.num_hidden_layers)
    ]
    if mode == "offload":  # as `full`, but on CUDA a layer's input is on the host until its recomputation
        settings = replace(settings, activation_checkpointing="full")
        full = count_activations(shape, settings, lora, kind, lengths, context)
        moved = [full.gradient * (kind == "cuda" and is_offloaded) for is_offloaded in is_checkpointed]
        kept, in_backward = map(operator.sub, full.kept, moved), map(operator.add, full.in_backward, moved)
        return replace(full, kept=tuple(kept), in_backward=tuple(in_backward), on_host=sum(moved))
    kinds = list(zip(*_of_layers(shape.config).values(), is_checkpointed, strict=True))
    distinct = list(dict.fromkeys(kinds))
    # Each kind runs twice, and only the second layer counts: the first one also keeps tensors that all layers share (RoPE).
    # One more layer follows, because the bytes of a layer are read when its successor starts.
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
    # The kernels of a CPU need fake tensors whose device is a CPU. The rest runs on `meta`, in a third of the time.
    on_meta = kind == "cuda" and dtype == torch.bfloat16
    with nullcontext() if on_meta else FakeTensorMode(allow_non_fake_inputs=True):
        for module in () if on_meta else model.modules():  # each module once: a shared one cannot be moved twice
            module.to_empty(device="cpu", recurse=False)
        live = _run_layers(model, layers, lengths, kind, context)
    kept, in_backward = {}, {}
    for index, layer_kind in enumerate(distinct, len(distinct)):
        kept[layer_kind] = live.before[index + 1] - live.before[index]
        in_backward[layer_kind] = live.peaks[index] - live.at_backward[index]
    of_layers = sum(kept[kinds[index]] for index in chosen)
    inputs = shape.config.hidden_size * dtype.itemsize * -(-sum(lengths) // context)
    rest = live.at_backward[len(chosen) - 1] - of_layers - inputs  # with the gradient of the final norm's weight
    return Activations(
        kept=tuple(kept[layer_kind] for layer_kind in kinds),
        in_backward=tuple(in_backward[layer_kind] for layer_kind in kinds),
        rest=rest,
        final=live.saved - of_layers - rest,
        on_host=0,
        gradient=inputs,
    )


def _of_layers(config: PretrainedConfig) -> dict[str, list]:
    """Return the config's lists with one value per layer, by name. Layers with equal values are of one kind.

    `is_dense` is true for a layer without experts in a Qwen model with experts.
    """
    count = config.num_hidden_layers
    lists = {
        name: list(value)
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == count
    }
    every, dense = getattr(config, "decoder_sparse_step", None) or 1, getattr(config, "mlp_only_layers", None) or ()
    return lists | {"is_dense": [index in dense or (index + 1) % every > 0 for index in range(count)]}


def _with_layers(config: PretrainedConfig, chosen: Sequence[int]) -> PretrainedConfig:
    """Return the configuration of a model that has only the `chosen` layers of `config`."""
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
    """Run forward and backward of the model without its head over documents of `lengths` tokens, and record the bytes.

    `kernels` is cuda or cpu. `context` ranks share the tokens; the record is of one rank.
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
            position_ids=torch.arange(tokens, device=device)[None],  # only their number matters
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
    """A dispatch mode that sums the bytes of all live storages that operations have made inside it.

    The storages of `excluded` do not count.
    """

    def __init__(self, excluded: Sequence[torch.Tensor]) -> None:
        super().__init__()
        # `saved` is set at the end of forward, after the last use of the last layer's output.
        self.now = self.peak = self.saved = 0
        self.before: list[int] = []  # bytes when the forward of each layer starts
        self.at_backward: dict[int, int] = {}  # bytes when the backward of a layer starts
        self.peaks: dict[int, int] = {}  # most bytes during the backward of a layer
        self._excluded = {id(tensor.untyped_storage()) for tensor in excluded}
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = kwargs or {}
        if func is grouped_mm and args[0].dtype != torch.bfloat16:
            # Fake tensors support the products of experts in bf16 only. The result of any dtype has the same shape.
            result = func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs).to(args[0].dtype)
        else:
            result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive or key in self._excluded:
            return

        def free(_: weakref.ref) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, free)  # torch keeps the Python object as long as the storage lives
        self.now += size
        self.peak = max(self.peak, self.now)


# ---- The peak of a step --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepMemory:
    """The device memory of the fullest rank at the peak of a step, in bytes by use."""

    parameters: int  # this rank's shards
    gradients: int
    optimizer: int  # moments and their scales
    ewc: int  # Fisher diagonal and reference, if ewc.device=device
    gathered: int  # whole parameters in the compute dtype
    reduction: int  # gradients of a unit before and while they are reduced
    activations: int  # of the worst micro-batch, with one recomputed layer
    logits: int  # one chunk of the head, and the gradients of hidden states and head
    other: int  # CUDA context, NCCL buffers; on a CPU the process itself
    headroom: int  # for fragmentation

    @property
    def total(self) -> int:
        """Return the sum of all terms."""
        return sum(vars(self).values())

    @property
    def tensors(self) -> int:
        """Return the sum of all terms that are tensors, which torch.cuda.max_memory_allocated reports."""
        return self.total - self.other - self.headroom


def step_memory(
    shape: ModelShape, config: Config, layout: Layout, lengths: tuple[int, ...], targets: int, times: float = 1
) -> StepMemory:
    """Return the peak memory of a step whose worst micro-batch has documents of `lengths` tokens, `targets` of them targets.

    The micro-batch has these documents `times` times. It is not the step's first, so gradients of earlier micro-batches
    exist. Layers are counted as eager code; torch.compile keeps less. `other` and `headroom` are estimates, all
    remaining terms count tensors.
    """
    memory, shards = config.optimizer.memory, layout.shards
    counts = count_activations(shape, config.model, config.lora, layout.kind, lengths, layout.context).times(times)
    targets = min(targets, -(-sum(lengths) // layout.context))  # one rank may have all targets
    points = _possible_peaks(shape, config, layout, counts, round(times * targets))
    gathered, reduction, kept, logits = max(points, key=sum)
    on_device = 0 if layout.offloads else 1
    ewc_on_device = config.ewc.device == "device" and not layout.offloads or not layout.on_cuda
    # A mesh of one dimension uses the default group. A mesh of two adds a group for each dimension with several ranks.
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
    """Return `step_memory` for `rows` full rows, all tokens targets, with the document length that needs the most memory.

    That length is a whole row. On a CPU in bf16 it is at most 512 tokens, because attention keeps its probabilities up to
    that length (model/product_attention.py).
    """
    counted, length = min(rows, COUNTED_ROWS if layout.on_cuda else 1), config.data.length
    keeps = not layout.on_cuda and config.model.compute_dtype == "bf16"
    document = min(length, KEEP_PROBABILITIES) if keeps else length
    whole, rest = divmod(counted * length, document)
    lengths = (document,) * whole + (rest,) * bool(rest)
    return step_memory(shape, config, layout, lengths, counted * length, rows / counted)


def largest_rows(
    shape: ModelShape, config: Config, layout: Layout, fits: Callable[[StepMemory], bool], at_most: int
) -> int:
    """Return the largest `batch.micro_batch` up to `at_most` whose full micro-batches fit, or 0 if a single row does not."""
    rows = range(1, at_most + 1)
    return bisect.bisect_left(rows, True, key=lambda count: not fits(full_memory(shape, config, layout, count)))


def rows_of_auto(shape: ModelShape, config: Config, layout: Layout, free: int, at_most: int) -> int:
    """Return the value of `batch.micro_batch=auto`, up to `at_most`, if each rank has `free` bytes; 0 if a single row does not fit."""
    usable = int(USABLE[layout.kind] * free)
    return largest_rows(shape, config, layout, lambda memory: memory.tensors <= usable, at_most)


def _possible_peaks(
    shape: ModelShape, config: Config, layout: Layout, acts: Activations, targets: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (gathered, reduction, activations, logits) in bytes at each point of a step that can be its peak.

    FSDP2's part follows its source (torch 2.13, torch/distributed/fsdp/_fully_shard):

    - A unit is gathered into a flat buffer, then copied out. In backward the next unit is gathered while a unit runs; in
      forward a buffer lives until the next buffer has been copied out. A unit that is not sharded has only a copy in the
      compute dtype. Experts that are cut along dimension 1 are copied twice on their way out, after the previous layer is freed.
    - The gradients of a unit are copied into a flat input of the reduce-scatter in `sharding.reduce_dtype`, which lives until
      the next unit has its gradients. gloo reduces a copy of this input, which a thread frees at some later time. The last
      gradient that is cut along dimension 1 is copied first, and its copy lives as long as the input.
    - With a second all-reduce (hybrid, none), the gradients of earlier micro-batches are kept in the reduce dtype until the
      last micro-batch, and the inputs of the all-reduces until the end of backward.
    """
    shards, memory = layout.shards, config.optimizer.memory
    compute, own = DTYPES[config.model.compute_dtype].itemsize, parameter_dtype(memory).itemsize
    # A single rank reduces in the dtype of the weights (distributed/sharding.py: shard), on a CPU in place.
    reduce = own if layout.ranks == 1 else DTYPES[config.sharding.reduce_dtype].itemsize
    in_place = layout.ranks == 1 and not layout.on_cuda
    copies = 2 if shards > 1 and not layout.on_cuda else 1  # inputs of a reduction, with gloo's copy
    root, head = shape.root, shape.extra[1] if shape.extra else shape.root
    vocabulary, width = max(head.shapes, key=lambda tensor: tensor[0] * len(tensor))  # with rows of padding

    @functools.cache  # most layers are one unit
    def whole(unit: Unit) -> int:  # gathered, with the last rank's rows of padding
        return _elements(unit.shapes, shards) * shards * compute

    # If parameters stay gathered, only the first forward of a step gathers, before gradients exist. So the buffer counts only
    # where it is larger than the later gradients. Under 14N and offload the device's gradients do not change during a step.
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
    def reducing(unit: Unit, before: Unit | None) -> int:  # first whole gradients and input, then input and output
        output = 0 if in_place else _elements(unit.trained, shards) * (reduce + (own if own != reduce else 0))
        cut = [torch.Size(tensor).numel() * compute for tensor in unit.trained if sharded_dimension(tensor, shards)]
        most = max(unit.num_trained * compute + scatter(unit), copies * scatter(unit) + output) + sum(cut[-1:])
        return most + (copies - 1) * scatter(before)

    # Gradients of earlier micro-batches; at the end, gradients of all micro-batches or the inputs of their all-reduces.
    sums = sums_at_end = 0
    if layout.replicates:
        elements = trained_elements(shape, shards)
        apart = memory == "14N" or layout.offloads  # the sums have memory of their own, else they replace the gradients
        sums = elements * (reduce if apart else max(0, reduce - gradient_itemsize(memory)))
        sums_at_end = elements * (reduce if apart or own != reduce else 0)
    # The head's gradient is reduced in pieces, outside of FSDP (distributed/sharding.py: shard). If not, the gradient of a tied
    # head waits in the root for the embedding's gradient.
    in_pieces = not layout.replicates and (bool(shape.extra) or shards == 1) and not layout.offloads
    in_pieces = in_pieces and not shape.frozen_itemsize  # LoRA's rows of new tokens are not
    tied = 0 if shape.extra or not head.trained or in_pieces else vocabulary * width * compute

    # The loss computes its gradients while the last buffer of forward still exists.
    units, buffer = ((root, head), head) if shape.extra else ((root,), shape.layers[-1])
    hidden = targets * shape.config.hidden_size * (compute + FP32)  # hidden states of the targets, and their gradient
    softcap, is_anchored = head_settings(shape.config).softcap, any(source.anchor for source in config.data.mix)
    of_logits = loss_copies(softcap is not None, is_anchored, compute)
    lent = vocabulary * width * compute if head.trained and shape.frozen_itemsize else 0
    options = bool(head.trained), compute, in_pieces and shards, of_logits, lent
    chunk = _loss_memory(targets, (vocabulary, width), *options)
    yield gathered(*units, buffer=buffer), sums, acts.saved, chunk + hidden
    before = None
    if shape.extra and not in_pieces:  # the head's gradient is reduced after its parameters are freed
        before = head
        yield gathered(root, buffer=shape.layers[-1]), reducing(head, None) + sums, acts.saved + acts.gradient, 0
    kept = acts.saved - acts.final
    for index, layer in reversed(list(enumerate(shape.layers))):
        following = shape.layers[max(0, index - 1)]
        in_backward = kept + acts.gradient + acts.in_backward[index]  # includes the gradients of the layer's weights
        yield gathered(root, layer, buffer=following), copies * scatter(before) + sums, in_backward, tied
        # The reduction of the layer's gradients no longer needs its activations.
        kept -= acts.kept[index]
        yield gathered(root, buffer=following), reducing(layer, before) + sums, kept + acts.gradient, tied
        before = layer
    # The embedding's gradient; if tied, the head's gradient is added to it. Parameters that stay gathered are freed in the last
    # micro-batch only.
    last = shape.extra[0] if shape.extra else root
    reduction = max(last.num_trained * compute + tied + copies * scatter(before), reducing(last, before))
    remaining = whole(root) + (whole(last) if layout.keeps_gathered else 0)
    yield gathered(root), reduction + sums, acts.rest + acts.gradient, 0
    yield remaining, reduction + sums_at_end, acts.rest + acts.gradient, 0


def loss_copies(has_softcap: bool, is_anchored: bool, compute: int) -> int:
    """Return how many copies of the fp32 logits of up to `LOSS_TOKENS` targets model/loss.py holds at once.

    `compute` is the itemsize of a matrix product. Cross-entropy needs the product in fp32 (no copy if it is fp32 already),
    its log-softmax and the gradients of both. A softcap keeps its tanh. KL to the base (`Source.anchor`) needs the logits of
    the tokens outside of the base's top ones, and their gradient.
    """
    return 4 - (compute == FP32) + has_softcap + 2 * is_anchored


def _loss_memory(
    targets: int, head: tuple[int, int], is_trained: bool, compute: int, shards: int, copies: int, lent: int
) -> int:
    """Return the most bytes that model/loss.py needs: copies of the logits of a chunk, and the gradient of the head.

    `head` is its rows and columns, `compute` the itemsize of a matrix product. `shards` share the gradient, which is reduced
    in pieces; 0 if FSDP reduces it. `copies` is `loss_copies`. `lent` is the size of a copy of the head with LoRA's rows of
    new tokens.
    """
    vocabulary, width = head
    rows = min(targets, targets_per_chunk(targets, width if is_trained else 0, compute, shards > 0))
    product, losses = rows * vocabulary * compute, min(rows, LOSS_TOKENS) * vocabulary * FP32 * copies
    if not is_trained:
        return product + losses
    block = min(vocabulary, HEAD_ROWS)
    # The product of a block in fp32, so that it is not rounded, and its two factors in fp32.
    exact = (block * width + ((block + width) * rows if compute < FP32 else 0)) * FP32
    kept, summed = product, 0  # until backward
    if rows < targets:
        kept = summed = vocabulary * width * FP32
    chunk = lent + summed + product + max(losses, exact if summed else 0)
    if shards:
        # A piece: a copy of its columns of the logits' gradient, if they belong to several shards, then its product, which is
        # cast and reduced.
        columns = rows * compute if shards > 1 and not summed else 0
        return max(chunk, kept + block * max(columns + width * compute, width * (compute + FP32)))
    return max(chunk, kept + vocabulary * width * compute + exact)
