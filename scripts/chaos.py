"""Kill a tiny run at random moments, a hundred times, and check that it ends exactly as if nothing had happened.

    python scripts/chaos.py --log chaos.log             # 100 kills
    python scripts/chaos.py --kills 10 --async          # with run.async_save=True

A run with a mixture, EWC, validation and a save after every second step is trained under torchrun on 2 ranks. SIGKILL goes
to a rank, to the launcher or to all of them: half of the time during a save or just after it, else between steps or before
the first one. The run is started again until it has finished; then the next one begins, until all kills are used. Every
run must export the same weights, to the bit, as a run that nobody killed, and have every row of metrics.jsonl and
TensorBoard exactly once with the same values. No file may be missing under the name of a complete checkpoint at any time.
When a rank or the launcher is killed, the other processes must end by themselves. A launch beside the ranks of a killed
launcher must wait for their end or be refused.

--seed decides the order of victims and moments; what a moment hits depends on the machine and is printed: one line per kill.
The exit code is 1 if anything differs. Linux only.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import argparse
import itertools
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from common.errors import UserError, run_script
from reliability.campaign import Campaign
from reliability.launch import Torchrun
from reliability.workload import write_workload

WORLD_SIZE = 2


def parse_arguments() -> argparse.Namespace:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="number of kills (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments (default: 0)")
    parser.add_argument("--steps", type=int, default=60, help="steps of a run (default: 60)")
    parser.add_argument("--async", action="store_true", dest="in_background", help="save in the background")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new directory for the runs (default: a temporary one)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="also append the lines to FILE")
    arguments = parser.parse_args()
    if sys.platform != "linux":
        raise UserError("chaos.py finds the processes of a run in /proc, which only Linux has")
    if arguments.kills < 1 or arguments.steps < 10:
        raise UserError("--kills must be 1 or more, and --steps 10 or more")
    if arguments.out and arguments.out.exists():
        raise UserError(f"--out {arguments.out} exists; choose another name or remove it")
    return arguments


def main() -> int:
    """The reference run, the kills, and the comparison."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # unwinds, so that no process stays behind
    temporary = None if arguments.out else tempfile.TemporaryDirectory(prefix="chaos-")
    out = (arguments.out or Path(temporary.name)).resolve()  # pyright: ignore[reportOptionalMemberAccess]
    out.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(text, flush=True)
        if arguments.log:
            with arguments.log.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    config = write_workload(out, arguments.steps)
    overrides = ["run.async_save=True"] if arguments.in_background else []
    saves = "in the background" if arguments.in_background else "at once"

    launches = itertools.count()

    def launch(name: str) -> Torchrun:
        output = out / f"{name}.{next(launches)}.out"
        return Torchrun([str(config), f"run.name={name}", *overrides], WORLD_SIZE, output)

    say(
        f"{arguments.kills} kills, seed {arguments.seed}: {arguments.steps} steps on {WORLD_SIZE} ranks, saved {saves}, "
        f"torch {torch.__version__}"
    )
    begin = time.monotonic()
    reference = launch("reference")
    try:
        code = reference.process.wait()
    finally:
        reference.kill_all()
    if code:
        say(f"the reference run ended with exit code {code}:\n{reference.text()[-3000:]}")
        return 1
    say(f"reference finished after {time.monotonic() - begin:.0f} s")
    campaign = Campaign(launch, out / "runs", "reference", arguments.seed, say)
    campaign.run(arguments.kills)
    victims = Counter(kill.victim for kill in campaign.kills)
    cut = sum(bool(kill.left) for kill in campaign.kills)
    say(
        f"{len(campaign.kills)} kills in {(time.monotonic() - begin) / 60:.1f} min and {campaign.launches} launches: "
        + ", ".join(f"{count} of {victim}" for victim, count in sorted(victims.items()))
        + f"; {sum(bool(kill.seen.temporary) for kill in campaign.kills)} in a save, {cut} left a temporary checkpoint; "
        f"{campaign.refusals} launches beside a running one refused"
    )
    for problem in campaign.problems:
        say(f"DIFFERENCE: {problem}")
    say("FAILED" if campaign.problems else "every run ended with the weights and rows of the reference")
    return 1 if campaign.problems else 0


if __name__ == "__main__":
    run_script(main)
