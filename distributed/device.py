"""The device of this process, and the line that says what all ranks run on."""

import importlib.util
import os
import platform
import re
import socket
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
)

from common.cores import available_cores
from common.errors import UserError
from distributed.host_memory import keep_freed_memory
from distributed.rank_names import name_ranks


def choose_device(local_rank: int, local_world: int) -> torch.device:
    """CUDA if the node has a GPU for every local rank; the CPU if it has none. Makes it the process's device.

    Raises UserError if it has GPUs, but fewer than local ranks.
    """
    count = torch.cuda.device_count()
    if 0 < count < local_world:
        raise UserError(
            f"this node ({socket.gethostname()}) has {count} GPU{'s' if count > 1 else ''} for {local_world} ranks; start with "
            f"--nproc_per_node={count}, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    if count:
        if "PYTORCH_ALLOC_CONF" not in os.environ:  # read when CUDA starts; no two micro-batches have the same lengths
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        _use_flash_attention_3(device)
        return device
    keep_freed_memory()
    # torchrun sets OMP_NUM_THREADS=1: each process gets its share of the cores instead. Without torchrun a user has set it.
    if "RANK" in os.environ or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // local_world))
    return torch.device("cpu")


def _use_flash_attention_3(device: torch.device) -> None:
    """Let torch's attention run FlashAttention 3, on Hopper, where its package is installed and torch knows it.

    https://docs.pytorch.org/docs/stable/nn.attention.html
    """
    is_installed = importlib.util.find_spec("flash_attn_interface") is not None
    if is_installed and "FA3" in list_flash_attention_impls() and torch.cuda.get_device_capability(device)[0] == 9:
        activate_flash_attention_impl("FA3")


def devices_line(gathered: list[tuple[tuple[str, str], str, str]]) -> str:
    """ "device: 16 x NVIDIA H100 80GB HBM3, NCCL, on 2 nodes". Unlike devices are listed with their ranks.

    gathered: (node, device type, `device_name`) by rank.
    """
    names = [name for _, _, name in gathered]
    backend = "NCCL" if all(kind == "cuda" for _, kind, _ in gathered) else "gloo"
    nodes = len({node for node, _, _ in gathered})
    where = f", on {nodes} node{'s' if nodes > 1 else ''}" if backend == "NCCL" or nodes > 1 else ""
    parts = []
    for kind in dict.fromkeys(names):
        ranks = [rank for rank, name in enumerate(names) if name == kind]
        parts.append(f"{len(ranks)} x {kind}" + f" ({name_ranks(ranks)})" * (len(ranks) < len(names)))
    unlike = "; they are not alike, and the slowest sets the pace" if len(parts) > 1 else ""
    return f"device: {' + '.join(parts)}, {backend}{where}{unlike}"


def device_name(device: torch.device) -> str:
    """The GPU's name, or "CPU (its model, its threads per rank)"."""
    if device.type == "cuda":
        kernel = current_flash_attention_impl()
        return torch.cuda.get_device_name(device) + (f" with {kernel}" if kernel else "")
    threads = torch.get_num_threads()
    return f"CPU ({processor()}, {threads} thread{'s' if threads > 1 else ''} each)"


def processor() -> str:
    """The name of the processor, as Linux gives it; else its type."""
    information = Path("/proc/cpuinfo")  # Linux
    text = information.read_text(encoding="utf-8", errors="replace") if information.is_file() else ""
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def mark(device: torch.device) -> Any:
    """Now: in seconds, or as an event of the device, for which nobody waits."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """The time from one `mark` to another one. The device must have reached both."""
    return end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1000
