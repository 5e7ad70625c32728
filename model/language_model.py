"""The pretrained model over packed documents: build it on `meta`, load it slice by slice, return the states that predict targets.

The order is: build on meta -> activation checkpointing -> shard -> materialize -> load each rank's own slices -> recompute
`inv_freq` in fp32. Everything that changes shapes comes before sharding.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from common.errors import UserError
from data.batches import MicroBatch
from distributed.export import Merge
from distributed.sharding import local_shard, whole
from model import mixers, packed_attention
from model.architectures import has_experts, head_settings
from model.loss import lend_weight
from model.quantized_files import dequantized
from model.rope import fix_frequencies
from model.text_part import TextPart, is_part
from model.weight_files import StoredTensor, stored_tensors
from model.weight_names import StoredForm, StoredParts, find_sources

if TYPE_CHECKING:
    from distributed.context import Context

# Dtypes in safetensors files. All others (I8, U8, F8_E4M3, ...) are quantised and useless without their scales.
TRAINABLE = ("BF16", "F16", "F32", "F64")
ADAPTER = "default"  # peft's name for a model's only adapter; it is a part of parameter names
BUFFERS = "persistent_buffers"  # name of the registered object in checkpoints
NEW_ROWS = "token_adapter.trainable_tokens_delta"  # parameter with the rows of new tokens in an embedding or head (model/lora.py)


class PackedLanguageModel(nn.Module):
    """A causal language model over packed documents. It is FSDP's root, so embedding and head are gathered in forward."""

    def __init__(self, causal_lm: PreTrainedModel, num_tokens: int | None = None) -> None:
        """Wrap `causal_lm`. Its embedding and head have `num_tokens` rows of tokens, then rows of padding; None: no padding."""
        super().__init__()
        self.causal_lm = causal_lm
        self.num_tokens = num_tokens or causal_lm.config.vocab_size
        self.context: Context | None = None  # `parallelize` sets it if ranks share a micro-batch
        self.part: TextPart | None = None  # `build_on_meta` sets it if this is the text part of a larger model
        self.is_packed = True  # False: each document has its own forward (`one_document_at_a_time`)
        self.boundaries = mixers.split_documents(causal_lm)
        modules = [(name, module) for name, module in causal_lm.named_modules() if isinstance(module, nn.Embedding)]
        self._by_token = [m for name, m in modules if m is self.embedding or "embed_tokens" in name]
        lend_weight(self.head, head_settings(causal_lm.config, self.num_tokens))

    @property
    def embedding(self) -> nn.Embedding:
        """The input embedding, weight `(vocabulary, hidden_size)`."""
        return cast(nn.Embedding, self.causal_lm.get_input_embeddings())

    @property
    def head(self) -> nn.Linear:
        """The output projection, weight `(vocabulary, hidden_size)`; the embedding's own weight if they are tied."""
        return cast(nn.Linear, self.causal_lm.get_output_embeddings())

    @property
    def _base(self) -> nn.Module:
        """The model without its head. Llama 4 names it otherwise than its `base_model_prefix` says."""
        base = self.causal_lm.base_model
        return base if base is not self.causal_lm else self.causal_lm.model

    @property
    def stored_form(self) -> StoredForm:
        """The names and forms in which files store the model's tensors."""
        return StoredForm(self.part.whole, self.part.name) if self.part else StoredForm(self.causal_lm)

    def one_document_at_a_time(self) -> None:
        """Let transformers compute each document by itself, with its own attention: for models that cannot be packed."""
        self.is_packed = False
        choose_attention(self.causal_lm)

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Return the hidden states that predict the targets, `(targets, hidden_size)`: the input of `model.loss.chunked`.

        Every rank must call this if the model is sharded. Without packing the ranks first agree on the number of forwards,
        because each forward gathers the layers' weights.
        """
        with _each_token_once(self._by_token):
            hidden = self._packed(batch) if self.is_packed else self._alone(batch)
        return hidden[0, batch.target_positions]

    def _packed(self, batch: MicroBatch) -> torch.Tensor:
        lengths = batch.document_lengths
        self.boundaries.lengths = lengths
        return self._base(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            documents=packed_attention.DocumentLengths(lengths, batch.cu_seq_lens, context=self.context),
        ).last_hidden_state

    def _alone(self, batch: MicroBatch) -> torch.Tensor:
        documents = list(batch.input_ids.split(batch.document_lengths, dim=1))
        if isinstance(self, FSDPModule) and dist.get_world_size() > 1:
            forwards = torch.tensor(len(documents), device="cpu")  # so that no rank waits for its GPU
            dist.all_reduce(forwards, dist.ReduceOp.MAX)
            # No target is predicted from the states of these documents, so their gradients are zero.
            documents += [documents[0][:, :2]] * (int(forwards) - len(documents))
        states = [self._base(input_ids=ids, use_cache=False).last_hidden_state for ids in documents]
        return torch.cat(states, dim=1)

    def extra_fsdp_units(self) -> list[nn.Module]:
        """Return [embedding, head] to shard separately before the root, or [] if they are tied and must stay in one unit.

        Separate units are gathered, and their gradients reduced, one after the other.
        """
        return [] if self.embedding.weight is self.head.weight else [self.embedding, self.head]

    def vocabulary_weights(self) -> list[torch.Tensor]:
        """Return the weights with one row per token: embedding and head, or their shared weight."""
        embedding, head = self.embedding.weight, self.head.weight
        return [embedding] if embedding is head else [embedding, head]


def build_on_meta(config: PretrainedConfig) -> PackedLanguageModel:
    """Build the model with fp32 parameters on `meta` (shapes without memory), tied if its config ties them.

    If config.json has `make_vocab_size_divisible_by` (model/vocabulary.py), embedding and head are padded to a multiple of it,
    so that their rows divide over the ranks. Rows of padding stay zero, because no softmax includes them.
    """
    multiple = getattr(config, "make_vocab_size_divisible_by", None) or 1
    padded = copy.deepcopy(config)
    padded.vocab_size = -(-config.vocab_size // multiple) * multiple
    # Named explicitly, because transformers' default may be a slow loop over experts. Some types have no choice of one of the two.
    chosen = {"attn_implementation": packed_attention.NAME}
    chosen |= {"experts_implementation": "grouped_mm"} if has_experts(config) else {}
    with torch.device("meta"):
        for names in (tuple(chosen), tuple(chosen)[:1], ()):
            with suppress(ValueError, KeyError) if names else nullcontext():
                options = {name: chosen[name] for name in names}
                causal_lm = AutoModelForCausalLM.from_config(copy.deepcopy(padded), dtype=torch.float32, **options)
                break
    fix_frequencies(causal_lm)
    head = causal_lm.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        has = "has a bias in its head" if isinstance(head, nn.Linear) else "has no head that is a matrix"
        raise UserError(f"model type {config.model_type} {has}, which the chunked loss cannot compute")
    model = PackedLanguageModel(causal_lm, config.vocab_size)
    model.part = TextPart(causal_lm, config.whole) if is_part(config) else None
    return model


def choose_attention(causal_lm: PreTrainedModel) -> None:
    """Let transformers compute attention with torch's kernels, or by plain products if the type has no other."""
    for name in ("sdpa", "eager"):
        with suppress(ValueError):  # some types only log that they have no choice
            causal_lm.set_attn_implementation(name)
        if causal_lm.config._attn_implementation == name:
            return
    causal_lm.config._attn_implementation = "eager"


