"""How many bytes of activations a micro-batch keeps for backward, and how many a layer's backward needs beside them.

The model's own layers run forward and backward on fake tensors, which have shapes and no memory, under the activation
checkpointing of the run. A stack of a few layers is enough: each kind of layer (sliding window, no RoPE, checkpointed or
not) is counted once, and the layers of the whole model are added up.
"""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from configs.config import LoRA
from distributed.activation_checkpointing import checkpoint_activations
from distributed.sharding import decoder_layers
from model.language_model import PackedLanguageModel, build_on_meta
from model.lora import add_adapters
from model.packed_attention import DocumentLengths

FULL = LoRA()  # all weights are trained
Kind = tuple  # what makes two layers alike: their values in the config's lists, and whether they are checkpointed


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

    def scaled(self, factor: float) -> "Activations":
        """Those of `factor` as many documents of the same lengths; `in_backward` is then an upper bound if factor > 1."""
        return Activations(
            tuple(round(factor * size) for size in self.kept),
            tuple(round(factor * size) for size in self.in_backward),
            *(round(factor * size) for size in (self.rest, self.final, self.on_host, self.gradient)),
        )


def count_activations(
    config: PretrainedConfig,
    dtype: torch.dtype,
    lengths: Sequence[int],
    device_type: str = "cpu",
    mode: str = "none",
    every: int = 1,
    layer_class: str | None = None,
    lora: LoRA = FULL,
) -> Activations:
    """Count the activations of a micro-batch with documents of `lengths` tokens, in eager mode, at any model size.

    dtype: of the products. device_type: `cuda` in bf16 counts torch's varlen kernel, everything else the kernels of a CPU
    (model/packed_attention.py). mode, every: `model.activation_checkpointing` and `model.checkpoint_every`. Every storage
    counts once; parameters do not count, their gradients do (`in_backward`). lora: with adapters beside frozen matrices.
    """
    kinds = layer_kinds(config, mode, every)
    distinct = list(dict.fromkeys(kinds))
    # What all layers share (RoPE) is made or first kept by the first layer of a kind, and the last layer has no successor.
    chosen = [kinds.index(kind) for kind in distinct + distinct + distinct[:1]]
    model = build_on_meta(_with_layers(config, chosen))
    if lora.rank:
        add_adapters(model.causal_lm, lora, "")
    model.to(dtype)
    layers = decoder_layers(model, layer_class)
    on_host = mode == "offload" and device_type == "cuda"
    checkpointed = [layer for layer, index in zip(layers, chosen, strict=True) if index % every == 0]
    checkpoint_activations(checkpointed, "full" if mode == "offload" else mode)  # a fake tensor has no other memory
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        counted = run_layers(model, layers, lengths, device_type)
    second = range(len(distinct), 2 * len(distinct))
    kept = {kind: counted.kept(index) for kind, index in zip(distinct, second, strict=True)}
    in_backward = {kind: counted.in_backward(index) for kind, index in zip(distinct, second, strict=True)}
    of_layers = sum(kept[kinds[index]] for index in chosen)
    inputs = config.hidden_size * dtype.itemsize * sum(lengths)
    rest = counted.at_backward[len(chosen) - 1] - of_layers - inputs  # with the gradient of the final norm's weight
    moved = {kind: inputs if on_host and kind[-1] else 0 for kind in distinct}
    return Activations(
        tuple(kept[kind] - moved[kind] for kind in kinds),
        tuple(in_backward[kind] + moved[kind] for kind in kinds),  # it comes back for the recomputation
        rest,
        counted.saved - of_layers - rest,
        sum(moved[kind] for kind in kinds),
        inputs,
    )


def layer_kinds(config: PretrainedConfig, mode: str, every: int) -> list[Kind]:
    """The kind of each layer: two layers of one kind keep the same bytes."""
    count = config.num_hidden_layers
    lists = [value for _, value in sorted(vars(config).items()) if _is_per_layer(value, count)]
    return [(*(value[i] for value in lists), mode != "none" and i % every == 0) for i in range(count)]


def _is_per_layer(value: object, count: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == count


def _with_layers(config: PretrainedConfig, chosen: Sequence[int]) -> PretrainedConfig:
    """The configuration of a model with these layers of `config` only."""
    short, count = copy.deepcopy(config), config.num_hidden_layers
    for name, value in vars(config).items():
        if _is_per_layer(value, count):
            setattr(short, name, [value[index] for index in chosen])
    short.num_hidden_layers = len(chosen)
    return short


@dataclass
class LayerCounts:
    """Live bytes of a forward and backward at the boundaries of layers."""

    before: list[int]  # when the forward of each layer starts
    saved: int  # at the end of forward, when the output of the last layer has been used
    at_backward: dict[int, int]  # when the backward of a layer starts
    peaks: dict[int, int]  # the most during the backward of a layer

    def kept(self, layer: int) -> int:
        """Bytes that a layer keeps; not for the last one."""
        return self.before[layer + 1] - self.before[layer]

    def in_backward(self, layer: int) -> int:
        """Bytes that the backward of a layer takes beside what was live when it started; not for the first one."""
        return self.peaks[layer] - self.at_backward[layer]


def run_layers(
    model: PackedLanguageModel, layers: Sequence[nn.Module], lengths: Sequence[int], kernels: str | None = None
) -> LayerCounts:
    """Forward and backward of everything but the head over documents of `lengths` tokens, on the model's (CPU) tensors.

    kernels: cuda | cpu: whose attention is counted; None: that of the device.
    """
    live = LiveBytes([*model.parameters(), *model.buffers()])
    counts, order = LayerCounts([], 0, {}, {}), {layer: index for index, layer in enumerate(layers)}

    def before(layer: nn.Module, *_: object) -> None:
        counts.before.append(live.now)

    def after(layer: nn.Module, _: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        hidden.register_hook(lambda _: start_backward(order[layer]))

    def start_backward(index: int) -> None:
        if counts.at_backward:
            counts.peaks[min(counts.at_backward)] = live.peak
        counts.at_backward[index] = live.peak = live.now

    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    with live:
        loss = _hidden_states(model, tuple(lengths), kernels).sum()  # keeps no tensor
        counts.saved = live.now
        loss.backward()
    counts.peaks[0] = live.peak
    for handle in handles:
        handle.remove()
    for parameter in model.parameters():
        parameter.grad = None
    return counts


def _hidden_states(model: PackedLanguageModel, lengths: tuple[int, ...], kernels: str | None) -> torch.Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return model.causal_lm.base_model(
        input_ids=torch.zeros(1, sum(lengths), dtype=torch.int64),
        position_ids=torch.arange(sum(lengths))[None],  # of one document: only their number matters
        use_cache=False,
        documents=DocumentLengths(lengths, ends.to(torch.int32), kernels),
    ).last_hidden_state


class LiveBytes(TorchDispatchMode):
    """Sums the bytes of all storages that operations make while it is entered, for as long as something refers to them.

    Works for real and for fake tensors. Storages of `others` do not count.
    """

    def __init__(self, others: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._others = {tensor.untyped_storage()._cdata for tensor in others}
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
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
