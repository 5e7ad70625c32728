"""Run train.py for test_two_hosts.py as on a real node, but with one thread and a short measurement of the peak FLOP/s.

PLANT=FAULT torchrun --nnodes=2 --nproc_per_node=1 tests/distributed/host_worker.py CONFIG.py [section.key=value ...]

FAULT is a fault of train_worker.py, or empty.
"""

import gc
import os
import sys
from pathlib import Path

gc.disable()  # while libraries are imported, as in train.py
root = Path(__file__).resolve().parents[2]
sys.path[0] = str(root)

import torch

import model.flops
import train
from common.errors import run_script
from tests.code_memory import remember_code
from tests.distributed.train_worker import plant

if __name__ == "__main__":
    remember_code()
    torch.set_num_threads = lambda count: None  # keep OMP_NUM_THREADS=1, as in the run `whole`
    measured_flops = model.flops.measured_flops
    model.flops.measured_flops = lambda device, dtype, size: measured_flops(device, dtype, 64)
    plant(os.environ.get("PLANT"), setattr)
    gc.freeze()
    gc.enable()
    run_script(train.main)
