"""Compare speed and memory with other trainers in one command: losses first, then A/B/A/B rounds with medians and spread.

    pip install -r requirements-bench.txt          # the other trainers; without them only our own arms run
    python scripts/bench.py --json bench.json      # all settings; --quick takes a few minutes, as a test
    python scripts/bench.py --arms ours,trainer --rounds 1      # a short comparison, in matched and defaults
    python scripts/bench.py --settings skewed --arms ours,ours-2,ours-4 --steps 6      # our own arms alone

It prints first how much work it is (runs, steps, tokens), and how many minutes that usually takes.

Each line of the tables is an arm: one trainer, run in its own processes. All arms get the same examples, tokenised once,
with loss on the assistant's tokens only.

parity: in fp32, with the same examples in each step, the loss of every step must agree with ours to 1e-3 (absolute below
a loss of 1, relative above). A larger difference is excused only by a missing feature, which the table names.
matched: the same examples in each step, bf16 matrix products over fp32 weights (ours through FSDP2's mixed precision, the
others through autocast, which keeps the residual stream in fp32), the same AdamW, no activation checkpointing. Examples
are packed if the trainer can pack without cross-document attention.
skewed: as matched, with 16 examples per step whose lengths are spread 1:100. Those who pad, pad.
defaults: each trainer as in its own quick start. The steps differ, so the losses cannot be compared.

    tokens/s    real tokens per second, without padding, counted in the same way for every arm. Measured after --warmup
                steps
    spread      (max - min) / median over the rounds; smaller differences between arms are noise
    ours is     our tokens/s divided by those of the line: 2.00x means that ours takes half the time
    MFU         necessary FLOPs (head for target tokens only, attention within documents, no recomputation) per second,
                divided by those of the fastest matrix product measured in this run, in bf16 if the processor supports it,
                with all threads. All lines use the same peak, including arms that compute in fp32
    GiB         peak memory: resident memory of all processes of the arm together; on CUDA what rank 0 allocated
    1st step    seconds from the start of the process to the end of its first step: imports, loading, tokenising, warm-up
    loss        at the step in the next column

An arm is stopped after its last measured step, before it would save anything. On CUDA a ladder of our own optimisations
on a 1B model follows (bench/ladder.py). The docstring of each trainer's module in bench/ says how it is configured.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import json
import signal
from pathlib import Path

import torch

from bench.arms import ARMS
from bench.estimate import describe_work
from bench.report import (
    compare_losses,
    describe_machine,
    describe_table,
    parity_passed,
    render_parity,
    render_setting,
    setting_passed,
    setting_report,
    summarize_setting,
)
from bench.runner import (
    SETTINGS,
    Benchmark,
    make_shapes,
    make_workloads,
    measure_peak,
    plan_jobs,
    process_environment,
    run_all,
    run_ladder,
    why_unavailable,
)
from common.dtypes import has_native_bf16
from common.errors import UserError, run_script
from model.architectures import read_model_config
from model.flops import count_work
from model.language_model import build_on_meta

FULL = {
    "rounds": 2,
    "warmup": 1,
    "steps": 3,
    "parity_steps": 20,
    "lengths": "100,400",
    "skewed_lengths": "17,1700",
    "settings": "parity,matched,skewed,defaults",
}
QUICK = {
    "rounds": 1,
    "warmup": 1,
    "steps": 2,
    "parity_steps": 5,
    "lengths": "100,130",
    "skewed_lengths": "17,130",
    "settings": "parity,matched",
}
ONE_ROUND = "matched,defaults"


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help. Raises UserError for values that do not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    keys = [arm.key for arm in ARMS]
    full, quick = (" ".join(f"--{n.replace('_', '-')} {v}" for n, v in values.items()) for values in (FULL, QUICK))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements of all runs to FILE")
    parser.add_argument("--model", default="artifacts/models/SmolLM2-135M-Instruct", help="a Hugging Face directory")
    usual = ",".join(arm.key for arm in ARMS if not arm.on_request)
    parser.add_argument(
        "--arms", default=usual, metavar="A,B", help=f"some of {','.join(keys)} (default: all except ours-4)"
    )
    parser.add_argument(
        "--settings", metavar="A,B", help=f"some of {','.join(SETTINGS)} (default: all; with --rounds 1 {ONE_ROUND})"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="number of rounds; each runs every arm once")
    parser.add_argument("--warmup", type=int, metavar="N", help="unmeasured first steps")
    parser.add_argument("--steps", type=int, metavar="N", help="measured steps")
    parser.add_argument("--parity-steps", type=int, metavar="N", help="steps whose losses are compared in fp32")
    parser.add_argument(
        "--seconds",
        type=float,
        default=15,
        help="in defaults, stop after two measured steps that took this long, or one that took four times as long (%(default)s)",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=240,
        help="seconds; an arm whose first round of a setting took longer has one round only (%(default)s)",
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which a run is stopped as failed")
    parser.add_argument("--threads", type=int, help="cores for each arm (default: all that this process may use)")
    parser.add_argument("--lengths", metavar="MIN,MAX", help="tokens per example in matched and defaults")
    parser.add_argument("--skewed-lengths", metavar="MIN,MAX", help="tokens per example in skewed")
    parser.add_argument("--quick", action="store_true", help=f"use {quick} instead of {full}")
    parser.add_argument("--work", type=Path, default=Path("artifacts/bench"), help="working directory (%(default)s)")
    parser.add_argument("--ladder-on-cpu", action="store_true", help="without CUDA, run the ladder on a tiny model")
    arguments = parser.parse_args()
    if arguments.rounds == 1 and not arguments.quick:
        arguments.settings = arguments.settings or ONE_ROUND
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name, allowed in (("arms", keys), ("settings", SETTINGS)):
        values = getattr(arguments, name).split(",")
        if unknown := [value for value in values if value not in allowed]:
            raise UserError(f"--{name}: {unknown[0]!r} is unknown; choose from {', '.join(allowed)}")
        setattr(arguments, name, values)
    for name in ("rounds", "steps", "parity_steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(arguments, name)}")
    arguments.lengths = parse_lengths("--lengths", arguments.lengths)
    arguments.skewed_lengths = parse_lengths("--skewed-lengths", arguments.skewed_lengths)
    if not Path(arguments.model, "config.json").is_file():
        raise UserError(
            f"{arguments.model} is not a model directory (no config.json); python scripts/fetch_base_model.py downloads "
            "SmolLM2-135M-Instruct"
        )
    return arguments


def parse_lengths(option: str, text: str) -> tuple[int, int]:
    """The two numbers of tokens of `MIN,MAX`. Raises UserError."""
    try:
        shortest, longest = (int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} must be two whole numbers, for example 100,400, not {text!r}") from error
    if not 0 < shortest <= longest:
        raise UserError(f"{option} must be a smaller and a larger number above 0, not {text!r}")
    return shortest, longest


def make_benchmark(arguments: argparse.Namespace) -> Benchmark:
    """The benchmark that the command line describes. Restricts this process to the chosen cores."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = read_model_config(arguments.model)
    return Benchmark(
        model=str(Path(arguments.model).resolve()),
        device=device.type,
        dtype="bf16" if has_native_bf16(device) else "fp32",
        directory=arguments.work.resolve(),
        environment=process_environment(arguments.threads),
        arms=tuple(arm for arm in ARMS if arm.key in arguments.arms),
        settings=tuple(arguments.settings),
        rounds=arguments.rounds,
        warmup=arguments.warmup,
        steps=arguments.steps,
        parity_steps=arguments.parity_steps,
        seconds=arguments.seconds,
        patience=arguments.patience,
        timeout=arguments.timeout,
        flops=count_work(build_on_meta(config), config),
    )


