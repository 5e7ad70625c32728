"""How children are started: under torchrun, and so that they do not outlive their parent; and what they say last."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

# What torchrun sets for its ranks, beside variables that begin with these words.
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
_ELASTIC = ("TORCHELASTIC_", "TORCH_ELASTIC_", "PET_")

# prctl(PR_SET_PDEATHSIG) holds on across exec: https://man7.org/linux/man-pages/man2/PR_SET_PDEATHSIG.2const.html
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
    """What stands between `python` and a script that so many processes of this machine run: nothing for one."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []


def tied_to_parent(
    command: Sequence[str], number: int = signal.SIGKILL, cores: Sequence[int] | None = None
) -> list[str]:
    """The command line that runs `python COMMAND` as a child of this process.

    On Linux the kernel sends it the signal `number` when the thread that starts it ends, however it ends, and it may use only
    `cores` (None: those of the parent). Elsewhere it is a child like any other.
    """
    bound = ",".join(map(str, cores or ()))
    return [sys.executable, "-I", "-S", "-c", _START, str(os.getpid()), str(int(number)), bound, *command]


def environment_of_no_rank() -> dict[str, str]:
    """The environment of a child that is no rank of the launcher of this process."""
    return {
        key: value for key, value in os.environ.items() if key not in OF_A_LAUNCHER and not key.startswith(_ELASTIC)
    }


def start_child(
    command: Sequence[str], environment: Mapping[str, str], output: BinaryIO, directory: str | Path | None = None
) -> subprocess.Popen:
    """Start a command in a session of its own, which Ctrl-C does not reach, without input and with all it prints in one file."""
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
    """Why a process says that it ended: its last `error:` line, else the exception of a traceback, else its last line so far."""
    lines = text.splitlines()
    for pattern in (r"error: (.*)", r"((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b.*)", r"(.*\S.*)"):
        if found := [match[1] for line in lines if (match := re.match(pattern, line))]:
            return found[-1]
    return ""
