"""Kill a tiny run at random moments, a hundred times, and check that it ends exactly as if nothing had happened.

    python scripts/chaos.py                             # 100 kills on 2 ranks
    python scripts/chaos.py --kills 10 --async          # with run.async_save=True
    python scripts/chaos.py --kills 6 --ranks 8 run.deterministic=True model.compute_dtype=bf16      # on GPUs

A run with a mixture, EWC, validation and a save after every second step is trained under torchrun. SIGKILL goes to a rank, to
the launcher or to all of them, or SIGTERM to the launcher: half of the time in a save or just after it, else between steps or
before the first one. The run is started again until it has finished; then the next one begins, until all kills are used.
Every run must export the same weights, to the bit, as a run that nobody killed, and have every row of metrics.jsonl and
TensorBoard exactly once with the same values. After every kill each complete checkpoint must be whole, and the other
processes must have ended by themselves.

--seed decides victims and moments; what a moment hits depends on the machine and is printed: one line per kill. The exit code
is 1 if anything differs. Linux only.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import random
import signal
import tempfile
import time
from pathlib import Path

import torch

from common.errors import UserError, run_script
from tools.chaos import Chaos, Failed, differences


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="number of kills (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments (default: 0)")
    parser.add_argument("--steps", type=int, default=60, help="steps of a run (default: 60)")
    parser.add_argument("--ranks", type=int, default=2, help="of a run (default: 2)")
    parser.add_argument("--async", action="store_true", dest="in_background", help="save in the background")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new directory for the runs (default: a temporary one)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of the runs")
    arguments = parser.parse_args()
    if arguments.kills < 1 or arguments.steps < 10 or arguments.ranks < 1:
        raise UserError("--kills and --ranks must be 1 or more, and --steps 10 or more")
    if arguments.out and arguments.out.exists():
        raise UserError(f"--out {arguments.out} exists; choose another name or remove it")
    return arguments


def run(arguments: argparse.Namespace, out: Path) -> None:
    """The reference run, the kills, and the comparisons. Raises Failed if a run does not end as the reference did."""
    overrides = [*arguments.overrides, f"run.async_save={arguments.in_background}"]
    chaos = Chaos(out, arguments.steps, arguments.ranks, overrides, random.Random(arguments.seed))
    print(
        f"{arguments.kills} kills, seed {arguments.seed}: {arguments.steps} steps on {arguments.ranks} ranks, ", end=""
    )
    print(f"{' '.join(overrides)}, torch {torch.__version__}", flush=True)
    begin, kills, runs = time.monotonic(), 0, 0
    chaos.finish("reference")
    while kills < arguments.kills:
        runs += 1
        name = f"run-{runs}"
        while kills < arguments.kills and (line := chaos.kill_once(name)):
            kills += 1
            print(f"kill {kills:3} | {name} | {line}", flush=True)
        chaos.finish(name)
        if found := differences(out / "runs" / name, out / "runs" / "reference"):
            raise Failed(f"{name} differs from the run that nobody killed:\n" + "\n".join(found))
        print(f"{name} finished: same weights and rows as the run that nobody killed", flush=True)
    hits = ", ".join(f"{count} {what}" for what, count in sorted(chaos.hits.items()))
    print(
        f"{kills} kills in {(time.monotonic() - begin) / 60:.1f} min and {chaos.launches} launches: {hits}; no difference"
    )


def main() -> int:
    """Run in a temporary directory, or in --out."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no process stays behind
    try:
        if arguments.out:
            arguments.out.mkdir(parents=True)
            run(arguments, arguments.out.resolve())
        else:
            with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
                run(arguments, Path(folder))
    except Failed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_script(main)
