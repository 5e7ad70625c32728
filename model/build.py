"""Build the model of a run on `meta` from its config, before any process group starts, and later fill in its first weights."""

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.errors import UserError
from configs.config import Config, Model
from data.tokens import load_tokenizer
from distributed.optimizer import parameter_dtype
from distributed.sharding import decoder_layers, local
from model.architectures import has_experts, read_model_config
from model.dtypes import DTYPES
from model.language_model import (
    PackedLanguageModel,
    build_on_meta,
    check_weights,
    materialize,
    parameter_names,
    read_weights,
    trained_parameters,
)
from model.rope import check_length
from model.text_part import is_part, processors


def build(config: Config) -> tuple[PackedLanguageModel, PretrainedConfig, PreTrainedTokenizerBase]:
    """Return (the model on `meta`, its configuration with the trained RoPE, the tokenizer). No collective; reads no weights.

    Raises UserError for a model that cannot be trained, for documents longer than its window, for a wrong
    `model.layer_class`, and for files of weights that are damaged or do not fit.
    """
    settings = config.model
    model_config = model_config_of(settings)
    tokenizer = load_tokenizer(settings.path, config.data.chat_template)
    if config.data.sequence_length != "auto":
        check_length(config.data.length, model_config, settings.path)
    model = build_to_train(config, model_config)
    decoder_layers(model, settings.layer_class)  # raises for a wrong name
    check_weights(model, settings.path)
    return model, model_config, tokenizer


def model_config_of(settings: Model) -> PretrainedConfig:
    """Return the configuration of model.path with the RoPE of the config. Raises UserError as `read_model_config` does."""
    rope = settings.rope_type, settings.rope_factor, settings.rope_original_length
    config = read_model_config(settings.path, *rope, key="model.path")
    if is_part(config) and not settings.part:
        raise UserError(
            f"model.path={settings.path}: model type {config.whole.model_type} also reads images; model.part=text trains its text "
            "part, and exports the whole model with the other parts as they are"
        )
    if is_part(config):
        processors(settings.path)  # which the export repeats
    if settings.part and not is_part(config):
        raise UserError(f"model.part=text: {settings.path} has no other parts than text; leave it out")
    return config


def build_to_train(config: Config, model_config: PretrainedConfig) -> PackedLanguageModel:
    """Build the model of a run on `meta`, with trained parameters in the dtype of `optimizer.memory` and with LoRA's adapters.

    Frozen weights have `model.compute_dtype`, because forward reads them in it anyway and no update is ever added to them.
    Raises UserError for LoRA targets that the model lacks, for attention heads that `sharding.context` ranks cannot share
    equally, and for `model.router_aux` without experts.
    """
    heads, context = getattr(model_config, "num_attention_heads", 0), config.sharding.context
    if context > 1 and (not heads or heads % context):
        raise UserError(
            f"sharding.context={context}: {config.model.path} has {heads} attention heads, which {context} ranks cannot share "
            f"equally; set it to a divisor of {heads}"
        )
    if config.model.router_aux is not None and not has_experts(model_config):
        raise UserError(
            f"model.router_aux: {config.model.path} has no experts, whose routers it would balance; leave it out"
        )
    model, dtype = build_on_meta(model_config), parameter_dtype(config.optimizer.memory)
    if not config.lora.rank:
        return model.to(dtype)
    if model.part:
        raise UserError("lora.rank: peft cannot put an adapter of the text part on the whole model; leave it out")
    from model.lora import add_adapters

    add_adapters(model.causal_lm, config.lora, config.model.path)
    model.to(DTYPES[config.model.compute_dtype])
    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data.to(dtype)
    return model


def first_weights(model: PackedLanguageModel, config: Config, device: torch.device, is_resumed: bool) -> None:
    """Allocate this rank's shards, read its slices of the base weights and initialise LoRA's adapters.

    Forward runs on `device`. The shards are there too, or on the CPU with `sharding.cpu_offload`. A resume fills the trained
    parameters from a checkpoint, so it reads the base only if the run measures against it or if some parameters are frozen.
    Parameters that are not read are NaN.
    """
    materialize(model, torch.device("cpu") if config.sharding.cpu_offload else device, device)
    is_partly_frozen = len(trained_parameters(model)) < len(parameter_names(model))
    needs_base = config.run.eval_general or config.ewc.strength or config.lora.rank or is_partly_frozen
    reads = not is_resumed or needs_base or any(source.anchor for source in config.data.mix)
    for parameter in {*model.parameters()} - ({*model.causal_lm.parameters()} if reads else set()):
        local(parameter).fill_(torch.nan)  # new memory is often zero, which could be taken for weights
    if reads:
        read_weights(model, config.model.path)
    if config.lora.rank:
        from model.lora import init_adapters

        # Also adapters that an edited loop freezes: uninitialised memory would be added to their matrices.
        init_adapters(dict(model.causal_lm.named_parameters()), config.run.seed)
