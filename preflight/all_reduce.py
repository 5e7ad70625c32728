"""Time one all-reduce on the devices of all ranks, and write it to a file: python -m preflight.all_reduce OUT.json"""

import sys
from pathlib import Path

import torch.distributed as dist

from common.durable_files import write_json
from common.errors import run_script
from distributed.process_group import gather_objects, process_group
from preflight.machine import time_all_reduce


def main() -> int:
    """One rank of the measurement; rank 0 writes the time of the slowest."""
    with process_group(5.0) as ranks:
        dist.barrier(group=ranks.flags)
        seconds = max(gather_objects(time_all_reduce(ranks.device), ranks))
        if ranks.rank == 0:
            write_json(Path(sys.argv[1]), {"seconds": seconds})
    return 0


if __name__ == "__main__":
    run_script(main)
