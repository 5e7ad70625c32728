"""Time of FSDP's collectives in one step, measured in isolation, for a model of a given number of parameters.

    torchrun --nproc_per_node=2 -m bench.communication --parameters 134515008

Measures one all-gather of all weights in bf16 and one reduce-scatter of all gradients in fp32 and in bf16, each as a
single operation, with the default backend of the process group. GB/s: the bytes that one rank sends, per second.
"""

import argparse
import time

import torch
import torch.distributed as dist

from common.errors import exit_process
from distributed.process_group import start_process_group

ROUNDS = 5


def main() -> None:
    """Print the median time of each collective on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=134_515_008, help="default: those of SmolLM2-135M")
    arguments = parser.parse_args()
    ranks = start_process_group()
    shard = -(-arguments.parameters // ranks.world_size)
    full = shard * ranks.world_size
    for name, dtype, collective, output_size, input_size in (
        ("all-gather of bf16 weights", torch.bfloat16, dist.all_gather_into_tensor, full, shard),
        ("reduce-scatter of fp32 gradients", torch.float32, dist.reduce_scatter_tensor, shard, full),
        ("reduce-scatter of bf16 gradients", torch.bfloat16, dist.reduce_scatter_tensor, shard, full),
    ):
        output, values = (torch.ones(size, dtype=dtype, device=ranks.device) for size in (output_size, input_size))
        seconds = []
        for _ in range(ROUNDS):
            dist.barrier()
            start = time.perf_counter()
            collective(output, values)
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        if ranks.rank == 0:
            median = sorted(seconds)[ROUNDS // 2]
            sent = shard * (ranks.world_size - 1) * dtype.itemsize / 1e9
            print(
                f"{name}, {full * dtype.itemsize / 1e6:,.0f} MB on {ranks.world_size} ranks: {median:.2f} s, "
                f"{sent / median:.2f} GB/s"
            )
    dist.destroy_process_group()
    exit_process(0)


if __name__ == "__main__":
    main()
