"""What a run is: what its step numbers mean, and its settings."""

import dataclasses
import json

import torch
from transformers import PretrainedConfig

from configs.config import Config, as_dict
from training.inputs import Inputs


def step_meaning(config: Config, inputs: Inputs, model_config: PretrainedConfig, base: str) -> dict:
    """What the number of a step means: which documents it trains on, and how. Name of the setting -> value, plain JSON.

    `base` is the fingerprint of the base model's weights (model/fingerprint.py): forgetting is measured against them. A
    resume with another meaning would train on the wrong data, so it is refused.
    """
    mixture, ewc = inputs.train.mixture(), None
    if config.ewc.strength:
        from model.ewc import anchor_settings

        ewc = anchor_settings(config.ewc, inputs.old_domain)
    return {
        "the weights of model.path": base,
        "the vocabulary size of model.path": model_config.vocab_size,
        "data.chat_date": config.data.chat_date,
        "data.train": inputs.train.sources[0].fingerprint,
        "data.mix": mixture and [mixture, list(inputs.plan.windows)],
        "run.seed": config.run.seed,
        "data.sequence_length": config.data.sequence_length,
        "data.packing": config.data.packing,
        "batch.global_examples": config.batch.global_examples,
        "batch.global_tokens": config.batch.global_tokens,
        "optimizer.memory": config.optimizer.memory,
        "ewc.strength": config.ewc.strength,
        "ewc": ewc,
        # With the alpha that holds: another default of a later version must not pass as the same run.
        "lora": dataclasses.asdict(config.lora) | {"alpha": config.lora.effective_alpha} if config.lora.rank else None,
        "model.rope_type, rope_factor or rope_original_length": model_config.rope_parameters,
    }


def run_settings(config: Config, total_steps: int, world_size: int) -> dict:
    """All settings of a run, flat, and what else may change between two starts: `section.key` -> value, plain JSON."""
    sections = json.loads(json.dumps(as_dict(config)))
    settings = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    return settings | {"steps in total": total_steps, "ranks": world_size, "torch": torch.__version__}
