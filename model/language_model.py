"""The pretrained model as it is trained: built on `meta`, filled slice by slice, returning the sum of losses.

Order (DESIGN): build on meta -> activation checkpointing -> shard -> materialise -> load each rank's own slices ->
recompute `inv_freq` in fp32. Anything that changes shapes comes before sharding.
"""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from common.errors import UserError, run_hint
from distributed.sharding import local_shard
from model import packed_attention
from model.label_sampling import Draw
from model.loss import LossBySource, cross_entropy_sum, visit_logits
from model.rope import check_isolates, fix_frequencies, scaled_config

# Dense text decoders whose loss and every gradient equal those of transformers' eager attention, document by document:
# tests/model/test_equivalence.py runs over exactly these.
SUPPORTED = (
    "arcee",
    "cohere",
    "cohere2",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "granite",
    "helium",
    "hunyuan_v1_dense",
    "llama",
    "ministral",
    "mistral",
    "nanochat",
    "olmo",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "starcoder2",
)


class Batch(Protocol):
    """What the model reads of a micro-batch (data.batches.MicroBatch: model and data do not know each other)."""

    input_ids: torch.Tensor  # (1, tokens)
    position_ids: torch.Tensor  # (1, tokens), from 0 in each document
    document_lengths: tuple[int, ...]
    cu_seq_lens: torch.Tensor  # int32 (documents + 1)
    target_positions: torch.Tensor  # (targets,): where the predicting states are
    target_ids: torch.Tensor  # (targets,)
    target_sources: torch.Tensor | None  # (targets,): the source of each, where losses are told apart by it


class PackedLanguageModel(nn.Module):
    """A causal language model over packed documents. FSDP's root, so that embedding and head are gathered in forward."""

    def __init__(self, causal_lm: PreTrainedModel, num_tokens: int | None = None) -> None:
        """num_tokens: rows of embedding and head that are tokens; what follows them is padding. None: all."""
        super().__init__()
        self.causal_lm = causal_lm
        self.num_tokens = num_tokens or causal_lm.config.vocab_size
        head = causal_lm.get_output_embeddings()
        scale, softcap = head_settings(causal_lm.config)
        # The loss is what the head's forward returns, since a head that is an FSDP unit of its own has its weight
        # gathered in that forward and nowhere else.
        head.forward = functools.partial(_head_loss, head, scale=scale, softcap=softcap, num_tokens=self.num_tokens)

    def forward(
        self,
        batch: Batch,
        by_source: LossBySource | None = None,
        visit: Callable[[torch.Tensor, int], None] | None = None,
        draw: Draw | None = None,
    ) -> torch.Tensor:
        """The sum of the losses of the micro-batch's target tokens, fp32 scalar, in nats; see LossBySource.

        visit: for evaluation; it is called with the logits instead (model.loss.visit_logits), and what returns is 0.
        draw: for the Fisher diagonal; signs of losses, or labels sampled from the model in place of the data's.
        """
        hidden = self.hidden_states(batch)[0, batch.target_positions]
        if visit is not None:
            return self.causal_lm.get_output_embeddings()(hidden, batch.target_ids, visit=visit)
        if by_source is not None:
            by_source = LossBySource(by_source.sums, batch.target_sources)
        return self.causal_lm.get_output_embeddings()(hidden, batch.target_ids, by_source=by_source, draw=draw)

    def own_units(self) -> list[nn.Module]:
        """What to shard by itself before the root: embedding and head, unless they are tied and so must stay together.

        As units of their own the two are gathered, and their gradients reduced, one after the other.
        """
        embedding, head = self.causal_lm.get_input_embeddings(), self.causal_lm.get_output_embeddings()
        return [] if embedding.weight is head.weight else [embedding, head]

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """What the head reads, `(1, tokens, hidden_size)`."""
        return self.causal_lm.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            documents=packed_attention.DocumentLengths(batch.document_lengths, batch.cu_seq_lens),
        ).last_hidden_state