@contextmanager
def _each_token_once(embeddings: Sequence[nn.Module]) -> Iterator[None]:
    """Look up each distinct token once on a CPU, inside the block. The token's occurrences copy an fp32 row.

    A CPU adds the gradients of a token's occurrences one by one, and in bf16 such a sum stops growing once an addend is smaller
    than its last bit (docs/LOG.md).
    """
    inverse: dict[nn.Module, torch.Tensor] = {}

    def find_distinct(embedding: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
        if inputs[0].device.type != "cpu":
            return None
        distinct, inverse[embedding] = inputs[0].unique(return_inverse=True)
        return (distinct[None],)

    def copy_rows(embedding: nn.Module, _: object, rows: torch.Tensor) -> torch.Tensor:
        if embedding not in inverse:
            return rows
        exact = rows[0].to(torch.promote_types(rows.dtype, torch.float32))
        return F.embedding(inverse.pop(embedding), exact).to(rows.dtype)

    hooks = [embedding.register_forward_pre_hook(find_distinct) for embedding in embeddings]
    hooks += [embedding.register_forward_hook(copy_rows) for embedding in embeddings]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def load_weights(model: PackedLanguageModel, path: str, device: torch.device) -> None:
    """Materialize the (sharded) meta model on `device`, then read this rank's own slices from the safetensors files.

    Raises UserError as `check_weights` does.
    """
    check_weights(model, path)
    materialize(model, device)
    read_weights(model, path)


def materialize(model: PackedLanguageModel, device: torch.device, compute_device: torch.device | None = None) -> None:
    """Allocate the (sharded) meta model on `device` with arbitrary values. A checkpoint or `read_weights` fills them in.

    Tied parameters stay tied, and rows of padding are zero. A parameter with rows of padding gets the attribute `unpadded_rows`,
    at which the export cuts it off. Buffers are computed on `compute_device`, on which forward runs (under CPU offload it is not
    `device`).
    """
    model.to_empty(device=device)
    model.causal_lm.tie_weights()  # to_empty splits a tied weight into two tensors (verl#7834)
    for parameter in model.parameters():
        rows = stored_shape(model, parameter)[:1]
        if rows and rows[0] < parameter.shape[0]:
            parameter.unpadded_rows = rows[0]  # pyright: ignore[reportAttributeAccessIssue]
            local, _, start = local_shard(parameter)
            local[max(0, rows[0] - start) :] = 0
    _recompute_buffers(model, compute_device or device)


def read_weights(model: PackedLanguageModel, path: str) -> None:
    """Read this rank's own slices of all parameters of a materialized model, without rows of padding, and all persistent buffers."""
    sources, trained = check_weights(model, path), trained_parameters(model)
    for name, tensor in tensors_in_files(model).items():
        local, dimension, start = local_shard(tensor)
        sources[name].read_into(local, dimension, start)
        if (rows := trained.get(new_rows_of(name))) is not None:
            local, dimension, start = local_shard(rows)
            sources[name].read_into(local, dimension, start + model.num_tokens - len(rows))


def check_weights(model: PackedLanguageModel, path: str) -> dict[str, StoredParts]:
    """Return the source of each parameter and persistent buffer by name, checked without reading any weight.

    The model may still be on meta, so a user's mistake ends in one sentence before a process group starts. Raises UserError if a
    file is damaged (`stored_tensors`), or if a tensor is missing, has another shape or is quantised in a format that cannot be read.
    """
    stored, shapes, parameters = dequantized(stored_tensors(path), path), stored_shapes(model), parameter_names(model)
    sources, _ = _find_sources(model, stored)
    if model.part:
        _check_other_parts(model, stored, path)
    for name, shape in shapes.items():
        if name not in sources or not sources[name].has_shape(shape):
            form = model.stored_form
            group = next(group for group in form.groups(shapes) if name in group)
            expected = form({part: torch.empty(shapes[part], device="meta") for part in group})
            if missing := sorted(expected.keys() - stored.keys(), key=dot_natural_key):
                raise UserError(f"{path} has no tensor {missing[0]}; the files do not match its config.json")
            sources[name].check_shape(shape)
        for tensor in sources[name].tensors:
            if tensor.dtype not in TRAINABLE and name in parameters:
                raise UserError(
                    f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}, and quantised weights cannot be trained; use "
                    f"the model's original weights ({', '.join(TRAINABLE)})"
                )
    return sources


