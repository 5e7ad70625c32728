"""Start child processes, under torchrun or alone, so that none outlives its parent. Read why one ended from its output."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

# Variables that torchrun sets for its ranks, besides those that begin with the words of `_ELASTIC`.
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
_ELASTIC = ("TORCHELASTIC_", "TORCH_ELASTIC_", "PET_")

# prctl(PR_SET_PDEATHSIG) survives exec: https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
_START = """
import os, sys
parent, number, cores = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if sys.platform == "linux":
    import ctypes
    if cores:
        os.sched_setaffinity(0, set(map(int, cores.split(","))))
    ctypes.CDLL(None).prctl(1, number)
    if os.getppid() != parent:
        os._exit(1)
os.execv(sys.executable, [sys.executable, *sys.argv[4:]])
"""


def under_torchrun(processes: int) -> list[str]:
    """Return the arguments between `python` and a script that start it in `processes` processes: [] for a single process."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []


def tied_to_parent(
    command: Sequence[str], number: int = signal.SIGKILL, cores: Sequence[int] | None = None
) -> list[str]:
    """Return the command line that runs `python COMMAND` as a child of this process.

    On Linux the kernel sends the child the signal `number` when the thread that starts it ends, even if it is killed, and
    restricts it to `cores` (None: the cores of this process). On other systems it is an ordinary child.
    """
    bound = ",".join(map(str, cores or ()))
    return [sys.executable, "-I", "-S", "-c", _START, str(os.getpid()), str(int(number)), bound, *command]


def environment_of_no_rank() -> dict[str, str]:
    """Return this process's environment without torchrun's variables, for a child that is no rank."""
    return {
        key: value for key, value in os.environ.items() if key not in OF_A_LAUNCHER and not key.startswith(_ELASTIC)
    }


def start_child(
    command: Sequence[str], environment: Mapping[str, str], output: BinaryIO, directory: str | Path | None = None
) -> subprocess.Popen:
    """Start a command in its own session, out of reach of Ctrl-C, with no input and all output in one file."""
    return subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def last_words(text: str) -> str:
    """Return the reason for a process's end: its last `error:` line, else its last exception, else its last line."""
    lines = text.splitlines()
    for pattern in (r"error: (.*)", r"((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b.*)", r"(.*\S.*)"):
        if reasons := [match[1] for line in lines if (match := re.match(pattern, line))]:
            return reasons[-1]
    return ""
