"""Prove a run on your own config, data, model and machine before it is paid for. Nothing is trained that stays.

python scripts/check.py configs/quickstart.py
torchrun --nproc_per_node=8 scripts/check.py CONFIG batch.global_examples=64    # with as many ranks as the run
python scripts/check.py CONFIG --layers 2 --json report.json                    # a model that does not fit here

It starts train.py several times for three steps, kills a run, and prints a line for each check. The exit code is 0 if no line
fails, 1 if a line fails, and 2 for a config that cannot run. docs/check.md explains the lines.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])


from common.errors import run_script
from scripts.check.command import main

if __name__ == "__main__":
    run_script(lambda: main(__doc__))