def _check_other_parts(model: PackedLanguageModel, stored: dict[str, StoredTensor], path: str) -> None:
    """Raise UserError if a tensor of a part that is not trained is missing or has another shape."""
    assert model.part
    tensors = model.part.whole.state_dict()
    found, _ = find_sources(model.part.whole, tensors.keys(), stored)
    own = {model.part.name(name) for name, _ in model.causal_lm.named_parameters(remove_duplicate=False)}
    for name in tensors.keys() - own - {model.part.name(name) for name in persistent_buffers(model.causal_lm)}:
        if name not in found:
            raise UserError(f"{path} has no tensor {name}; the files do not match its config.json")
        found[name].check_shape(tuple(tensors[name].shape))


def untrained_tensors(model: PackedLanguageModel, path: str | Path, with_ignored: bool) -> dict[str, StoredTensor]:
    """Return the tensors in files that an export copies, by name: all other parts of a whole model.

    with_ignored: also those that transformers does not load, such as the layers of multi-token prediction.
    """
    stored = dequantized(stored_tensors(path), path)
    sources, ignored = _find_sources(model, stored)
    taken = {tensor.name for source in sources.values() for tensor in source.tensors} | ignored.keys()
    parts = {name: tensor for name, tensor in stored.items() if model.part and name not in taken}
    return parts | (ignored if with_ignored else {})


