"""Measured peak FLOP/s, the denominator of MFU: python -m bench.peak DEVICE DTYPE prints it as JSON.

It is measured on CUDA too, because a card at its power limit does not reach the peak of its data sheet. The result is the
fastest product of two square matrices of several sizes, with all threads that an arm may use.
"""

import json
import sys
import time

import torch

from common.dtypes import DTYPES

SECONDS = 0.5  # per size: long enough for boost clocks to settle and to outlast a short pause of the machine


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest product of two n x n matrices in `dtype`."""
    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (1024, 2048, 4096):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        begin = time.perf_counter()
        while time.perf_counter() - begin < SECONDS:
            start = time.perf_counter()
            torch.matmul(a, b)
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    print(json.dumps(measured_peak(torch.device(sys.argv[1]), DTYPES[sys.argv[2]])))
