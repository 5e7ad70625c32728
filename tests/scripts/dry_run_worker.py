"""Run train.py --dry-run, which becomes scripts/plan.py, in one interpreter with a few settings: dry_run_worker.py ARGUMENTS."""

import os
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path[0] = str(root)

import scripts.plan.machines
import scripts.plan.search
from tests.zygote import run

scripts.plan.search.MEMORIES, scripts.plan.search.CHECKPOINTING = ("16N", "8N"), (("none", 1), ("full", 1))
measured_flops = scripts.plan.machines.measured_flops
scripts.plan.machines.measured_flops = lambda device, dtype, size: measured_flops(device, dtype, 64)
os.execv = lambda _, command: run(command[1:])
run([str(root / "train.py"), *sys.argv[1:]])