def _find_sources(
    model: PackedLanguageModel, stored: dict[str, StoredTensor]
) -> tuple[dict[str, StoredParts], dict[str, StoredTensor]]:
    """Return the results of `find_sources`. A tied parameter may be stored under any of its names."""
    aliases = {name: [name] for name in tensors_in_files(model)}
    names = {parameter: name for name, parameter in parameter_names(model).items()}
    for name, parameter in model.causal_lm.named_parameters(remove_duplicate=False):
        if parameter in names:
            aliases[names[parameter]].append(name.replace(".base_layer.", "."))
    if part := model.part:
        aliases = {name: [part.name(alias) for alias in group] for name, group in aliases.items()}
        found, ignored = find_sources(part.whole, part.whole.state_dict().keys(), stored)
    else:
        found, ignored = find_sources(model.causal_lm, {alias for group in aliases.values() for alias in group}, stored)
    return {name: found[alias] for name, group in aliases.items() for alias in group[::-1] if alias in found}, ignored


def stored_form(config: PretrainedConfig) -> StoredForm:
    """Return the names and forms in which files store the tensors of a model with this configuration."""
    return build_on_meta(config).stored_form


def load_for_evaluation(
    config: PretrainedConfig, path: str, dtype: torch.dtype, device: torch.device
) -> PackedLanguageModel:
    """Load the whole, unsharded model of a directory in `dtype` and in eval mode. `config` may have another RoPE than the files."""
    from model.proof import prove

    model = build_on_meta(config).to(dtype)
    if not prove(config, device).packed:
        model.one_document_at_a_time()
    load_weights(model, path, device)
    return model.eval()


