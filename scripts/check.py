"""Prove a run on your own config, data, model and machine before it is paid for. Nothing is trained that stays.

python scripts/check.py configs/quickstart.py
torchrun --nproc_per_node=8 scripts/check.py configs/xbrl.py batch.global_examples=64    # with as many ranks as the run
python scripts/check.py configs/xbrl.py --layers 2 --json report.json                    # a model that does not fit here

It starts train.py several times for three steps, kills one of these runs, and prints a line for each thing that it has
checked. The exit code is 0 when nothing fails, 1 when something fails, and 2 for a config that cannot be run. docs/check.md
explains the lines.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])


from common.errors import run_script
from scripts.check.command import main

if __name__ == "__main__":
    run_script(lambda: main(__doc__))
