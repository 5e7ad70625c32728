"""A model as the planner sees it: the shapes of its parameters, unit by unit, without any weights."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, PretrainedConfig

from common.errors import UserError
from configs.config import Config
from distributed.sharding import decoder_layers
from model.flops import Work, count_work
from model.language_model import PackedLanguageModel, build_on_meta
from model.lora import build_to_train

# Shapes by name, for a plan before any model has been chosen. Sources: the config.json of each model.
# name -> (hidden, intermediate, layers, heads, key-value heads, vocabulary, tied)
SHAPES = {
    "135M": (576, 1536, 30, 9, 3, 49152, True),  # SmolLM2-135M
    "1B": (2048, 8192, 16, 32, 8, 128256, True),  # Llama 3.2 1B
    "3B": (3072, 8192, 28, 24, 8, 128256, True),  # Llama 3.2 3B
    "7B": (4096, 11008, 32, 32, 32, 32000, False),  # Llama 2 7B
    "8B": (4096, 14336, 32, 32, 8, 128256, False),  # Llama 3.1 8B
    "13B": (5120, 13824, 40, 40, 40, 32000, False),  # Llama 2 13B
    "70B": (8192, 28672, 80, 64, 8, 128256, False),  # Llama 3.1 70B
}


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers together. shapes: of each parameter; trained: of those that are not frozen."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    trained: tuple[tuple[int, ...], ...]

    @property
    def num_parameters(self) -> int:
        """Number of elements."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def num_trained(self) -> int:
        """Number of elements that have gradients and moments."""
        return sum(torch.Size(shape).numel() for shape in self.trained)


@dataclass(frozen=True)
class ModelShape:
    """What memory and time depend on. Tied parameters count once."""

    name: str
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
    def num_parameters(self) -> int:
        """Number of parameters of the whole model."""
        return sum(unit.num_parameters for unit in self.units)

    @property
    def num_trained(self) -> int:
        """Number of parameters that have gradients and moments: all, or those of LoRA's adapters."""
        return sum(unit.num_trained for unit in self.units)

    @property
    def num_exported(self) -> int:
        """Number of parameters of the model that is exported, in which adapters are merged."""
        frozen = self.num_parameters - self.num_trained
        return frozen or self.num_parameters

    @property
    def adapter_outputs(self) -> int:
        """Elements per token that LoRA's adapters add to the outputs of matrices, in all layers."""
        if not self.frozen_itemsize:
            return 0
        return sum(rows for unit in self.layers for rows, _ in unit.trained[1::2])  # B; A comes before it


def named_config(name: str) -> PretrainedConfig:
    """The configuration of one of `SHAPES`. Raises UserError for another name."""
    if name not in SHAPES:
        raise UserError(f"{name} is neither a model directory nor one of {', '.join(SHAPES)}")
    return llama_config(SHAPES[name])


def llama_config(numbers: tuple[int, int, int, int, int, int, bool]) -> PretrainedConfig:
    """A Llama with the numbers of a row of `SHAPES`."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = numbers
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
    )


def shape_of(name: str, config: PretrainedConfig, layer_class: str | None = None) -> ModelShape:
    """The shape of the model with this configuration, which is built on `meta`."""
    return shape_of_model(name, build_on_meta(config), config, layer_class)


def shape_of_run(config: Config, model_config: PretrainedConfig) -> ModelShape:
    """The shape of a run's model, with LoRA's adapters if it has any."""
    model = build_to_train(config, model_config)
    return shape_of_model(config.model.path, model, model_config, config.model.layer_class)


def shape_of_model(
    name: str, model: PackedLanguageModel, config: PretrainedConfig, layer_class: str | None = None
) -> ModelShape:
    """The shape of a model that is not sharded yet; it may be on `meta`."""
    layers = decoder_layers(model, layer_class)
    extra = model.extra_fsdp_units()
    used = {id(parameter) for module in [*layers, *extra] for parameter in module.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in used]
    frozen = [parameter.dtype.itemsize for parameter in model.parameters() if not parameter.requires_grad]
    return ModelShape(
        name,
        config,
        tuple(_unit(f"layer {number}", module.parameters()) for number, module in enumerate(layers)),
        tuple(_unit(what, module.parameters()) for what, module in zip(("embedding", "head"), extra, strict=False)),
        _unit("root", rest),
        model.num_tokens,
        count_work(model, config),
        max(frozen, default=0),
    )


def _unit(name: str, parameters: Iterable[nn.Parameter]) -> Unit:
    shapes = [(tuple(parameter.shape), parameter.requires_grad) for parameter in parameters]
    return Unit(name, tuple(shape for shape, _ in shapes), tuple(shape for shape, is_trained in shapes if is_trained))
