"""The number of CPU cores that this process may use."""

import os
from pathlib import Path

QUOTAS = (  # files of a control group: quota and period in one (version 2), or in two (version 1)
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)


def available_cores() -> int:
    """Cores that the process is bound to, or fewer if its container has a quota of CPU time. At least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_quotas()]))


def _quotas() -> list[int]:
    found = []
    for files in QUOTAS:
        try:
            quota, period = " ".join(Path(file).read_text() for file in files).split()
            if int(quota) > 0:
                found.append(-(-int(quota) // int(period)))
        except (OSError, ValueError):
            continue  # no such file, or "max": no quota
    return found
