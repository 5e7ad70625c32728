"""Train every point of a grid with train.py, and choose by a validation curve. A sweep never looks at a test.

    python scripts/sweep.py configs/quickstart.py optimizer.learning_rate=1e-4,3e-4,1e-3 --seeds 3
    python scripts/sweep.py configs/quickstart.py optimizer.learning_rate=1e-4,3e-4 optimizer.epochs=1,2 data.mix=none

`key=a,b,c` is swept, `key=a` is fixed. Where a value has commas of its own (lists, pairs), | separates values:
"optimizer.betas=0.9,0.95|0.9,0.99". --list prints the runs and which are left, and trains nothing.

Every run is a run of train.py in --out, with the same data and the same token cache. If the sweep is interrupted (Ctrl-C lets
every run save a checkpoint), the same command continues it; finished runs are kept, also if the grid is made larger. A run is
judged by the weights that it exports (run.export). The result is the table, also in sweep.md, and sweep.json, whose
best.overrides are the settings to train with.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.command_line import add_number, new_parser
from common.errors import UserError, run_script
from scripts.sweep.grid import FOLDER, make_grid
from scripts.sweep.results import Sweep
from scripts.sweep.runs import list_trainings, run_trainings


def main() -> int:
    """Train the runs that are left and print the table. Return the exit code."""
    parser = new_parser(__doc__)
    parser.add_argument("config", help="a config file with data.validation")
    parser.add_argument("values", nargs="*", metavar="section.key=a,b,c", help="values to try; one value is fixed")
    add_number(parser, "--seeds", "train every point with run.seed 0 to K - 1", least=1, metavar="K")
    by = "the validation curve that decides: validation/loss, f1 ..., NAME:max or NAME:min (%(default)s)"
    parser.add_argument("--by", default="validation/loss", metavar="CURVE", help=by)
    add_number(parser, "--parallel", "runs at the same time", 1, least=1, metavar="P")
    add_number(parser, "--processes", "processes of each run", 1, least=1, metavar="N")
    parser.add_argument("--out", help=f"directory of the runs and results (default: {FOLDER}/NAME, by run.name)")
    remove = "remove the checkpoints of a finished run; its export is kept"
    parser.add_argument("--remove-checkpoints", action="store_true", help=remove)
    parser.add_argument("--list", action="store_true", help="print the runs and which are left, and train nothing")
    arguments = parser.parse_intermixed_args()
    grid = make_grid(arguments.config, arguments.values, arguments.seeds, arguments.out)
    sweep = Sweep(grid, arguments.by, arguments.processes, not arguments.remove_checkpoints)
    trainings = sweep.trainings()
    if arguments.list:
        print(list_trainings(trainings))
        return 0
    try:
        run_trainings(trainings, sweep.out, arguments.parallel, sweep.report)
    except KeyboardInterrupt:
        done = sum(training.is_done for training in trainings)
        print(f"{done} of {len(grid.runs)} runs are done; run the same command again to continue")
        raise
    print(f"\n{sweep.report()}\n\nin {grid.out}: sweep.md, sweep.json, logs/*.log, and the runs")
    if not any(point.values for point in sweep.points()) and all(training.is_done for training in trainings):
        raise UserError("every run diverged; try lower values of optimizer.learning_rate")
    return 0


if __name__ == "__main__":
    run_script(main)
