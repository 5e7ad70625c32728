"""The command of the benchmark (tools/bench.py)."""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import json
import signal
from pathlib import Path

import tools.bench
from common.command_line import add_number, new_parser
from common.durable_files import check_can_write
from common.errors import UserError, run_script
from model.architectures import check_model_directory
from tools.bench import ARMS, SETTINGS, Benchmark, find_arm, run_all


def main() -> int:
    """Read the command line, run everything and print the tables."""
    parser = new_parser(tools.bench.__doc__)
    add = parser.add_argument
    add("--model", default="artifacts/models/SmolLM2-135M-Instruct", help="a Hugging Face directory (%(default)s)")
    add("--arms", default=",".join(ARMS), metavar="A,B", help="(%(default)s; ours-N has N ranks; ours always runs)")
    add("--settings", default=",".join(SETTINGS), metavar="A,B", help="(%(default)s)")
    add_number(parser, "--rounds", "each runs every arm once", 2, least=1, metavar="N")
    add_number(parser, "--steps", "measured steps", 3, least=1, metavar="N")
    add("--json", type=Path, metavar="FILE", help="write all measurements of all runs to FILE")
    add("--work", type=Path, default=Path("artifacts/bench"), metavar="DIR", help="examples and logs (%(default)s)")
    arguments = parser.parse_args()
    keys, settings = arguments.arms.split(","), tuple(arguments.settings.split(","))
    arms = tuple(find_arm(key) for key in dict.fromkeys(["ours", *keys]))
    if unknown := [name for name in settings if name not in SETTINGS]:
        raise UserError(f"--settings: {unknown[0]!r} is unknown; choose from {', '.join(SETTINGS)}")
    check_model_directory(arguments.model, "--model")
    if arguments.json:
        check_can_write(arguments.json, "--json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the current run is killed too
    model, work = str(Path(arguments.model).resolve()), arguments.work.resolve()
    report, passed = run_all(Benchmark(model, work, arms, settings, arguments.rounds, arguments.steps))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    run_script(main)