def whole_copy(
    config: PretrainedConfig,
    parameters: dict[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    merge: Merge = lambda name, value: value,
) -> PreTrainedModel:
    """Copy the parameters into a plain transformers model for generation, whole on every rank, in eval mode. A collective.

    `parameters` are the `tensors_in_files` of a model built from `config` and may be sharded; rows of padding are cut off. Each is
    cast before it is gathered, so the ranks send `dtype`, and at most one whole parameter exists beside the copy.
    `merge` is the result of `merged`. The copy takes `dtype.itemsize` bytes per parameter until its last reference is gone.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        causal_lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    packed = PackedLanguageModel(causal_lm)  # for `materialize`
    del packed.head.forward  # the copy returns logits, not losses
    materialize(packed, device)
    with torch.no_grad():
        for name, target in tensors_in_files(packed).items():
            value = merge(name, whole(parameters[name].to(target.dtype)))
            target.copy_(value[: target.shape[0]] if target.dim() else value)
    return causal_lm.eval()


def merged(model: PackedLanguageModel) -> Merge:
    """Return a function (name, whole weight) -> the weight with LoRA's adapter merged (model/lora.py). Its calls are collectives.

    It adds `alpha / rank * B @ A` in fp32, or replaces the rows of new tokens by the trained rows.
    """
    layers = {f"{name}.weight": layer for name, layer in model.causal_lm.named_modules() if hasattr(layer, "lora_A")}
    trained = trained_parameters(model)

    def merge(name: str, value: torch.Tensor) -> torch.Tensor:
        if (new := new_rows_of(name)) in trained:
            rows = whole(trained[new]).to(value.device)
            first = model.num_tokens - len(rows)
            return torch.cat([value[:first].float(), rows.float(), value[model.num_tokens :].float()])
        if name not in layers:
            return value
        layer: Any = layers[name]  # peft's wrapper of the matrix
        a, b = (whole(side[ADAPTER].weight).float() for side in (layer.lora_A, layer.lora_B))
        return value.float() + (b @ a * layer.scaling[ADAPTER]).to(value.device)

    return merge


def new_rows_of(name: str) -> str:
    """Return the name of the parameter with the trained rows of new tokens, given the name of the frozen embedding or head."""
    return name.removesuffix("weight") + NEW_ROWS


def num_parameters(model: nn.Module) -> int:
    """Count the parameters of the whole model on all ranks, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_trained(model: nn.Module) -> int:
    """Count the trained parameters of the whole model on all ranks, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def num_base_parameters(model: PackedLanguageModel) -> int:
    """Count the parameters of the base model on all ranks, tied ones once, without LoRA's adapters."""
    return sum(parameter.numel() for parameter in parameter_names(model).values())


def parameter_names(model: PackedLanguageModel) -> dict[str, nn.Parameter]:
    """Return Hugging Face name -> parameter, tied ones once, without LoRA's adapters. Checkpoints and exports use these names."""
    named = model.causal_lm.named_parameters()
    names = {name.replace(".base_layer.", "."): parameter for name, parameter in named if ".lora_" not in name}
    return {name: parameter for name, parameter in names.items() if not name.endswith(NEW_ROWS)}


def trained_parameters(model: PackedLanguageModel) -> dict[str, nn.Parameter]:
    """Return name -> parameter of the trained parameters: usually all of `parameter_names`, with LoRA the adapters."""
    return {name: parameter for name, parameter in model.causal_lm.named_parameters() if parameter.requires_grad}


def tensors_in_files(model: PackedLanguageModel) -> dict[str, torch.Tensor]:
    """Return Hugging Face name -> tensor of all that files store: `parameter_names` and `persistent_buffers`."""
    return {**parameter_names(model), **persistent_buffers(model.causal_lm)}


def persistent_buffers(causal_lm: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return Hugging Face name -> buffer of the buffers that files store, such as the balancing biases of routers."""
    return {
        f"{prefix}.{name}".lstrip("."): buffer
        for prefix, module in causal_lm.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


class PersistentBuffers:
    """The persistent buffers of a model, for `checkpointer.register`."""

    def __init__(self, causal_lm: PreTrainedModel) -> None:
        """Save and load the buffers of `causal_lm`."""
        self.causal_lm = causal_lm

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the buffers by name."""
        return persistent_buffers(self.causal_lm)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Copy the buffers of a checkpoint into the model."""
        for name, buffer in persistent_buffers(self.causal_lm).items():
            buffer.copy_(state[name])


def vocabulary_names(model: PackedLanguageModel) -> frozenset[str]:
    """Return the names of the parameters with one row per token."""
    weights = model.vocabulary_weights()
    return frozenset(name for name, p in parameter_names(model).items() if any(p is weight for weight in weights))


def stored_shapes(model: PackedLanguageModel) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of all tensors in files, without rows of padding."""
    return {name: stored_shape(model, tensor) for name, tensor in tensors_in_files(model).items()}


def stored_shape(model: PackedLanguageModel, parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a parameter without rows of padding."""
    shape = tuple(parameter.shape)
    if any(parameter is weight for weight in model.vocabulary_weights()):
        return (min(shape[0], model.num_tokens), *shape[1:])
    return shape


def _recompute_buffers(model: PackedLanguageModel, device: torch.device) -> None:
    """Compute each buffer in fp32 on `device` by transformers' own initialisation, because `to_empty` leaves garbage in it.

    transformers does the same after it has built a model on meta.
    """
    for module in model.causal_lm.modules():
        # Without buffers there is nothing to compute, and HY V4 would fill a sharded parameter. False: or a second call does nothing.
        module._is_hf_initialized = next(module.buffers(), None) is None  # pyright: ignore[reportArgumentType]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = torch.empty_like(buffer, dtype=dtype, device=device)
    for parameter in model.causal_lm.parameters():
        parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
    with torch.random.fork_rng(devices=[]):
        model.causal_lm.initialize_weights()
