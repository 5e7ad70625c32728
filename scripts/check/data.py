"""Read a run before its first step, and check the tokens that end its answers."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from configs.config import Config
from distributed.optimizer import check_memory
from model.build import build
from model.dtypes import DTYPES, has_native_bf16
from model.flops import count_work, document_costs
from training.inputs import Inputs, read_inputs, settle_settings
from training.micro_batch import settle_micro_batch

STEPS = 200  # first steps whose documents are read
COMPARED = 20_000  # documents that are read, at most


@dataclass(frozen=True)
class RunInputs:
    """The config, tokenizer, data and code of a run, and where the check computes."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    model_config: PretrainedConfig
    inputs: Inputs
    device: torch.device  # of the check: the first GPU, or the CPU
    compute_dtype: torch.dtype  # of the run on this device
    code: ModuleType  # the run's train.py


def read_run(config: Config, world_size: int, device: torch.device, train: Path) -> RunInputs:
    """Read config, tokenizer, headers of the weights and data, in the order of train.py. Not a collective. Raise UserError.

    world_size: ranks of the run, which decide how a step is dealt to micro-batches. train: the run's train.py.
    """
    run_directory = Path(config.run.directory) / config.run.name
    check_memory(config.optimizer.memory)
    model, model_config, tokenizer = build(config)
    config = settle_settings(config, model, model_config, tokenizer, show_progress=False)
    config = settle_micro_batch(config, model, model_config, run_directory, 1, lambda text: None)
    costs = document_costs(count_work(model, model_config))
    inputs = read_inputs(config, tokenizer, model_config.vocab_size, costs, world_size, show_progress=False)
    dtype = DTYPES[config.model.compute_dtype]
    if dtype == torch.bfloat16 and not has_native_bf16(device):
        dtype = torch.float32  # as train.py decides
    return RunInputs(config, tokenizer, model_config, inputs, device, dtype, load_code(train))


def load_code(path: Path) -> ModuleType:
    """Import a train.py, of which the check calls `token_losses`."""
    spec = importlib.util.spec_from_file_location("train_of_the_run", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
