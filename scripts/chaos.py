"""Kill a run at random moments, and check that it ends exactly like a run that nobody killed.

    python scripts/chaos.py configs/quickstart.py --kills 10 run.save_every=2
    python scripts/chaos.py configs/quickstart.py --kills 6 --ranks 8 run.deterministic=True optimizer.max_steps=20    # on GPUs

chaos-0 is trained to its end, then chaos-1 under kills: SIGKILL to a rank, to the launcher or to all processes, or SIGTERM to
the launcher. Half of the kills fall into a save, the others at any moment. After each kill the other processes must end by
themselves, and the same command resumes the run. Once chaos-1 has finished, its exported weights must equal the weights of chaos-0
to the bit, and its metrics.jsonl must have every row once with the same values. Then chaos-2 begins, until all kills are used.

The runs stand in the config's run.directory, and their output in chaos-N.M.txt beside them. The more often a run saves
(run.save_every), the more kills hit a save. --seed chooses the forms and moments of the kills. A line per kill says at what
moment it came, because that depends on the machine. The exit code is 1 if anything differs. Linux only.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import random
import signal

from common.command_line import add_number, new_parser
from common.errors import run_script
from scripts.chaos.kills import Chaos, Failed


def main() -> int:
    """Read the command line, and kill. Return the exit code."""
    parser = new_parser(__doc__)
    settings = "a config, and settings that replace its own"
    parser.add_argument("config", nargs="+", metavar="CONFIG or section.key=value", help=settings)
    add_number(parser, "--kills", "number of kills", 10, least=1, metavar="N")
    add_number(parser, "--ranks", "ranks of each run", 2, least=1, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="chooses forms and moments of the kills (%(default)s)")
    arguments = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the context of each launch kills its processes
    try:
        Chaos(arguments.config, arguments.ranks, random.Random(arguments.seed)).run(arguments.kills)
    except Failed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_script(main)
