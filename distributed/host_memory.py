"""How this process keeps host memory on a CPU: what glibc's allocator is told. No-op on macOS and musl."""

import ctypes
import os

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
