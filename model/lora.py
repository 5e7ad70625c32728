"""LoRA (arXiv:2106.09685) in the same loop: frozen matrices, each with a trained product `alpha / rank * B @ A` beside it.

The layers are those of peft (`peft.tuners.lora.Linear`), put into the model while it is on `meta`, so sharding, checkpoints
and the loss work as for any other parameters. peft is imported only if `lora.rank` is set. docs/results.md says what is frozen
in which dtype and how the learning rate is chosen.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from common.dtypes import DTYPES
from common.durable_files import publish, start_directory
from common.errors import UserError
from common.lean_imports import hidden
from common.random_bits import hash64, hash64_tensor
from configs.config import Config, LoRA
from distributed.optimizer import parameter_dtype
from distributed.process_group import Ranks, read_on_first
from distributed.sharding import flat_shard
from model.language_model import PackedLanguageModel, build_on_meta, trained_parameters
from model.vocabulary.rows import first_new_row

ALL_LINEAR = "all-linear"
ADAPTER = "default"  # peft's name of a model's only adapter, which is part of the parameters' names
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as peft names them
_PREFIX = "base_model.model."  # of a parameter's name in peft's files


def build_to_train(config: Config, model_config: PretrainedConfig) -> PackedLanguageModel:
    """The model of a run on `meta`: its trained parameters in the dtype of `optimizer.memory`; with LoRA, adapters are in it.

    Frozen weights have `model.compute_dtype`: forward reads them in it anyway, and no update is ever added to them. Raises
    UserError for LoRA that cannot be made.
    """
    model = build_on_meta(model_config)
    if not config.lora.rank:
        return model.to(parameter_dtype(config.optimizer.memory))
    if first_new_row(config.model.path) is not None:
        raise UserError(
            f"lora.rank={config.lora.rank}: {config.model.path} has new tokens, whose rows of embedding and head LoRA would "
            "leave untrained; set lora.rank=0, or model.path to the base model without new tokens"
        )
    add_adapters(model.causal_lm, config.lora, config.model.path)
    model.to(DTYPES[config.model.compute_dtype])
    for layer in adapter_layers(model).values():
        layer.lora_A.to(parameter_dtype(config.optimizer.memory))
        layer.lora_B.to(parameter_dtype(config.optimizer.memory))
    return model


def add_adapters(causal_lm: PreTrainedModel, settings: LoRA, path: str) -> None:
    """Freeze all parameters and put adapters beside the matrices of `settings.targets`, in place.

    The model may be on `meta`; otherwise `init_adapters` follows. path: of the base model, for peft's own records. Raises
    UserError if peft is missing, or if a target is not the name of a matrix inside the layers.
    """
    targets = targets_of(causal_lm, settings.targets)
    try:
        with hidden("torchao"):  # peft imports it for quantised models
            from peft import inject_adapter_in_model

            inject_adapter_in_model(_peft_config(settings, targets, path), causal_lm)
    except ImportError as error:
        raise UserError(f"lora.rank={settings.rank} needs peft ({error}): pip install peft") from error
    for name, parameter in causal_lm.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def targets_of(causal_lm: PreTrainedModel, targets: str) -> list[str]:
    """The names of the modules that get an adapter, such as `q_proj`, sorted. Raises UserError for an unknown name.

    `all-linear` means every matrix but the head, as in peft.
    """
    linear = {
        name.rpartition(".")[2]
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear) and module is not causal_lm.get_output_embeddings()
    }
    wanted = linear if targets == ALL_LINEAR else {name.strip() for name in targets.split(",")}
    for name in sorted(wanted - linear):
        raise UserError(
            f"lora.targets: the model has no matrix {name!r} in its layers; it has {', '.join(sorted(linear))}"
        )
    return sorted(wanted)


def _peft_config(settings: LoRA, targets: list[str], path: str) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=path,
        r=settings.rank,
        lora_alpha=settings.effective_alpha,  # pyright: ignore[reportArgumentType]  # peft divides it, whatever it is
        lora_dropout=settings.dropout,
        target_modules=targets,
        bias="none",
    )


def init_adapters(parameters: dict[str, nn.Parameter], seed: int) -> None:
    """Draw A and set B to zero, in place, so that the model is the base model. No-op for parameters that are no adapters.

    A is uniform in +-1 / sqrt(columns), which is peft's Kaiming initialisation. Each element is a function of the seed, the
    parameter's name and the element's place, so it is the same for any number of ranks and any sharding.
    """
    for name, parameter in parameters.items():
        if ".lora_" not in name:
            continue
        flat, first = flat_shard(parameter)
        if ".lora_B." in name or not flat.numel():
            flat.zero_()
            continue
        stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        places = torch.arange(first, first + flat.numel(), device=flat.device)
        bits = hash64_tensor(hash64(seed, stream), places) >> 40 & 0xFFFFFF  # 24 bits: what fp32 holds exactly
        bound = parameter.shape[1] ** -0.5
        flat.copy_(((bits + 0.5) * (2**-23) - 1.0) * bound)


def adapter_layers(model: PackedLanguageModel) -> dict[str, Any]:
    """Hugging Face name of a matrix's weight -> peft's layer around the matrix."""
    return {f"{name}.weight": layer for name, layer in model.causal_lm.named_modules() if hasattr(layer, "lora_A")}


def adapters_sum(model: PackedLanguageModel) -> Callable[[str], torch.Tensor | None]:
    """A function of a weight's name: what its adapter adds to it, `alpha / rank * B @ A`, whole, fp32; None without one.

    Each call is a collective.
    """
    layers = adapter_layers(model)

    def product(name: str) -> torch.Tensor | None:
        if name not in layers:
            return None
        a, b = (_whole(side[ADAPTER].weight).float() for side in (layers[name].lora_A, layers[name].lora_B))
        return b @ a * layers[name].scaling[ADAPTER]

    return product


def save_adapter(directory: Path, model: PackedLanguageModel, settings: LoRA, path: str, ranks: Ranks) -> None:
    """Write `directory` as peft's `PeftModel.from_pretrained` reads it, replacing an older one. A collective.

    Raises UserError on all ranks if it cannot be written.
    """
    temporary = read_on_first(lambda: start_directory(directory), ranks)
    tensors = {}
    for name, parameter in trained_parameters(model).items():
        whole = _whole(parameter)
        if ranks.rank == 0:
            tensors[_PREFIX + name.replace(f".{ADAPTER}.", ".")] = whole.cpu().contiguous()

    def write() -> None:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        content = _peft_config(
            settings, sorted({name.split(".")[-2] for name in adapter_layers(model)}), path
        ).to_dict()
        content["inference_mode"] = True
        text = json.dumps(content, indent=1, default=_plain)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")
        publish(directory)

    read_on_first(write, ranks)


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _plain(value: Any) -> Any:
    """peft keeps sets and enumerations, which JSON has not."""
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))
