"""How Python children are started: under torchrun, and so that they do not outlive their parent."""

import os
import signal
import sys
from collections.abc import Sequence

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
