"""Upper bound of MFU on this machine: speed of the matrix products with the shapes of a model's layers, in isolation.

    python -m bench.shapes artifacts/models/SmolLM2-135M-Instruct --tokens 1900

Times the three products of each linear layer in a step (output, gradient of the input, gradient of the weight) for a
micro-batch of the given number of tokens, and compares them with the fastest square product (bench/peak.py). The head is
left out, because it only sees target tokens.
"""

import argparse
import time
from collections import Counter

import torch
from torch import nn

from bench.peak import measured_peak
from common.dtypes import DTYPES
from model.architectures import read_model_config
from model.language_model import build_on_meta

SECONDS = 0.3  # per product


def seconds_per_product(a: torch.Tensor, b: torch.Tensor) -> float:
    """Median seconds of a @ b."""
    torch.matmul(a, b)
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < SECONDS or len(times) < 5:
        start = time.perf_counter()
        torch.matmul(a, b)
        if a.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def main() -> None:
    """Print one line per layer shape, then the total."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face model directory; only its config is read")
    parser.add_argument("--tokens", type=int, default=1900, help="tokens per micro-batch (%(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    causal_lm = build_on_meta(read_model_config(arguments.model)).causal_lm
    head = causal_lm.get_output_embeddings()
    shapes = Counter(tuple(m.weight.shape) for m in causal_lm.modules() if isinstance(m, nn.Linear) and m is not head)
    peak = measured_peak(device, DTYPES[arguments.dtype])
    print(f"peak {peak / 1e12:.2f} TFLOP/s ({arguments.dtype}, {torch.get_num_threads()} threads)")
    total_seconds, total_flops = 0.0, 0
    for (outputs, inputs), count in sorted(shapes.items()):
        sizes = ((arguments.tokens, inputs), (outputs, inputs), (arguments.tokens, outputs))
        x, weight, gradient = (torch.randn(size, device=device).to(DTYPES[arguments.dtype]) for size in sizes)
        products = ((x, weight.T), (gradient, weight), (gradient.T, x))
        seconds = [seconds_per_product(a, b) for a, b in products]
        flops = 2 * arguments.tokens * inputs * outputs
        shares = ", ".join(f"{flops / s / peak:.0%}" for s in seconds)
        print(
            f"{count:4} x {inputs} -> {outputs}: {shares} of the peak (output, gradient of input, gradient of weight)"
        )
        total_seconds, total_flops = total_seconds + count * sum(seconds), total_flops + count * 3 * flops
    share = total_flops / total_seconds / peak
    print(f"all {sum(shapes.values())} layers: {total_seconds:.2f} s per step, {share:.0%} of the peak")


if __name__ == "__main__":
    main()
