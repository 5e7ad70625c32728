"""The peak that MFU is measured against: python -m bench.peak DEVICE DTYPE prints FLOP/s as JSON.

Measured, on CUDA too (a data sheet's peak is not reached at a card's power limit): the fastest of several square matrix
products, with all threads that an arm may use.
"""

import json
import sys
import time

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SECONDS = 0.5  # for each size: boost clocks settle, and a pause of the machine does not matter


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest product of n x n matrices in `dtype`."""
    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (1024, 2048, 4096):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        begin = time.perf_counter()
        while time.perf_counter() - begin < SECONDS:
            start = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    print(json.dumps(measured_peak(torch.device(sys.argv[1]), DTYPES[sys.argv[2]])))
