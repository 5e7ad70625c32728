"""Time of attention in bf16 on a CPU, forward and backward of one layer: matrix products against torch's kernel.

    python -m bench.attention artifacts/models/SmolLM2-135M-Instruct

`products` is what training uses (model/product_attention.py). `fp32` and `bf16` are scaled_dot_product_attention for each
document, in fp32 (with the casts there and back) and in bf16.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from common.errors import run_script
from distributed.host_memory import keep_freed_memory
from model.architectures import read_model_config
from model.product_attention import product_attention

LENGTHS = {
    "32 x 60": (60,) * 32,
    "16 x 120": (120,) * 16,
    "8 x 100-400": (100, 150, 200, 250, 300, 350, 400, 250),
    "4 x 500": (500,) * 4,
    "1 x 2,000": (2000,),
    "1 x 2,860": (2860,),
}
ROUNDS = 4
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...], float], torch.Tensor]


def kernel(dtype: torch.dtype) -> Attention:
    """scaled_dot_product_attention in `dtype` for each document."""

    def attend(q, k, v, lengths, scaling) -> torch.Tensor:  # noqa: ANN001
        split = (x.to(dtype).split(lengths, dim=2) for x in (q, k, v))
        outputs = [
            F.scaled_dot_product_attention(*parts, is_causal=True, scale=scaling, enable_gqa=True)
            for parts in zip(*split, strict=True)
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2).to(q.dtype)

    return attend


def milliseconds(attend: Attention, tensors: list[torch.Tensor], lengths: tuple[int, ...]) -> tuple[float, float]:
    """(forward, backward)."""
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    start = time.perf_counter()
    output = attend(q, k, v, lengths, q.shape[-1] ** -0.5)
    middle = time.perf_counter()
    output.backward(torch.ones_like(output))
    return (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3


def main() -> None:
    """Print the best of ROUNDS rounds for each set of documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a Hugging Face model directory; only its config is read")
    config = read_model_config(parser.parse_args().model)
    keep_freed_memory()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    ways = {"fp32": kernel(torch.float32), "bf16": kernel(torch.bfloat16), "products": product_attention}
    print(f"{heads} heads, {kv_heads} of keys, of {head_dim}; {torch.get_num_threads()} threads; ms forward + backward")
    for name, lengths in LENGTHS.items():
        shapes = [(1, sum(lengths), count, head_dim) for count in (heads, kv_heads, kv_heads)]
        tensors = [torch.randn(shape).to(torch.bfloat16).transpose(1, 2) for shape in shapes]
        best = dict.fromkeys(ways, (float("inf"), float("inf")))
        for _ in range(ROUNDS):
            for way, attend in ways.items():
                best[way] = min(best[way], milliseconds(attend, tensors, lengths), key=sum)
        total = {way: sum(times) for way, times in best.items()}
        cells = "  ".join(f"{way} {a:.1f} + {b:.1f} = {a + b:.1f}" for way, (a, b) in best.items())
        print(f"{name:12} {cells}  {total['fp32'] / total['products']:.2f}x", flush=True)


if __name__ == "__main__":
    run_script(main)
