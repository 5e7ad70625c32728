"""Compare methods against forgetting on one task: plain training, low learning rate, replay, EWC, and replay with EWC.

    python scripts/make_replay.py --source topics --out artifacts/replay/topics.jsonl
    python scripts/compare_forgetting.py configs/quickstart.py data.mix=none --test artifacts/quickstart/test.jsonl \\
        --general artifacts/replay/topics.jsonl --out runs/comparison

Each method is a run of train.py in --out, with the same base, examples, order and number of steps. Its model is
evaluated on --test and, against the base, on general text that no method trains on. If it is interrupted, run the same
command again: it skips what is finished and continues the rest. At the end it prints the table (also in comparison.md)
and plots it (comparison.png). --only NAMES runs some of the methods, e.g. to use several machines, and compares those
that have results. docs/forgetting.md explains how to read them.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
from pathlib import Path

from common.errors import UserError, run_script
from configs.loading.config_file import load_config, override
from eval.run_methods import (
    PLAIN,
    Comparison,
    check_comparison,
    choose_methods,
    plan_methods,
    run_methods,
    write_comparison,
)


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config of plain training, without data.mix and ewc")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="overrides for every run, e.g. run.eval_every=0"
    )
    parser.add_argument("--test", type=Path, required=True, help="examples of the task that no run trains on")
    parser.add_argument("--general", required=True, help="text of the old domain, for replay and the Fisher diagonal")
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs and results")
    parser.add_argument(
        "--low", type=float, default=1 / 3, help="the low learning rate relative to the config's (%(default).2g)"
    )
    parser.add_argument(
        "--shares", type=float, nargs="*", default=[0.05, 0.25], help="shares of replay (default: 0.05 0.25)"
    )
    parser.add_argument(
        "--strengths",
        type=float,
        nargs="*",
        default=[1, 10, 100],
        help="strengths of EWC; the run of the first one estimates the Fisher diagonal for all (default: 1 10 100)",
    )
    parser.add_argument(
        "--both",
        type=float,
        nargs=2,
        action="append",
        metavar=("SHARE", "STRENGTH"),
        help="replay and EWC together; may be repeated (default: 0.05 10 and 0.05 100)",
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="processes of each training and evaluation (%(default)s)"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these methods, e.g. plain replay-5")
    parser.add_argument("--list", action="store_true", help="print the methods and their overrides, and exit")
    return parser.parse_intermixed_args()


def main() -> int:
    """Train, evaluate, compare."""
    arguments = parse_arguments()
    config = load_config(arguments.config, arguments.overrides)
    if config.data.mix or config.ewc.strength:
        raise UserError(
            f"{arguments.config} has data.mix or ewc.strength, which the methods set: add data.mix=none ewc.strength=0"
        )
    comparison = Comparison(
        config=arguments.config,
        overrides=arguments.overrides,
        base=config.model.path,
        learning_rate=config.optimizer.learning_rate,
        train=config.data.train[0],
        test=arguments.test,
        general=arguments.general,
        out=arguments.out,
        processes=arguments.processes,
    )
    check_comparison(comparison)
    both = arguments.both or [(0.05, 10), (0.05, 100)]
    methods = plan_methods(comparison, arguments.low, arguments.shares, arguments.strengths, both)
    for options in methods.values():  # a mistake in the last method must not show only after hours of the others
        override(config, options)
    if arguments.list:
        print("\n".join(f"{name:20} {' '.join(options)}" for name, options in methods.items()))
        return 0
    chosen = choose_methods(comparison, methods, arguments.only)
    run_methods(comparison, methods, chosen)
    table = write_comparison(comparison, methods)
    if table is None:
        print(f"\nthe results are in {comparison.results}; the table also needs {PLAIN}, the reference of the others")
        return 0
    print(f"\n{table}\n\nin {arguments.out}: comparison.md, comparison.png, results/*.json")
    return 0


if __name__ == "__main__":
    run_script(main)
