"""The command of the benchmark (tools/bench.py): options, and which cores it uses."""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import json
import os
import signal
from pathlib import Path

import torch

import tools.bench
from common.dtypes import has_native_bf16
from common.errors import UserError, run_script
from tools.bench import ARMS, SETTINGS, Benchmark, make_shapes, run_all

FULL = {"rounds": 2, "warmup": 1, "steps": 3, "parity_steps": 20, "lengths": "100,400", "skewed_lengths": "17,1700"}
QUICK = {"rounds": 1, "warmup": 1, "steps": 2, "parity_steps": 5, "lengths": "100,130", "skewed_lengths": "17,130"}
QUICK_SETTINGS = "parity,matched"


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help. Raises UserError for values that do not fit."""
    parser = argparse.ArgumentParser(
        description=tools.bench.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    full, quick = (" ".join(f"--{n.replace('_', '-')} {v}" for n, v in values.items()) for values in (FULL, QUICK))
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write all measurements of all runs to FILE")
    add("--model", default="artifacts/models/SmolLM2-135M-Instruct", help="a Hugging Face directory")
    add("--arms", metavar="A,B", help=f"some of {','.join(arm.key for arm in ARMS)} (default: all except ours-4)")
    add("--settings", metavar="A,B", help=f"some of {','.join(SETTINGS)} (default: all)")
    add("--rounds", type=int, metavar="N", help="number of rounds; each runs every arm once")
    add("--warmup", type=int, metavar="N", help="unmeasured first steps")
    add("--steps", type=int, metavar="N", help="measured steps")
    add("--parity-steps", type=int, metavar="N", help="steps whose losses are compared in fp32")
    add("--seconds", type=float, default=60, help="a timed run ends once its measured steps took so long (%(default)s)")
    add("--timeout", type=float, default=600, help="seconds after which a run is stopped as failed (%(default)s)")
    add("--threads", type=int, help="cores for each arm (default: all that this process may use)")
    add("--lengths", metavar="MIN,MAX", help="tokens per example in parity, matched and defaults")
    add("--skewed-lengths", metavar="MIN,MAX", help="tokens per example in skewed")
    add("--quick", action="store_true", help=f"use --settings {QUICK_SETTINGS} {quick} instead of {full}")
    add("--work", type=Path, default=Path("artifacts/bench"), help="working directory (%(default)s)")
    arguments = parser.parse_args()
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.settings = arguments.settings or (QUICK_SETTINGS if arguments.quick else ",".join(SETTINGS))
    arguments.arms = arguments.arms or ",".join(arm.key for arm in ARMS if not arm.on_request)
    for name, allowed in (("arms", [arm.key for arm in ARMS]), ("settings", SETTINGS)):
        values = getattr(arguments, name).split(",")
        if unknown := [value for value in values if value not in allowed]:
            raise UserError(f"--{name}: {unknown[0]!r} is unknown; choose from {', '.join(allowed)}")
        setattr(arguments, name, values)
    for name in ("rounds", "steps", "parity_steps", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {value}")
    if not Path(arguments.model, "config.json").is_file():
        raise UserError(
            f"{arguments.model} is not a model directory (no config.json); python scripts/fetch_base_model.py downloads "
            "SmolLM2-135M-Instruct"
        )
    return arguments


def parse_lengths(option: str, text: str) -> tuple[int, int]:
    """The two numbers of tokens of `MIN,MAX`. Raises UserError."""
    parts = text.split(",")
    if len(parts) == 2 and all(part.strip().isdecimal() for part in parts) and 0 < int(parts[0]) <= int(parts[1]):
        return int(parts[0]), int(parts[1])
    raise UserError(f"{option} must be a smaller and a larger whole number above 0, for example 100,400, not {text!r}")


def main() -> int:
    """Run everything and print the tables."""
    arguments = parse_arguments()
    shapes = make_shapes(
        parse_lengths("--lengths", arguments.lengths), parse_lengths("--skewed-lengths", arguments.skewed_lengths)
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the current run is killed too
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = cores[: arguments.threads]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # of this process and of all that it starts
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    benchmark = Benchmark(
        model=str(Path(arguments.model).resolve()),
        device=device.type,
        dtype="bf16" if has_native_bf16(device) else "fp32",
        directory=arguments.work.resolve(),
        threads=len(cores),
        arms=tuple(arm for arm in ARMS if arm.key in arguments.arms),
        settings=tuple(arguments.settings),
        **{
            name: getattr(arguments, name)
            for name in ("rounds", "warmup", "steps", "parity_steps", "seconds", "timeout")
        },
    )
    report, passed = run_all(benchmark, shapes)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    run_script(main)
