"""The start of a run: its config, the agreement of all ranks, and the room on the disk."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from common.errors import UserError
from configs.config import Config
from configs.load import check_world, read_command_line, replace
from data.tokens import generation_stops
from distributed.checkpoint_directory import check_room_for_run
from distributed.host_memory import keep_freed_memory
from distributed.optimizer import check_memory
from distributed.process_group import (
    Ranks,
    StopSignal,
    agree_any,
    check_agreement,
    library_versions,
    process_group,
    read_on_first,
    world_size_from_environment,
)
from model.architectures import randomness
from model.dtypes import DTYPES, dtype_name, has_native_bf16
from model.language_model import PackedLanguageModel, parameter_names
from model.proof import Proof, prove
from training.identity import Identity, free_settings, identity_of
from training.inputs import Inputs
from training.observe import memory_snapshot
from training.owner import own_directory


@dataclass(frozen=True)
class TrainingRun:
    """A run on this rank: config, data and model, and the values on which all ranks have agreed."""

    config: Config
    data: Inputs  # `data.plan` decides which documents a step has
    model: PackedLanguageModel  # on meta until `first_weights`
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    identity: Identity  # decides the weights (training/identity.py)
    settings: dict  # may change between two starts (`free_settings`)
    compute_dtype: torch.dtype  # the same on all ranks
    stop: StopSignal  # tells all ranks of a signal at the same line
    ranks: Ranks
    directory: Path  # runs/NAME
    proof: Proof  # of the model's type
    model_lines: list[str]  # that the start prints about the model's type


def read_config(documentation: str | None) -> Config:
    """Return the config of the command line, checked for the number of processes that torchrun has started.

    Raise UserError for a mistake in it.
    """
    keep_freed_memory()  # before tokenising starts threads
    world_size, ranks_per_node = world_size_from_environment()
    is_first = int(os.environ.get("RANK", 0)) == 0
    config, _ = read_command_line(documentation, world_size, print if is_first else lambda text: None)
    check_world(config, world_size, ranks_per_node)
    check_memory(config.optimizer.memory)
    if config.sharding.strategy == "hybrid" and config.sharding.shard_size is None:
        # The ranks will compare it: if nodes have different numbers of ranks, no mesh fits both.
        config = replace(config, "sharding.shard_size", ranks_per_node)
    return config


@contextmanager
def join_run(
    config: Config,
    inputs: Inputs,
    model: PackedLanguageModel,
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[TrainingRun]:
    """Join the processes of a run, let them agree on all that they have read, and own the run's directory.

    Every rank must call this. Raise UserError on all ranks if a rank read other files, another config or another model, or
    runs other versions or code, and if run.resume=never and the run exists.
    """
    directory = Path(config.run.directory, config.run.name)
    with process_group(config.run.timeout_minutes) as ranks:
        ranks.watch.at("the proof of the model type")
        proof = read_on_first(lambda: prove(model_config, ranks.device), ranks)
        pack(model, proof, config)
        identity = identity_of(config, inputs, model_config, tokenizer)
        if not proof.packed:
            identity["settings"]["documents of a forward"] = "one"
        dtype = agree_on_dtype(config.model.compute_dtype, ranks)
        settings = free_settings(config, inputs, ranks.world_size, f"{ranks.device.type} in {dtype_name(dtype)}")
        validation = inputs.validation.sources if inputs.validation else ()
        check_agreement(
            {
                **settings,
                **{name: value for name, value in identity.items() if name != "settings"},
                **identity["settings"],
                # Every rank deals for itself: if two did not agree, documents would be trained twice or never.
                "the deal of the first step": hashlib.sha256(repr(inputs.deal(0).items).encode()).hexdigest(),
                "the data of data.validation": [source.fingerprint for source in validation],
                "the questions of run.eval_generate": inputs.questions.digest() if inputs.questions else None,
                "the prompts of forgetting.keep": inputs.keep.digest() if inputs.keep else None,
                "the tokens of generation_config.json": generation_stops(tokenizer),
                "versions": library_versions(),
                "the device type": ranks.device.type,
            },
            ranks,
        )
        check_resume(config.run.resume, directory, ranks)
        with own_directory(directory, ranks), memory_snapshot(directory, ranks):
            if config.run.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True)  # with warn_only, attention's backward on CUDA would only warn
            parts = config, inputs, model, model_config, tokenizer, identity, settings, dtype
            yield TrainingRun(
                *parts, StopSignal(ranks), ranks, directory, proof, _model_lines(config, model_config, proof)
            )


def _model_lines(config: Config, model_config: PretrainedConfig, proof: Proof) -> list[str]:
    lines = proof.lines(model_config.model_type)
    base = json.loads(Path(config.model.path, "config.json").read_text(encoding="utf-8"))
    if values := ", ".join(f"{name}={value}" for name, value in randomness(base).items()):
        lines.append(f"{values} of config.json is 0 in training; the export keeps it")
    return lines


def pack(model: PackedLanguageModel, proof: Proof, config: Config) -> None:
    """Let the model compute packed documents if its proof and data.packing allow it, else one document at a time.

    Raise UserError for settings that need what the model does not have.
    """
    if not (proof.packed and config.data.packing):
        model.one_document_at_a_time()
    context, has_mixers = config.sharding.context, model.boundaries.num_mixers > 0
    if context > 1 and (has_mixers or not model.is_packed):
        why = "its layers carry a state from token to token" if has_mixers else "each document has its own forward"
        raise UserError(
            f"sharding.context={context}: ranks cannot share the documents of {config.model.path}, because {why}; set it to 1"
        )
    if config.model.compile and (has_mixers or not model.is_packed):
        raise UserError(
            f"model.compile=True: {config.model.path} runs its documents one by one; set model.compile=False"
        )


def check_resume(resume: str, run_directory: Path, ranks: Ranks) -> None:
    """Raise UserError on all ranks if run.resume=never and the run exists. Every rank must call this.

    A restart by torchrun (`--max-restarts`) continues the run. Each node counts its own restarts, so a count on one node is
    enough.
    """
    restarted = agree_any(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0", ranks)
    if resume == "never" and not restarted and read_on_first(run_directory.exists, ranks):
        raise UserError(f"{run_directory} exists and run.resume=never; choose another run.name or remove it")


def agree_on_dtype(name: str, ranks: Ranks) -> torch.dtype:
    """Return the compute dtype `name`, or fp32 with a message if any rank has no native bf16. Every rank must call this."""
    dtype = DTYPES[name]
    if dtype == torch.bfloat16 and agree_any(not has_native_bf16(ranks.device), ranks):
        if ranks.rank == 0:
            print("not every rank has native bf16: all ranks compute in fp32 instead", flush=True)
        return torch.float32
    return dtype


def check_disks(run: TrainingRun, checkpoint: int) -> str:
    """Return a line on whether the checkpoints and the export will fit on the disk. Every rank must call this.

    checkpoint: its bytes. Raise UserError on all ranks if there is no room for one.
    """
    dtype = getattr(run.model_config, "dtype", None) or torch.bfloat16
    export = sum(parameter.numel() for parameter in parameter_names(run.model).values()) * dtype.itemsize
    return check_room_for_run(run.directory, checkpoint, export, run.config.run.keep_last, run.ranks)
