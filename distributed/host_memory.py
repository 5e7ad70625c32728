"""Host memory: how much a process may still take, and settings by which a CPU process keeps freed memory."""

import ctypes
import os
import re
from pathlib import Path

import torch

# Capacity of the two caches in which oneDNN and torch keep compiled matrix products. By default they keep up to 1,024 products of
# about 0.2 MB, for every length that a micro-batch has had. The layers of a micro-batch share about 12 products, and 6 more for
# each document; with a smaller cache every layer would compile them again.
COMPILED_PRODUCTS = "128"


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, and make oneDNN keep fewer compiled products, because most lengths never come again.

    By default glibc returns every large tensor to the kernel, and the next tensor faults new pages in. Call this before the first
    product and before another thread allocates: later the limit to a single arena has no effect, and gloo's threads would map and
    unmap each larger block. mallopt is not called if there is a GPU. https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", COMPILED_PRODUCTS)
    os.environ.setdefault("LRU_CACHE_CAPACITY", COMPILED_PRODUCTS)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt and not torch.cuda.device_count():
        trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
        mallopt(arena_max, 1)
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**28)


CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device, local_world: int) -> int:
    """Return the bytes that this process may still take: the free memory of its GPU, or its share of the host's free memory.

    `local_world` is the number of processes that share the host. On Linux the cgroup's limit counts as well (containers).
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _available_bytes() // local_world


def _available_bytes() -> int:
    information = Path("/proc/meminfo")
    if not information.is_file():  # macOS: half of the installed memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    lines = dict(line.split(":", 1) for line in information.read_text(encoding="utf-8").splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    # cgroup v2 and v1
    for limit, used, total in (
        ("memory.max", "memory.current", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_"),
    ):
        stat = (CGROUP / limit).with_name("memory.stat")
        try:
            most, taken, figures = (path.read_text(encoding="ascii") for path in (CGROUP / limit, CGROUP / used, stat))
        except OSError:
            continue
        if most.strip() != "max":
            # The cgroup counts cached files as used, and the kernel drops them when memory is needed.
            cached = sum(int(n) for n in re.findall(rf"^{total}(?:in)?active_file (\d+)$", figures, re.MULTILINE))
            available = min(available, max(0, int(most) - int(taken) + cached))
    return available
