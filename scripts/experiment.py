"""The experiment behind docs/results.md: LoRA against full fine-tuning, and full fine-tuning with its remedies.

    python scripts/experiment.py --list          # every step, what is done, and what is left
    python scripts/experiment.py                 # run what is left, then compare
    python scripts/experiment.py --size full --processes 8      # on 8 GPUs

It makes the data, sweeps the learning rate of LoRA and of full fine-tuning on validation, trains every arm with several
seeds, scores every model once on the test, measures what each has forgotten, and compares. experiment/setup.py defines the
sizes and the arms. Interrupted at any point (Ctrl-C lets a training save a checkpoint), the same command goes on. --only
runs the steps with these words in their names; several machines need an --out each, because one process owns it. OUT/results.md
has the tables, and OUT/comparison the intervals, tests and the page of scripts/compare.py.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

from common.command_line import add_number, new_parser
from common.errors import UserError, run_script
from experiment.launch import Interrupted, launch
from experiment.report import comparison_job, write_results
from experiment.run import list_steps, run_experiment
from experiment.setup import SIZES, Experiment


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = new_parser(__doc__)
    size = "see experiment/setup.py (%(default)s)"
    parser.add_argument("--size", choices=list(SIZES), default="quickstart", help=size)
    parser.add_argument("--out", type=Path, help="directory of the runs and results (default: runs/experiment[_SIZE])")
    parser.add_argument("--data", type=Path, help="directory of the reports (default: artifacts/experiment[_SIZE])")
    add_number(parser, "--seeds", "runs of each arm", 3, least=1)
    add_number(parser, "--processes", "processes of each launch", 1, least=1)
    add_number(parser, "--parallel", "steps at once, each on its share", 1, least=1)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only the steps with one of these in their names")
    parser.add_argument("--list", action="store_true", help="print the steps and what is left, and exit")
    parser.add_argument("--report", action="store_true", help="write the tables of what is done, and exit")
    return parser.parse_args()


def main() -> int:
    """List, run or report."""
    arguments = parse_arguments()
    suffix = "" if arguments.size == "quickstart" else f"_{arguments.size}"
    experiment = Experiment(
        size=SIZES[arguments.size],
        out=arguments.out or Path(f"runs/experiment{suffix}"),
        data=arguments.data or Path(f"artifacts/experiment{suffix}"),
        seeds=arguments.seeds,
        processes=arguments.processes,
    )
    if arguments.list:
        print(list_steps(experiment, arguments.only))
        return 0
    if not arguments.report:
        try:
            run_experiment(experiment, arguments.only, arguments.parallel)
        except Interrupted as signal:
            print(f"stopped; start again to continue\n{list_steps(experiment).splitlines()[-1]}")
            return signal.exit_code
    print(write_results(experiment))
    job = comparison_job(experiment)
    if job:
        code = launch(job.script, job.options, log=job.log)
        if code:
            raise UserError(f"the comparison failed: its log is {job.log}; start again to repeat it")
        print(f"\nthe comparison of all arms: {experiment.out / 'comparison'}")
    return 0


if __name__ == "__main__":
    run_script(main)
