"""Start train.py and the scripts as children, each with its share of the machine and a log.

The children have sessions of their own, so that Ctrl-C in a terminal does not reach them: experiment/commands.py ends them.
"""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from common.child_process import environment_of_no_rank, start_child, tied_to_parent, under_torchrun
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def start(
    script: str, options: Sequence[str], log: Path, processes: int = 1, slot: int = 0, parallel: int = 1
) -> subprocess.Popen:
    """Start a script of the project, with torchrun if it has several processes. Its output is added to `log`.

    It is the one with the number `slot` of `parallel` children that share the cores and GPUs. Raises UserError if there are
    too few GPUs.
    """
    command = [*under_torchrun(processes), str(ROOT / script), *options]
    environment = environment_of_no_rank() | _gpus(slot, parallel, processes)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"\n$ {script} {' '.join(options)}\n".encode())
        file.flush()
        # If this process is killed, its children save a checkpoint and end.
        return start_child(tied_to_parent(command, signal.SIGTERM, _cores(slot, parallel)), environment, file)


def _cores(slot: int, parallel: int) -> list[int] | None:
    """The cores of one of `parallel` children: train.py starts as many threads as it has cores."""
    if parallel == 1 or not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return cores[slot * len(cores) // parallel : (slot + 1) * len(cores) // parallel] or None


def _gpus(slot: int, parallel: int, processes: int) -> dict[str, str]:
    """The environment variable that gives one of `parallel` children its GPUs; empty without GPUs."""
    if parallel == 1:
        return {}
    import torch  # slow to import

    count = torch.cuda.device_count()
    if not count:
        return {}
    if count < parallel * processes:
        raise UserError(f"{parallel} x {processes} processes at once need as many GPUs, and there are {count}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": ",".join(visible[slot * processes : (slot + 1) * processes])}
