"""How fast the matrix products of a model's layers can be here, by themselves: the most that MFU can reach.

    python -m bench.shapes artifacts/models/SmolLM2-135M-Instruct --tokens 1900

Each linear layer's three products of a step (output, gradient of the input, gradient of the weight) for so many tokens, with
nothing between them, against the fastest square product (bench/peak.py). The head is left out: it sees targets alone.
"""

import argparse
import time
from collections import Counter

import torch
from torch import nn

from bench.peak import DTYPES, measured_peak
from model.architectures import read_model_config
from model.language_model import build_on_meta

SECONDS = 0.3  # for each product


def seconds_of(a: torch.Tensor, b: torch.Tensor) -> float:
    """Median seconds of a @ b."""
    a @ b
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < SECONDS or len(times) < 5:
        start = time.perf_counter()
        a @ b
        if a.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def main() -> None:
    """Print a line for each shape, then the sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face folder; only its config is read")
    parser.add_argument("--tokens", type=int, default=1900, help="of a micro-batch (%(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    causal_lm = build_on_meta(read_model_config(arguments.model)).causal_lm
    head = causal_lm.get_output_embeddings()
    shapes = Counter(tuple(m.weight.shape) for m in causal_lm.modules() if isinstance(m, nn.Linear) and m is not head)
    peak = measured_peak(device, DTYPES[arguments.dtype])
    print(f"peak {peak / 1e12:.2f} TFLOP/s ({arguments.dtype}, {torch.get_num_threads()} threads)")
    total, flops = 0.0, 0
    for (outputs, inputs), count in sorted(shapes.items()):
        sizes = ((arguments.tokens, inputs), (outputs, inputs), (arguments.tokens, outputs))
        x, weight, gradient = (torch.randn(size, device=device).to(DTYPES[arguments.dtype]) for size in sizes)
        each = [seconds_of(x, weight.T), seconds_of(gradient, weight), seconds_of(gradient.T, x)]
        work = 2 * arguments.tokens * inputs * outputs
        shares = ", ".join(f"{work / seconds / peak:.0%}" for seconds in each)
        print(f"{count:4} x {inputs} -> {outputs}: {shares} of the peak (output, input's gradient, weight's gradient)")
        total, flops = total + count * sum(each), flops + count * 3 * work
    print(f"all {sum(shapes.values())} layers: {total:.2f} s a step, {flops / total / peak:.0%} of the peak")


if __name__ == "__main__":
    main()
