"""Starting the process group, under torchrun or alone, and agreeing without making a device wait."""

import ctypes
import os
import signal
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Who this process is. `flags` is a gloo group: its collectives run on the CPU and never wait for the GPU."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    flags: dist.ProcessGroup


def world_size_from_environment() -> tuple[int, int]:
    """What torchrun says before any process group exists: all ranks, and those of a node. 1, 1 for plain python."""
    return int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def start_process_group(timeout_minutes: float = 30.0) -> Ranks:
    """Join torchrun's processes, or make a group of one. CUDA with NCCL where there is a GPU for each, else CPU with gloo."""
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.device_count() >= local_world:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        _keep_freed_memory()
        # torchrun sets one thread a process; give each its share of the cores instead.
        torch.set_num_threads(
            max(1, len(os.sched_getaffinity(0)) // local_world) if hasattr(os, "sched_getaffinity") else 1
        )
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return Ranks(
        dist.get_rank(), dist.get_world_size(), local_rank, device, dist.new_group(backend="gloo", timeout=timeout)
    )


def _keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: by default each large tensor goes back to the kernel, and its pages are made anew.

    About 15% of a step on a CPU (docs/performance.md). Elsewhere (macOS, musl) there is nothing to tell.
    https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**28)


def agree_any(flag: bool, ranks: Ranks) -> bool:
    """Whether any rank says yes. Every rank must call it at the same place; all get the same answer."""
    answer = torch.tensor(int(flag))
    dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=ranks.flags)
    return bool(answer)


def barrier(ranks: Ranks) -> None:
    """Wait for all ranks, on the CPU."""
    dist.barrier(group=ranks.flags)


class StopSignal:
    """Remembers SIGTERM or SIGINT. Nothing happens in the handler: the loop asks and all ranks agree.

    torchrun passes a signal on to workers that may have had it from the terminal too, so a second one changes nothing.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name
