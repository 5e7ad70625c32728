"""batch.micro_batch=auto: the largest micro-batch that the memory of every rank holds, by model/memory.py."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from transformers import PretrainedConfig

from configs.config import Config
from configs.load import replace
from distributed.checkpoint_directory import complete_checkpoints
from distributed.device import choose_device
from distributed.host_memory import free_bytes
from distributed.rendezvous import join
from model.dtypes import has_native_bf16
from model.language_model import PackedLanguageModel
from training.checkpointer import newest_start

MOST_ROWS = 2**20


def settle_micro_batch(
    config: Config,
    model: PackedLanguageModel,
    model_config: PretrainedConfig,
    run_directory: Path,
    world_size: int,
    say: Callable[[str], None],
) -> Config:
    """Return the config with a number in `batch.micro_batch`. If it was `auto`, every rank must call this.

    model: on meta. All ranks take the smallest number that any rank has computed. A resume with the same numbers of ranks and
    of ranks that share a micro-batch takes the number of the run's last start from config.json, so that it repeats the same
    sums.
    """
    if config.batch.micro_batch != "auto":
        return config
    from model.memory import USABLE, layout_of, rows_of_auto, shape_of

    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = choose_device(local_rank, local_world)  # free_bytes starts CUDA, whose allocator then reads its settings
    free = free_bytes(device, local_world)
    planned = config
    if not has_native_bf16(device):  # all ranks will compute in fp32 (training/start.py: agree_on_dtype)
        planned = replace(config, "model.compute_dtype", "fp32")
    shape = shape_of(model, model_config, config.model.layer_class)
    fits = rows_of_auto(shape, planned, layout_of(config, world_size, local_world, device.type), free, MOST_ROWS)
    recorded = None
    if complete_checkpoints(run_directory / "checkpoints"):
        start = newest_start(run_directory)
        if start.get("world_size") == world_size:
            context = start["config"]["sharding"]["context"]
            recorded = start["config"]["batch"]["micro_batch"] if context == config.sharding.context else None
    if world_size > 1:
        store = join(config.run.timeout_minutes, "size of the micro-batch")
        store.set(f"micro_batch/{os.environ['RANK']}", json.dumps([fits, recorded]))
        by_rank = [json.loads(store.get(f"micro_batch/{rank}")) for rank in range(world_size)]
        fits, recorded = min(fits for fits, _ in by_rank), by_rank[0][1]
    chosen = recorded or max(1, fits)
    rows = min(chosen, largest_useful(config, world_size))
    why = "as at the last start" if recorded else "a rank's part of any step" if rows < chosen else "what memory holds"
    of = f"{rows * config.data.length:,} tokens" if config.data.packing else f"{rows} examples"
    say(
        f"batch.micro_batch=auto: {rows} ({of} at most), {why}; memory holds {fits}: {USABLE[device.type]:.0%} of "
        f"{free / 2**30:.1f} GiB free for a rank"
    )
    if fits < 1:
        more = "more ranks" if device.type == "cuda" else "fewer processes on this machine"
        say(
            f"warning: not even {config.data.length} tokens are expected to fit into memory: use "
            f"model.activation_checkpointing=full, lower data.sequence_length or use {more}"
        )
    return with_rows(config, rows)


def with_rows(config: Config, rows: int) -> Config:
    """Return the config with this number in `batch.micro_batch`."""
    return replace(config, "batch.micro_batch", rows)


def largest_useful(config: Config, world_size: int) -> int:
    """Return the rows that hold this rank's, or its group's, part of any step. With `global_tokens` there is no bound."""
    if not config.batch.global_examples:
        return MOST_ROWS
    own = 1 - sum(source.share for source in config.data.mix)
    return max(1, math.ceil(config.batch.global_examples / own / max(1, world_size // config.sharding.context)))