def read_model_config(
    path: str, rope_type: str | None = None, rope_factor: float | None = None, rope_original_length: int | None = None
) -> PretrainedConfig:
    """The model's configuration, its RoPE scaled where a type is given (`model.rope.scaled_config`).

    Raises UserError where there is none, where it does not take the scaling, or where it cannot be trained truly.
    """
    if not Path(path).is_dir():
        raise UserError(
            f"model.path={path} is not a folder; python scripts/fetch_base_model.py ORGANISATION/NAME brings a model to "
            "artifacts/models/NAME"
        )
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} holds no model configuration: {str(error).splitlines()[0].rstrip('.')}{run_hint(path)}"
        ) from error
    if config.model_type in SUPPORTED:  # others may have no RoPE at all
        config = scaled_config(config, rope_type, rope_factor, rope_original_length)
    check_supported(config)
    return config


def check_supported(config: PretrainedConfig) -> None:
    """Refuse by name, in a UserError, what packed training would compute wrongly and what has not been checked."""
    kind = config.model_type
    if kind not in SUPPORTED:
        reason = _why_not(config)
        raise UserError(
            f"model type {kind} {reason}: packed training is for dense text decoders, checked for {', '.join(SUPPORTED)}"
        )
    settings = config.to_dict()
    dropout = [
        k for k, v in settings.items() if ("dropout" in k or k.endswith("pdrop")) and v and k != "classifier_dropout"
    ]
    if dropout:
        raise UserError(
            f"the {kind} model has dropout, which packed training does not; set {' and '.join(dropout)} to 0.0 in its "
            "config.json"
        )
    other_layers = set(settings.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    needs = [
        name
        for name, present in {
            "a bias in the head": settings.get("lm_head_bias"),
            "attention to later tokens (use_bidirectional_attention)": settings.get("use_bidirectional_attention"),
            f"layers of type {', '.join(sorted(other_layers))}": other_layers,
            "quantised weights (quantization_config)": settings.get("quantization_config"),
        }.items()
        if present
    ]
    if needs:
        raise UserError(f"the {kind} model needs {' and '.join(needs)}, which packed training does not support")
    check_isolates(config)


def _why_not(config: PretrainedConfig) -> str:
    """What stands against a model type, from the settings that betray it."""
    names = set(config.to_dict())
    for words, signs in {
        "is an encoder-decoder": names & {"is_encoder_decoder"} and config.is_encoder_decoder,
        "has more than text (vision or audio)": names & {"vision_config", "audio_config"},
        "is a mixture of experts": any("expert" in name for name in names),
        "has state-space, recurrent or convolution layers": any(
            word in name
            for name in names
            for word in ("mamba", "ssm", "state_size", "conv", "linear_num", "lru", "xlstm")
        ),
    }.items():
        if signs:
            return words
    return "has not been checked"


def head_settings(config: PretrainedConfig) -> tuple[float, float | None]:
    """(scale, softcap) of the logits, as `model.loss.logits` takes them; (1.0, None) for a plain head."""
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    return scale, getattr(config, "final_logit_softcapping", None)  # Gemma 2


def _head_loss(
    head: nn.Module,
    hidden: torch.Tensor,
    target_ids: torch.Tensor,
    scale: float,
    softcap: float | None,
    num_tokens: int,
    by_source: LossBySource | None = None,
    visit: Callable[[torch.Tensor, int], None] | None = None,
    draw: Draw | None = None,
) -> torch.Tensor:
    """The head's forward: the sum of losses instead of logits. The weight is read here, where FSDP has gathered it."""
    tokens = head.weight[:num_tokens]  # without padding
    if visit is not None:
        return visit_logits(hidden, tokens, visit, scale, softcap)
    weights = None
    if draw is not None:
        target_ids, weights = draw.labels(hidden, tokens, target_ids, scale, softcap), draw.signs
    return cross_entropy_sum(
        hidden, head.weight, target_ids, scale, softcap, by_source=by_source, weights=weights, num_tokens=num_tokens
    )


def build_on_meta(config: PretrainedConfig) -> PackedLanguageModel:
    """The model with fp32 parameters that have shapes but no memory yet, tied where its config ties them.

    Where config.json names a multiple (`make_vocab_size_divisible_by`: model/vocabulary/rows.py) embedding and head are padded
    to it, so that their rows divide over the ranks. Rows of padding are zero and stay so: no softmax sees them.
    """
    multiple = getattr(config, "make_vocab_size_divisible_by", None) or 1
    padded = copy.deepcopy(config)
    padded.vocab_size = -(-config.vocab_size // multiple) * multiple
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(
            padded, attn_implementation=packed_attention.NAME, dtype=torch.float32
        )
    fix_frequencies(causal_lm)
    return PackedLanguageModel(causal_lm, config.vocab_size)


def load_weights(
    model: PackedLanguageModel, path: str, device: torch.device, compute_device: torch.device | None = None
) -> None:
    """Give the (sharded) meta model memory on `device` and read this rank's own slices from the safetensors files.

    compute_device: where forward runs and buffers live; another one under CPU offload. Raises UserError where a tensor is
    missing or has another shape. A parameter with rows of padding gets `unpadded_rows`, by which the export leaves them out.
    """
    model.to_empty(device=device)
    model.causal_lm.tie_weights()  # to_empty makes two tensors of a tied one (verl#7834)
    files = tensor_files(Path(path))
    names = {id(p): name for name, p in reversed(list(model.causal_lm.named_parameters(remove_duplicate=False)))}
    of_tokens = [model.causal_lm.get_input_embeddings().weight, model.causal_lm.get_output_embeddings().weight]
    with torch.no_grad():
        for parameter in model.parameters():
            name = _stored_name(names[id(parameter)], parameter, model.causal_lm, files, path)
            with safe_open(files[name], framework="pt") as tensors:
                stored = tensors.get_slice(name)
                shape = tuple(parameter.shape)
                if any(parameter is weight for weight in of_tokens) and shape[0] > model.num_tokens:
                    parameter.unpadded_rows = model.num_tokens
                    shape = (model.num_tokens, *shape[1:])
                if tuple(stored.get_shape()) != shape:
                    raise UserError(
                        f"{files[name]}: {name} has shape {tuple(stored.get_shape())}, config.json wants {shape}"
                    )
                local, start = local_shard(parameter)
                if local.dim():
                    rows = max(0, min(local.shape[0], shape[0] - start))  # of this rank's, those that are no padding
                    if rows:
                        local[:rows].copy_(stored[start : start + rows])
                    local[rows:] = 0
                elif local.numel():
                    local.copy_(stored[...])
    _recompute_buffers(model, compute_device or device)


def num_parameters(model: nn.Module) -> int:
    """Parameters of the whole model, tied ones once, whatever this rank holds of them."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_names(model: PackedLanguageModel) -> dict[str, nn.Parameter]:
    """Hugging Face name -> parameter, tied ones once: the names of checkpoints and exports."""
    return dict(model.causal_lm.named_parameters())


def tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return {name: path / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = path / "model.safetensors"
    if not single.is_file():
        raise UserError(f"{path} holds neither model.safetensors nor model.safetensors.index.json")
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _stored_name(name: str, parameter: nn.Parameter, causal_lm: nn.Module, files: dict, path: str) -> str:
    """The name the file uses for a parameter: its own, or that of a tensor tied to it."""
    if name in files:
        return name
    for other, candidate in causal_lm.named_parameters(remove_duplicate=False):
        if candidate is parameter and other in files:
            return other
    raise UserError(f"{path} holds no tensor {name}; the files do not fit its config.json")


def _recompute_buffers(model: PackedLanguageModel, device: torch.device) -> None:
    """Buffers hold garbage after meta and no file stores them: compute each anew from the model's config, in fp32."""
    for name, module in model.causal_lm.named_modules():
        for buffer in [b for b, value in module._buffers.items() if value is not None]:
            if hasattr(module, "config") and "RotaryEmbedding" in type(module).__name__:
                value = type(module)(config=module.config)._buffers[buffer]
            elif buffer == "embed_scale":  # Gemma's embedding is multiplied by sqrt(hidden_size)
                value = torch.tensor(module.scalar_embed_scale)
            else:
                raise UserError(f"{name} ({type(module).__name__}) has a buffer {buffer}, which is not supported")
            module._buffers[buffer] = value.to(device)
