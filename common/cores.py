"""The number of CPU cores that this process may use."""

import os
from pathlib import Path

QUOTAS = (  # control group files: quota and period in the same file (version 2) or in two (version 1)
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)


def available_cores() -> int:
    """Return the number of cores that the process may run on, or fewer if its container has a CPU quota. At least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_quotas()]))


def _quotas() -> list[int]:
    quotas = []
    for files in QUOTAS:
        try:
            quota, period = " ".join(Path(file).read_text() for file in files).split()
            if int(quota) > 0:
                quotas.append(-(-int(quota) // int(period)))
        except (OSError, ValueError):
            continue  # no such file, or "max": no quota
    return quotas
