"""train.py as one forked rank of a test: one thread, and small matrices to measure the peak."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

import model.flops
import train
from common.errors import run_script

torch.set_num_threads(1)
torch.set_num_threads = lambda count: None
measured_flops = model.flops.measured_flops
model.flops.measured_flops = lambda device, dtype, size: measured_flops(device, dtype, 64)

run_script(train.main)
