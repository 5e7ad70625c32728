"""train.py --dry-run, which becomes scripts/plan.py, in one interpreter and with a few settings: dry_run_worker.py ARGUMENTS."""

import os
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path[0] = str(root)

import tools.plan
from tests.zygote import run

tools.plan.MEMORIES, tools.plan.CHECKPOINTING = ("16N", "8N"), (("none", 1), ("full", 1))
measured_flops = tools.plan.measured_flops
tools.plan.measured_flops = lambda device, dtype, size: measured_flops(device, dtype, 64)
os.execv = lambda _, command: run(command[1:])
run([str(root / "train.py"), *sys.argv[1:]])
