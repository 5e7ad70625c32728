"""The process group, under torchrun or in a single process, and agreement between ranks without a device wait."""

import ctypes
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from common.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place among all ranks.

    `flags` is a gloo group. Its collectives run on the CPU and never wait for the GPU.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    flags: dist.ProcessGroup


def world_size_from_environment() -> tuple[int, int]:
    """(ranks in total, ranks on this node), as set by torchrun. Needs no process group; (1, 1) for plain python."""
    return int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def start_process_group(timeout_minutes: float = 30.0) -> Ranks:
    """Join torchrun's processes, or start a group of one.

    The device is CUDA with NCCL if the node has a GPU for every local rank, else the CPU with gloo.
    """
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.device_count() >= local_world:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        _keep_freed_memory()
        # torchrun sets OMP_NUM_THREADS=1; give each process its share of the cores instead.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        torch.set_num_threads(max(1, cores // local_world))
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    flags = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(flags, dist.ProcessGroup)  # an int on processes outside of the group, and there is none
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device, flags)


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory. By default it returns every large tensor to the kernel and faults new pages in.

    Steps on a CPU then fault fewer pages. No-op on macOS and musl.
    https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        trim_threshold, top_pad, mmap_max = -1, -2, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**28)


def agree_any(flag: bool, ranks: Ranks) -> bool:
    """Whether `flag` is true on any rank. A collective: every rank calls it at the same point and gets the same answer."""
    answer = torch.tensor(int(flag))
    dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=ranks.flags)
    return bool(answer)


def read_on_first(read: Callable[[], T], ranks: Ranks) -> T:
    """Call `read()` on rank 0 alone; every rank gets its result, or raises its UserError. A collective.

    For everything read from disk: two nodes may see a shared file system at different moments. An OSError of rank 0
    becomes a UserError on all ranks.
    """
    box: list = [None, None]
    if ranks.rank == 0:
        try:
            box[0] = read()
        except UserError as error:
            box[1] = str(error)
        except OSError as error:
            box[1] = f"{error.filename or 'rank 0'}: {error.strerror or error}"
    dist.broadcast_object_list(box, src=0, group=ranks.flags)
    value, problem = box
    if problem is not None:
        raise UserError(problem)
    return value


def gather_objects(value: T, ranks: Ranks) -> list[T]:
    """Every rank's `value`, by rank. A collective. Values are pickled: give small ones."""
    values: list = [None] * ranks.world_size
    dist.all_gather_object(values, value, group=ranks.flags)
    return values


def barrier(ranks: Ranks) -> None:
    """Wait for all ranks, on the CPU."""
    dist.barrier(group=ranks.flags)


class StopSignal:
    """Remembers SIGTERM or SIGINT. The handler only sets `name`; the loop polls `agreed` on all ranks.

    torchrun forwards signals to workers that may have received them from the terminal already, so a second one changes
    nothing.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.name: str | None = None  # of the signal that this process received
        self.ranks = ranks
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def agreed(self) -> bool:
        """Whether any rank has received a signal. A collective: all ranks get the same answer."""
        return agree_any(self.name is not None, self.ranks)

    def _remember(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name
