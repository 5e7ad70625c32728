"""Before the first step: what every rank must have alike, and whether the disk is fit for the run."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.dtypes import DTYPES, dtype_name, has_native_bf16
from common.errors import UserError
from configs.config import Config
from distributed.agreement import check_agreement, library_versions
from distributed.checkpoint import checkpoint_tensors, stored_bytes
from distributed.disks import check_room_for_run, measure_write_speed, save_line, torchrun_grace
from distributed.process_group import Ranks, agree_any, read_on_first
from model.language_model import PackedLanguageModel, parameter_names, trained_parameters
from training.criterion import criterion_of
from training.export_files import GENERATION_CONFIG
from training.identity import Identity, free_settings, identity_of
from training.inputs import Inputs
from training.progress import Progress, fresh_progress

PROBE_BYTES = 64 * 2**20  # written on each node to measure the disk, or a checkpoint's bytes if that is less


def check_resume(resume: str, run_directory: Path, ranks: Ranks) -> None:
    """Raise UserError on all ranks if run.resume=never and the run exists. A collective.

    A restart by torchrun (`--max-restarts`) continues the run. Each node counts its own restarts, so one that has counted
    is enough.
    """
    restarted = agree_any(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0", ranks)
    if resume == "never" and not restarted and read_on_first(run_directory.exists, ranks):
        raise UserError(f"{run_directory} exists and run.resume=never; choose another run.name or remove it")


def agree_on_dtype(name: str, ranks: Ranks, say: Callable[[str], None]) -> torch.dtype:
    """The compute dtype called `name`; fp32, and `say` says so, if a rank has no native bf16. A collective."""
    dtype = DTYPES[name]
    if dtype == torch.bfloat16 and agree_any(not has_native_bf16(ranks.device), ranks):
        say("not every rank has native bf16: all ranks compute in fp32 instead")
        return torch.float32
    return dtype


def agree_on_start(
    config: Config,
    inputs: Inputs,
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    files: Identity,
    ranks: Ranks,
) -> Progress:
    """A run that has taken no step, the same on every rank. A collective. `files`: of `training.identity.hash_files`.

    Raises UserError on all ranks if a rank read other files, another config or another model, or runs other versions or
    code, and if run.resume=never and the run exists.
    """
    identity = identity_of(config, inputs, model_config, tokenizer, files)
    dtype = agree_on_dtype(config.model.compute_dtype, ranks, lambda text: None)
    settings = free_settings(config, inputs, ranks.world_size, f"{ranks.device.type} in {dtype_name(dtype)}")
    fresh = fresh_progress(identity, settings, inputs.train, inputs.validation, criterion_of(config))
    check_agreement(
        {
            **settings,
            **{name: value for name, value in identity.items() if name != "settings"},
            **identity["settings"],
            # Every rank deals for itself: if two did not agree, documents would be trained twice or never.
            "the deal of the first step": hashlib.sha256(repr(inputs.deal(0).items).encode()).hexdigest(),
            "the data of data.validation": fresh.validation,
            "the questions of run.eval_generate": inputs.asked.digest() if inputs.asked else None,
            "the generation_config.json of model.path": generation_config_digest(config.model.path),
            "versions": library_versions(),
            "the device type": ranks.device.type,
        },
        ranks,
    )
    check_resume(config.run.resume, Path(config.run.directory, config.run.name), ranks)
    return fresh


def generation_config_digest(path: str) -> str | None:
    """The digest of what the base's directory says of the tokens that end an answer; None without such a file."""
    file = Path(path, GENERATION_CONFIG)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def check_disks(
    config: Config,
    model: PackedLanguageModel,
    optimizer: torch.optim.Optimizer,
    model_config: PretrainedConfig,
    ranks: Ranks,
) -> list[str]:
    """Whether the checkpoints and the export will fit, and how long a save takes here, in words. A collective.

    Raises UserError on all ranks if there is no room for a checkpoint.
    """
    directory = Path(config.run.directory, config.run.name)
    checkpoint = stored_bytes(checkpoint_tensors(trained_parameters(model), optimizer, ranks))
    dtype = getattr(model_config, "dtype", None) or torch.bfloat16
    export = sum(parameter.numel() for parameter in parameter_names(model).values()) * dtype.itemsize
    lines = check_room_for_run(directory, checkpoint, export, config.run.keep_last, ranks)
    # Where the checkpoints will be: what is wrong there is noticed before the first step.
    checkpoints = directory / "checkpoints"
    read_on_first(lambda: checkpoints.mkdir(exist_ok=True), ranks)
    speed = measure_write_speed(checkpoints, ranks, min(PROBE_BYTES, checkpoint))
    return [*lines, save_line(checkpoint, speed, torchrun_grace())]
