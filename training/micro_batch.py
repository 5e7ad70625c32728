"""batch.micro_batch=auto: the largest micro-batch that the memory of every rank holds.

The estimate adds up the bytes of the tensors that this rank will have: parameters, gradients and moments, what is gathered
and reduced, EWC, one chunk of logits, and what each token leaves for backward (model/activations.py).
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PretrainedConfig

from common.dtypes import DTYPES, has_native_bf16
from configs.config import Config
from distributed.host_memory import free_bytes
from distributed.rendezvous import join
from distributed.sharding import decoder_layers
from model.activations import SavedBytes, saved_bytes
from model.language_model import PackedLanguageModel, num_parameters
from model.loss import CHUNK_TOKENS

# Of the free memory: the rest is for fragments and for what is not counted.
USABLE = {"cuda": 0.85, "cpu": 0.7}
LOGITS_COPIES = 3  # of a chunk of logits in fp32: logits, their gradient, and a temporary


def settle_micro_batch(
    config: Config,
    model: PackedLanguageModel,
    model_config: PretrainedConfig,
    run_directory: Path,
    world_size: int,
    say: Callable[[str], None],
) -> Config:
    """The config with a number in `batch.micro_batch`. `model` is on meta. A collective if the config says `auto`.

    All ranks take the smallest number that any of them found. A resume at the same number of ranks takes the number of the
    run's last start, which config.json records, so that it repeats the same sums.
    """
    if config.batch.micro_batch != "auto":
        return config
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    free = free_bytes(device, local_world)
    dtype = DTYPES[config.model.compute_dtype]
    if dtype == torch.bfloat16 and not has_native_bf16(device):
        dtype = torch.float32  # all ranks will compute in it (training/start.py: agree_on_dtype)
    fixed, per_token = expected_bytes(config, model, model_config, dtype, world_size, local_world)
    usable = USABLE[device.type] * free
    fits = int((usable - fixed) / (per_token * config.data.sequence_length))
    recorded = _recorded(run_directory, world_size)
    chosen, fits, recorded = _agree(max(1, fits), fits, recorded, config.run.timeout_minutes, world_size)
    rows = min(chosen, largest_useful(config, world_size))
    why = "as at the last start" if recorded else "a rank's part of any step" if rows < chosen else "what memory holds"
    of = f"{rows * config.data.sequence_length:,} tokens" if config.data.packing else f"{rows} examples"
    say(
        f"batch.micro_batch=auto: {rows} ({of} at most), {why}; memory holds {max(0, fits)}: {USABLE[device.type]:.0%} of "
        f"{free / 2**30:.1f} GiB free for a rank, less {fixed / 2**30:.1f} GiB, at {per_token / 2**10:.0f} KiB for a token"
    )
    if fits < 1:
        more = "more ranks" if device.type == "cuda" else "fewer processes on this machine"
        say(
            f"warning: not even {config.data.sequence_length} tokens are expected to fit into memory: use "
            f"model.activation_checkpointing=full, lower data.sequence_length or use {more}"
        )
    elif rows > fits:
        say(
            f"warning: only {fits} are expected to fit into memory now; set batch.micro_batch={fits} if it runs out (the sums of "
            "a resumed run then differ by rounding)"
        )
    return with_rows(config, rows)


def with_rows(config: Config, rows: int) -> Config:
    """The config with this number in `batch.micro_batch`."""
    return dataclasses.replace(config, batch=dataclasses.replace(config.batch, micro_batch=rows))


def expected_bytes(
    config: Config,
    model: PackedLanguageModel,
    model_config: PretrainedConfig,
    dtype: torch.dtype,
    world_size: int,
    local_world: int,
) -> tuple[int, int]:
    """(bytes on this rank's device whatever the micro-batch, bytes for each of its tokens). `model` may be on meta.

    dtype: of the products.
    """
    sharding = config.sharding
    count = num_parameters(model)
    shards = {"none": 1, "hybrid": sharding.shard_size or local_world}.get(sharding.strategy, world_size)
    layers = decoder_layers(model, config.model.layer_class)
    layer = max(sum(p.numel() for p in one.parameters()) for one in layers)
    root = count - sum(p.numel() for one in layers for p in one.parameters())
    # Under `full` the root's own parameters and two layers are gathered: the one that runs, and the next one.
    # On a single CPU rank everything is (distributed/sharding.py: gathering_strategy).
    alone = world_size == 1 and not torch.cuda.is_available()
    gathered = count if alone or sharding.strategy in ("grad_op", "none") else min(count, root + 2 * layer)
    largest = max(root, layer)
    fixed = gathered * dtype.itemsize + largest * (dtype.itemsize + 4)  # a unit's gradient, and its sum in fp32
    fixed += LOGITS_COPIES * CHUNK_TOKENS * model.num_tokens * 4
    state = int(config.optimizer.memory.removesuffix("N"))
    if config.ewc.strength and (config.ewc.device == "device" or not torch.cuda.is_available()):
        state += 2 * DTYPES[config.ewc.dtype].itemsize
    if not (sharding.cpu_offload and torch.cuda.is_available()):
        fixed += math.ceil(count / shards) * state
    return fixed, bytes_per_token(saved_bytes(model_config, dtype), len(layers), config)


def bytes_per_token(saved: SavedBytes, layers: int, config: Config) -> int:
    """Bytes that a token keeps until its layer's backward, and one layer's worth of gradients while that runs.

    `selective` is counted like `none`, because it keeps the large tensors.
    """
    recomputed = -(-layers // config.model.checkpoint_every)
    kept_input = {"full": saved.layer_input, "offload": 0}.get(config.model.activation_checkpointing)
    if kept_input is None or (kept_input == 0 and not torch.cuda.is_available()):  # on a CPU nothing leaves its memory
        recomputed = 0 if kept_input is None else recomputed
        kept_input = kept_input or saved.layer_input
    in_backward = 2 * saved.layer if recomputed else saved.layer
    return (layers - recomputed) * saved.layer + recomputed * kept_input + saved.rest + in_backward


def largest_useful(config: Config, world_size: int) -> int:
    """Rows of a micro-batch that holds this rank's part of any step. With `global_tokens` there is no such bound."""
    if not config.batch.global_examples:
        return 2**20
    own = 1 - sum(source.share for source in config.data.mix)
    return max(1, math.ceil(config.batch.global_examples / own / world_size))


def _agree(
    rows: int, fits: int, recorded: int | None, timeout_minutes: float, world_size: int
) -> tuple[int, int, int | None]:
    """(the number recorded on rank 0, else the smallest over all ranks; the smallest that fits; rank 0's). A collective."""
    if world_size == 1:
        return recorded or rows, fits, recorded
    store = join(timeout_minutes, "size of the micro-batch")
    rank = int(os.environ["RANK"])
    store.set(f"micro_batch/{rank}", json.dumps([rows, fits, recorded]))
    found = [json.loads(store.get(f"micro_batch/{other}")) for other in range(world_size)]
    recorded = found[0][2]
    return recorded or min(one[0] for one in found), min(one[1] for one in found), recorded


def _recorded(run_directory: Path, world_size: int) -> int | None:
    """The number of the run's last start, if that had as many ranks."""
    if not (run_directory / "checkpoints" / "latest").exists():
        return None  # nothing to resume
    try:
        record = json.loads((run_directory / "config.json").read_text(encoding="utf-8"))
        rows = record["config"]["batch"]["micro_batch"]
        return rows if record["world_size"] == world_size and type(rows) is int and rows > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not started yet, or by an earlier version of this code
