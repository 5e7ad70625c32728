"""Memory of this process: how much it holds, how much is free, and how a CPU process keeps what it has freed."""

import ctypes
import os
import re
from pathlib import Path

import torch

# Of each of the two caches in which oneDNN and torch keep compiled products: those of every length that a micro-batch has
# had, up to 1,024 of some 0.2 MB, unless they are told otherwise. The layers of a micro-batch share about 12, and 6 more for
# each document: with fewer than that, every layer would compile them again.
COMPILED_PRODUCTS = "128"


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory, and oneDNN not to keep what it compiles for lengths that do not come again.

    glibc returns every large tensor to the kernel by default and faults new pages in. Call this before the first product,
    and before another thread allocates: later the limit of one arena has no effect, and gloo's threads would map and unmap each
    larger block. No-op with a GPU. https://man7.org/linux/man-pages/man3/mallopt.3.html
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
            # Pages of files are counted as used, and the kernel gives them up when memory is needed.
            cached = sum(int(n) for n in re.findall(rf"^{total}(?:in)?active_file (\d+)$", figures, re.MULTILINE))
            available = min(available, max(0, int(most) - int(taken) + cached))
    return available
