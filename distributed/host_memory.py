"""Memory of this process: how much is free, and how a CPU process keeps what it has freed."""

import ctypes
import os
from pathlib import Path

import torch


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory. By default it returns every large tensor to the kernel and faults new pages in.

    Call it before another thread allocates, e.g. before tokenising: later the limit of one arena has no effect. With arenas
    of their own, whose heaps end at 64 MiB, gloo's threads would map and unmap each larger block. No-op with a GPU, where
    the large tensors are not in host memory. https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt and not torch.cuda.device_count():
        trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
        mallopt(arena_max, 1)
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**28)


def free_bytes(device: torch.device, local_world: int) -> int:
    """Memory that this process may still take: what is free on its GPU, or its share of what is available on the host.

    local_world: number of processes that share the host. On Linux the limit of the cgroup counts as well (containers).
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _available_bytes() // local_world


def _available_bytes() -> int:
    information = Path("/proc/meminfo")
    if not information.is_file():  # macOS: half of what is built in
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    lines = dict(line.split(":", 1) for line in information.read_text(encoding="utf-8").splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    for limit, used in (
        ("memory.max", "memory.current"),  # cgroup v2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # v1
    ):
        try:
            texts = [(Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip() for name in (limit, used)]
        except OSError:
            continue
        if texts[0] != "max":
            available = min(available, max(0, int(texts[0]) - int(texts[1])))
    return available
