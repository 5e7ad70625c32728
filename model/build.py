"""The model of a run: its shape on `meta`, with the tokenizer, and later the weights of this rank's shards."""

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from configs.config import Config
from data.tokens import load_tokenizer
from distributed.optimizer import parameter_dtype
from distributed.sharding import decoder_layers
from model.architectures import check_model_directory, read_model_config
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


def build(config: Config) -> tuple[PackedLanguageModel, PretrainedConfig, PreTrainedTokenizerBase]:
    """(the model on meta, with adapters if lora.rank is set; its config; the tokenizer). No weight is read.

    Raises UserError for a directory, a setting or weights that cannot be trained.
    """
    settings = config.model
    check_model_directory(settings.path, "model.path")
    model_config = read_model_config(
        settings.path, settings.rope_type, settings.rope_factor, settings.rope_original_length
    )
    tokenizer = load_tokenizer(settings.path, config.data.chat_template)
    check_length(config.data.sequence_length, model_config, settings.path)
    if config.lora.rank:
        from model.lora import build_to_train

        model = build_to_train(config, model_config)
    else:
        model = build_on_meta(model_config).to(parameter_dtype(config.optimizer.memory))
    decoder_layers(model, settings.layer_class)  # a wrong name ends here
    check_weights(model, settings.path)
    return model, model_config, tokenizer


def load_weights(model: PackedLanguageModel, config: Config, device: torch.device, is_resumed: bool) -> None:
    """Allocate the sharded model and read this rank's slices of the base's weights. `device`: where it computes.

    A resume reads them only where something is measured against the base, or where some of them are not trained: what is
    trained comes from the checkpoint.
    """
    materialize(model, config.model.path, torch.device("cpu") if config.sharding.cpu_offload else device, device)
    is_partly_frozen = len(trained_parameters(model)) < len(parameter_names(model))
    if not is_resumed or config.run.eval_general or config.ewc.strength or config.lora.rank or is_partly_frozen:
        read_weights(model, config.model.path)
        if config.lora.rank:
            from model.lora import init_adapters

            init_adapters(trained_parameters(model), config.run.seed)