def main() -> int:
    """Run everything and print the tables. Exit code 1 if one of our own arms failed or parity has no excuse."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the current run is killed too
    benchmark = make_benchmark(arguments)
    shapes = make_shapes(arguments.lengths, arguments.skewed_lengths)
    workloads = make_workloads(benchmark, shapes)
    unavailable = {arm.name: why_unavailable(benchmark, arm) for arm in benchmark.arms}
    jobs, peak = plan_jobs(benchmark, unavailable), measure_peak(benchmark)
    print(describe_work(benchmark, jobs, workloads, peak), flush=True)
    measured = run_all(benchmark, jobs, workloads, unavailable, peak)
    machine = describe_machine(benchmark)
    report, passed = {"peaks": measured.peaks} | machine, True
    descriptions = {name: describe_table(benchmark, name, machine, workloads[name]) for name in benchmark.settings}
    if "parity" in benchmark.settings:
        report["parity"] = compare_losses(benchmark, measured)
        print(f"\n{render_parity(benchmark, report['parity'], descriptions['parity'])}")
        passed = parity_passed(benchmark, report["parity"])
    for setting in benchmark.settings:
        if setting != "parity":
            entries, rounds = summarize_setting(benchmark, setting, measured)
            report[setting] = setting_report(entries, rounds)
            print(f"\n{render_setting(setting, entries, descriptions[setting], benchmark.dtype, measured.peaks)}")
            passed &= setting_passed(benchmark, entries, measured)
    if benchmark.device == "cpu" and not arguments.ladder_on_cpu:
        print("\nladder on a 1B model: needs CUDA, skipped")
    else:
        report["ladder"] = run_ladder(benchmark)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    run_script(main)
