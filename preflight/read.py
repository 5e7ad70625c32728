"""What a run would read, read by one process without a process group: the same steps in the same order as in train.py."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.dtypes import DTYPES, has_native_bf16
from configs.config import Config
from data.tokens import load_tokenizer
from distributed.optimizer import check_memory
from distributed.sharding import decoder_layers
from model.architectures import check_model_directory, read_model_config
from model.flops import count_work, document_costs
from model.language_model import check_weights
from model.lora import build_to_train
from model.rope import check_length
from training.chat_settings import settle_chat_settings
from training.inputs import Inputs, read_inputs
from training.micro_batch import settle_micro_batch


@dataclass(frozen=True)
class RunInputs:
    """A run before its first step. Paths in `config` are those of the run, or of a model that was cut (preflight/layers.py)."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    model_config: PretrainedConfig
    inputs: Inputs
    device: torch.device  # where the checks compute: the first GPU, or the CPU
    compute_dtype: torch.dtype  # of the run on this device


def read_run(config: Config, world_size: int, device: torch.device, say: Callable[[str], None]) -> RunInputs:
    """Read config, tokenizer, headers of the weights and data. Not a collective, whatever `world_size` is.

    world_size: of the run; the deal of a step to micro-batches depends on it. device: where the checks will compute. Raises UserError as train.py does.
    """
    check_memory(config.optimizer.memory)
    path = config.model.path
    run_directory = Path(config.run.directory) / config.run.name
    check_model_directory(path, "model.path")
    model_config = read_model_config(
        path, config.model.rope_type, config.model.rope_factor, config.model.rope_original_length
    )
    tokenizer = load_tokenizer(path, config.data.chat_template)
    check_length(config.data.sequence_length, model_config, path)
    model = build_to_train(config, model_config)
    decoder_layers(model, config.model.layer_class)
    check_weights(model, path)
    config = settle_chat_settings(config, tokenizer, run_directory, world_size=1)
    config = settle_micro_batch(config, model, model_config, run_directory, 1, say)
    costs = document_costs(count_work(model, model_config))
    inputs = read_inputs(config, tokenizer, model_config.vocab_size, costs, world_size, show_progress=False)
    dtype = DTYPES[config.model.compute_dtype]
    if dtype == torch.bfloat16 and not has_native_bf16(device):
        dtype = torch.float32  # as training/start.py decides
    return RunInputs(config, tokenizer, model_config, inputs, device, dtype)


def with_model(config: Config, path: str) -> Config:
    """The config with another model directory."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=path))


def without_launcher() -> None:
    """Forget the variables of a launcher: this process stands alone, and nothing may wait for its peers."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
