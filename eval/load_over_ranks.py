"""Load a model for an evaluation on one or several ranks: whole on every rank, or sharded over all of them (FSDP2).

Each rank of a sharded model holds its part of the parameters. During a forward FSDP gathers one unit at a time (a decoder layer,
the embedding, the head). The root unit, with the norm and a tied embedding, stays gathered.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from common.errors import UserError
from configs.config import Sharding
from distributed.process_group import Ranks, StopSignal, agree_any, call_on_all, read_on_first
from distributed.sharding import decoder_layers, make_mesh, shard
from eval.generate import load_for_generation, with_own_stops
from model.architectures import read_model_config
from model.dtypes import choose_dtype
from model.language_model import PackedLanguageModel, build_on_meta, load_for_evaluation, load_weights
from model.proof import prove
from model.text_part import TextPart, is_part

# Of safetensors files. SmolLM2-135M (0.25 GiB) generates four times as fast whole as sharded over two processes on a CPU.
SMALL_BYTES = 2**30


def add_sharding_option(parser: argparse.ArgumentParser) -> None:
    """Add the option `--sharding`, whose value goes to `is_sharded`."""
    parser.add_argument(
        "--sharding",
        choices=("auto", "full", "none"),
        default="auto",
        help="full: each process holds a part of the model and gathers one layer at a time; none: each holds all of it, "
        "which is faster if it fits; auto: full for several processes, unless the model is small (%(default)s)",
    )


def is_sharded(option: str, paths: Sequence[str], ranks: Ranks) -> bool:
    """Return whether the value of `--sharding` means to shard the models at `paths`. A collective.

    `auto` shards over several ranks if the models have more than SMALL_BYTES of files, because gathering the parameters
    for every token takes longer than to compute with them if they are few. Rank 0 prints the choice.
    """
    if option != "auto" or ranks.world_size == 1:
        return option == "full" and ranks.world_size > 1
    size = read_on_first(lambda: sum(f.stat().st_size for p in paths for f in Path(p).glob("*.safetensors")), ranks)
    sharded = size > SMALL_BYTES
    if ranks.rank == 0:
        chosen, held = ("full", "a part") if sharded else ("none", "all")
        hint = "; --sharding none is faster if a process can hold all of it" * sharded
        each = f"each of {ranks.world_size} processes holds {held} of the {size / 2**30:.1f} GiB"
        print(f"--sharding {chosen}: {each}{hint}", flush=True)
    return sharded


def agreed_dtype(name: str, ranks: Ranks) -> torch.dtype:
    """Return the same `choose_dtype` on all ranks: `auto` is bf16 only if every rank has it natively. A collective."""
    dtype = choose_dtype(name, ranks.device)
    return torch.float32 if agree_any(dtype == torch.float32, ranks) else dtype


def load_packed(
    config: PretrainedConfig, path: str, dtype: torch.dtype, sharded: bool, ranks: Ranks
) -> PackedLanguageModel:
    """Load the model for packed documents, with parameters in `dtype`, in eval mode. A collective.

    If it is sharded, each rank reads its own slices only, and all ranks must run the same number of forwards. Raises
    UserError, on every rank, if any rank cannot load it.
    """
    if not sharded:
        return call_on_all(lambda: load_for_evaluation(config, path, dtype, ranks.device), ranks)
    model = build_on_meta(config).to(dtype)
    if not read_on_first(lambda: prove(config, ranks.device), ranks).packed:
        model.one_document_at_a_time()
    _shard(model, model.extra_fsdp_units(), dtype, ranks)
    call_on_all(lambda: load_weights(model, path, ranks.device), ranks)
    return model.eval()


def load_causal_lm(
    path: str, dtype: torch.dtype, sharded: bool, ranks: Ranks
) -> tuple[PreTrainedModel, StopSignal | None]:
    """Load a Hugging Face model in eval mode, whole or sharded. A collective.

    Return the model and, if it is sharded, the signal after which its ranks must stop together: a rank that ends alone leaves
    the others waiting in a collective. Raises UserError, on every rank, if any rank cannot load the model.
    """
    if not sharded:
        return call_on_all(lambda: load_for_generation(path, dtype, ranks.device), ranks), None
    model = call_on_all(functools.partial(_causal_lm_on_meta, path, dtype), ranks)
    packed = PackedLanguageModel(model)  # knows how the files are read
    packed.part = TextPart(model, model.config.whole) if is_part(model.config) else None
    del packed.head.forward  # logits again, not losses
    _shard(model, packed.extra_fsdp_units(), dtype, ranks)
    call_on_all(lambda: load_weights(packed, path, ranks.device), ranks)
    return model.eval(), StopSignal(ranks)


def _causal_lm_on_meta(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model with its own forward and vocabulary size, because rows of padding could be chosen as tokens."""
    try:
        config = read_model_config(path)  # its checks: parameters must have the same names as in the files
    except UserError as error:
        raise UserError(f"{error}; --sharding none evaluates models that transformers alone supports") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config if is_part(config) else AutoConfig.from_pretrained(path), dtype=dtype
        )
    return with_own_stops(model, path)


def _shard(model: torch.nn.Module, extra_units: list[torch.nn.Module], dtype: torch.dtype, ranks: Ranks) -> None:
    sharding = Sharding(strategy="full")
    mesh = make_mesh(ranks.device.type, ranks.world_size, sharding)
    shard(model, decoder_layers(model), extra_units, mesh, dtype, sharding)
    assert isinstance(model, FSDPModule)
    for unit in extra_units:  # the head, which training keeps gathered for its backward
        cast(FSDPModule, unit).set_reshard_after_forward(True)
