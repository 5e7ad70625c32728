"""Train for many steps and watch memory, threads and open files: none of them may grow.

    python scripts/soak.py                                              # 2,000 steps of a tiny model
    python scripts/soak.py --model artifacts/models/SmolLM2-135M-Instruct --steps 100 --every 5 --skip 20

The run saves and validates like a real one. One line per rank is printed at every `--every`-th step:

    resident    MiB of resident memory, seen soon after the step was logged
    threads     of the process
    files       open file descriptors
    faults      minor page faults per step since the previous line
    CPU s       CPU seconds per step since the previous line, all threads, user and system

At the end comes the slope of the resident memory in MiB per 1,000 steps, after the first `--skip` steps, with its standard
error. The exit code is 1 if the slope is above `--allowed` and three standard errors, or if the number of threads or of open
files changed. Linux only.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import signal
import tempfile
from pathlib import Path

from common.errors import UserError, run_script
from reliability.launch import Torchrun
from reliability.soak import Sample, changes, memory_slope, watch
from reliability.workload import write_workload


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="(default: 2000)")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="a Hugging Face directory (default: a tiny random model)"
    )
    parser.add_argument("--every", type=int, default=100, metavar="STEPS", help="between two lines (default: 100)")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="also validates (default: 100)")
    parser.add_argument(
        "--skip", type=int, default=400, metavar="STEPS", help="warm-up, left out of the slope (default: 400)"
    )
    parser.add_argument("--allowed", type=float, default=10.0, metavar="MIB", help="per 1,000 steps (default: 10)")
    parser.add_argument("--ranks", type=int, default=2, help="(default: 2)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of the run")
    arguments = parser.parse_args()
    if sys.platform != "linux":
        raise UserError("soak.py reads /proc, which only Linux has")
    if arguments.steps - arguments.skip < 3 * arguments.every:
        raise UserError("--steps must be at least --skip plus three times --every")
    return arguments


def main() -> int:
    """Train, watch, and report."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # unwinds, so that no process stays behind
    last: dict[int, Sample] = {}

    def show(rank: int, sample: Sample) -> None:
        before = last.get(rank)
        last[rank] = sample
        steps = sample.step - before.step if before else 0
        rates = (
            f"{(sample.faults - before.faults) / steps:10,.0f} {(sample.cpu - before.cpu) / steps:8.3f}"
            if before and steps
            else f"{'':10} {'':8}"
        )
        print(
            f"{sample.step:6} {rank:5} {sample.resident:10,.1f} {sample.threads:8} {sample.files:6} {rates}", flush=True
        )

    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        config = write_workload(Path(folder), arguments.steps)
        settings = [
            f"run.save_every={arguments.save_every}",
            f"run.eval_every={arguments.save_every}",
            f"run.log_every={arguments.every}",
            *([f"model.path={arguments.model.resolve()}"] if arguments.model else []),
            *arguments.overrides,
        ]
        launch = Torchrun([str(config), *settings], arguments.ranks, Path(folder) / "output")
        print(f"{'step':>6} {'rank':>5} {'resident':>10} {'threads':>8} {'files':>6} {'faults':>10} {'CPU s':>8}")
        try:
            samples = watch(launch, Path(folder) / "runs" / "run" / "metrics.jsonl", arguments.every, show)
        finally:
            code = launch.exit_code()
            launch.kill_all()
        if code:
            print(f"the run ended with exit code {code}:\n{launch.text()[-3000:]}")
            return 1
    failed = False
    for rank, seen in sorted(samples.items()):
        slope = memory_slope(seen, arguments.skip)
        changed = changes(seen, arguments.skip)
        failed |= bool(changed) or not slope.is_flat(arguments.allowed)
        print(
            f"rank {rank}: {slope.value:+.2f} +- {slope.error:.2f} MiB per 1,000 steps after step {arguments.skip}; "
            + ("; ".join(changed) or "threads and open files constant")
        )
    return 1 if failed or not samples else 0


if __name__ == "__main__":
    run_script(main)
