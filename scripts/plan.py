"""Plan a run before a machine is rented: memory, time, disk, and the cheapest settings that fit. Nothing is trained.

python scripts/plan.py configs/quickstart.py --gpus 8 --gpu-memory 80
python scripts/plan.py configs/quickstart.py --gpus 8 --gpu H100 sharding.strategy=full batch.micro_batch=2
python scripts/plan.py --model 70B --sequence 4096 --gpus 16 --gpu H200
python scripts/plan.py configs/quickstart.py --against runs/quickstart

The plan reads the config's data and deals its real steps to the GPUs. The model directory needs only config.json and the
tokenizer. With --model no data is needed: all examples then have the same length. docs/planning.md explains the output.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])


from common.errors import run_script
from scripts.plan.command import main

if __name__ == "__main__":
    run_script(lambda: main(__doc__))
