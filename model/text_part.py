"""The text part of a model that also reads images: `model.part=text` trains it, and the export is the whole model again."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common.errors import UserError

# tests/model/test_text_part.py covers exactly this list: over text, the text part alone computes what the whole model computes.
COMPOSITES = (
    "gemma3", "gemma4", "internvl", "kimi_k25", "lfm2_vl", "lfm3_vl", "mistral3", "qwen3_5", "qwen3_5_moe", "smolvlm",
)  # fmt: skip
# Files of the base that describe how images become inputs.
PROCESSORS = ("*processor_config.json", "chat_template.json")


class TextPart:
    """The place of a text model inside its whole model, which is on `meta`."""

    def __init__(self, causal_lm: PreTrainedModel, whole_config: PretrainedConfig) -> None:
        """Find the decoder of `causal_lm` in the model of `whole_config`."""
        try:
            with torch.device("meta"):
                self.whole = AutoModelForImageTextToText.from_config(copy.deepcopy(whole_config), dtype=torch.float32)
        except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"transformers cannot build the whole {whole_config.model_type} model of config.json: {error}"
            ) from error
        self.prefix = f"{causal_lm.base_model_prefix}."
        self.place = _decoder_name(self.whole, causal_lm)

    def name(self, name: str) -> str:
        """Return a tensor's name in the whole model."""
        return f"{self.place}.{name.removeprefix(self.prefix)}" if name.startswith(self.prefix) else name


def _decoder_name(whole: PreTrainedModel, causal_lm: PreTrainedModel) -> str:
    kind = type(causal_lm.base_model)
    return next(name for name, module in whole.named_modules() if type(module) is kind)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of the text part, whose attribute `whole` is `config`; `config` itself if it has no other parts.

    Raises UserError if the text part of this type cannot be trained by itself.
    """
    text = copy.deepcopy(config.get_text_config())
    if text.model_type == config.model_type:
        return config
    if config.model_type not in COMPOSITES or text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"model type {config.model_type} has more parts than text, and its text part, {text.model_type}, is not supported by "
            f"itself; types whose text part is: {', '.join(COMPOSITES)}"
        )
    text.tie_word_embeddings, text.whole = config.tie_word_embeddings, config
    return text


def is_part(config: PretrainedConfig) -> bool:
    """Return whether `text_config` has taken this configuration out of a whole model's."""
    return hasattr(config, "whole")


def whole_config(text: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of the whole model with this text part."""
    text, whole = copy.copy(text), copy.deepcopy(text.whole)
    vars(text).pop("whole")
    whole.text_config, whole.dtype = text, text.dtype
    return whole


def load_causal_lm(path: str | Path, **options: Any) -> PreTrainedModel:
    """Load a directory with transformers' `from_pretrained`: a causal language model, or the text part of a whole model.

    `options` may have a `config`, from `model.architectures.read_model_config`.
    """
    config = options.get("config") or AutoConfig.from_pretrained(path)
    text = config if is_part(config) else text_config(config)
    if not is_part(text):
        return AutoModelForCausalLM.from_pretrained(path, **options)
    whole = AutoModelForImageTextToText.from_pretrained(path, **options | {"config": whole_config(text)})
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(copy.deepcopy(text))
    setattr(causal_lm, causal_lm.base_model_prefix, whole.get_submodule(_decoder_name(whole, causal_lm)))
    causal_lm.set_output_embeddings(whole.get_output_embeddings())
    causal_lm.generation_config = whole.generation_config
    return causal_lm


def processors(directory: str | Path) -> list[Path]:
    """Return the files by which transformers prepares images for the whole model. Raises UserError if one is no JSON."""
    paths = [path for pattern in PROCESSORS for path in sorted(Path(directory).glob(pattern))]
    for path in paths:
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON: {error}; copy it again") from error
    return paths
