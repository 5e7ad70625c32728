"""Choose the device of a process, describe the devices of all ranks in a line, and measure time on a device."""

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
    """Return this rank's GPU, or the CPU if the node has no GPU, and make it the device of this process.

    Raises UserError if the node has GPUs, but fewer than local ranks.
    """
    count = torch.cuda.device_count()
    if 0 < count < local_world:
        raise UserError(
            f"this node ({socket.gethostname()}) has {count} GPU{'s' if count > 1 else ''} for {local_world} ranks; start with "
            f"--nproc_per_node={count}, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    if count:
        # Expandable segments, because every micro-batch has other lengths. torch reads the variable when CUDA starts.
        if "PYTORCH_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # torch 2.15's varlen_attn prefers cuDNN on compute capability 9 and 10, even to FlashAttention 3. No test here ran it.
        torch.backends.cuda.enable_cudnn_sdp(False)
        _use_flash_attention_3(device)
        return device
    keep_freed_memory()
    # torchrun sets OMP_NUM_THREADS=1; each process gets its share of the cores instead. Without torchrun the user's value stays.
    if "RANK" in os.environ or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // local_world))
    return torch.device("cpu")


def _use_flash_attention_3(device: torch.device) -> None:
    """Activate FlashAttention 3 on Hopper, if its package is installed and this torch supports it.

    https://docs.pytorch.org/docs/stable/nn.attention.html
    """
    is_installed = importlib.util.find_spec("flash_attn_interface") is not None
    if is_installed and "FA3" in list_flash_attention_impls() and torch.cuda.get_device_capability(device)[0] == 9:
        activate_flash_attention_impl("FA3")


def devices_line(gathered: list[tuple[tuple[str, str], str, str]]) -> str:
    """Return a line such as "device: 16 x NVIDIA H100 80GB HBM3, NCCL, on 2 nodes".

    If the ranks run on different devices, the line lists each device with its ranks. `gathered` has (node, device type,
    `device_name`) for each rank.
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
    untried = ""
    if backend == "NCCL" and torch.__version__ >= "2.14":  # NCCL2 is its default backend
        untried = "; this project has not run on GPUs with torch 2.14 or later: run scripts/gpu_proof.sh first, or install torch<2.14"
    return f"device: {' + '.join(parts)}, {backend}{where}{unlike}{untried}"


def device_name(device: torch.device) -> str:
    """Return the GPU's name and attention kernel, or "CPU (the processor's name, the number of threads of a rank)"."""
    if device.type == "cuda":
        kernel = current_flash_attention_impl()
        return torch.cuda.get_device_name(device) + (f" with {kernel}" if kernel else "")
    threads = torch.get_num_threads()
    return f"CPU ({processor()}, {threads} thread{'s' if threads > 1 else ''} each)"


def processor() -> str:
    """Return the name of the processor from Linux's /proc/cpuinfo, or the type of the processor elsewhere."""
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8", errors="replace") if information.is_file() else ""
    match = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def mark(device: torch.device) -> Any:
    """Return the current time: seconds on a CPU, an event on a GPU. It does not wait for the GPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """Return the seconds between two results of `mark`. The device must have reached both events."""
    return end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1000
