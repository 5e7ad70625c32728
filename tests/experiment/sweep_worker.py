"""scripts/sweep.py whose children are forked, so that none of them imports the libraries: sweep_worker.py ARGUMENTS.

tests/experiment/test_children.py has what a child of its own interpreter gets: signals, cores, and the death of its parent.
"""

import gc
import sys
from pathlib import Path
from typing import BinaryIO

root = Path(__file__).resolve().parents[2]
sys.path[0] = str(root)

import torch

import experiment.commands
import model.flops
import tools.plan_command  # noqa: F401  what the children would import, each for itself
import train  # noqa: F401
from tests.code_memory import remember_code
from tests.zygote import Forked, Zygote, run


def start_child(command: list[str], environment: dict[str, str], output: BinaryIO) -> Forked:
    """In place of that of common/child_process.py."""
    return zygote.start(command, environment, Path(output.name))


if __name__ == "__main__":
    remember_code()
    torch.set_num_threads = lambda count: None  # one thread, that of the warm parent
    measured_flops = model.flops.measured_flops
    model.flops.measured_flops = lambda device, dtype, size: measured_flops(device, dtype, 64)
    gc.freeze()
    zygote = Zygote()
    experiment.commands.tied_to_parent = lambda command, *options: command
    experiment.commands.start_child = start_child
    run([str(root / "scripts" / "sweep.py"), *sys.argv[1:]])
