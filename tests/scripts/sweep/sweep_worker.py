"""Run scripts/sweep.py with forked children, which need not import the libraries: sweep_worker.py ARGUMENTS.

test_children.py has the tests of children with an interpreter of their own: signals, cores, and the death of the parent.
"""

import gc
import sys
from pathlib import Path
from typing import BinaryIO

root = Path(__file__).resolve().parents[3]
sys.path[0] = str(root)

import torch

import model.flops
import scripts.plan.command  # noqa: F401  so that the children need not import it
import scripts.sweep.runs
import train  # noqa: F401
from tests.code_memory import remember_code
from tests.zygote import Forked, Zygote, run


def start_child(command: list[str], environment: dict[str, str], output: BinaryIO) -> Forked:
    """Replace start_child of common/child_process.py."""
    return zygote.start(command, environment, Path(output.name))


if __name__ == "__main__":
    remember_code()
    torch.set_num_threads = lambda count: None  # the forked children keep the one thread of their parent
    measured_flops = model.flops.measured_flops
    model.flops.measured_flops = lambda device, dtype, size: measured_flops(device, dtype, 64)
    gc.freeze()
    zygote = Zygote()
    scripts.sweep.runs.tied_to_parent = lambda command, *options: command
    scripts.sweep.runs.start_child = start_child
    run([str(root / "scripts" / "sweep.py"), *sys.argv[1:]])
