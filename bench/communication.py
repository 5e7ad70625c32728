"""What FSDP's collectives of one step cost by themselves, for a model of so many parameters.

    torchrun --nproc_per_node=2 -m bench.communication --parameters 134515008

The all-gather of bf16 weights and the reduce-scatter of fp32 gradients, each in one piece, over the processes' own backend.
"""

import argparse
import time

import torch
import torch.distributed as dist

from common.errors import leave
from distributed.process_group import start_process_group

ROUNDS = 5


def main() -> None:
    """Print the median of each, on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=134_515_008, help="SmolLM2-135M's by default")
    arguments = parser.parse_args()
    ranks = start_process_group()
    part = -(-arguments.parameters // ranks.world_size)
    for name, dtype, collective, sizes in (
        ("all-gather of bf16 weights", torch.bfloat16, dist.all_gather_into_tensor, (part * ranks.world_size, part)),
        (
            "reduce-scatter of fp32 gradients",
            torch.float32,
            dist.reduce_scatter_tensor,
            (part, part * ranks.world_size),
        ),
    ):
        output, given = (torch.ones(size, dtype=dtype, device=ranks.device) for size in sizes)
        seconds = []
        for _ in range(ROUNDS):
            dist.barrier()
            start = time.perf_counter()
            collective(output, given)
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        if ranks.rank == 0:
            whole = part * ranks.world_size * dtype.itemsize / 1e6
            print(f"{name}, {whole:,.0f} MB on {ranks.world_size} ranks: {sorted(seconds)[ROUNDS // 2]:.2f} s")
    dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main()
