"""Kill a run at random moments, and check that it ends exactly as if nothing had happened.

    python scripts/chaos.py configs/quickstart.py --kills 10 run.save_every=2
    python scripts/chaos.py configs/quickstart.py --kills 6 --ranks 8 run.deterministic=True optimizer.max_steps=20    # on GPUs

The run chaos-0 is trained to its end, then chaos-1 under kills: SIGKILL to a rank, to the launcher or to all of them, or SIGTERM to
the launcher. Half of the kills fall into a save, the others at any moment. After each kill the other processes must end by themselves, and the same
command continues the run. Once it has finished, its exported weights must equal those of chaos-0 to the bit, and metrics.jsonl
must have every row exactly once with the same values. Then the next run begins, until all kills are used.

The runs stand in the config's run.directory and keep what they printed in chaos-N.M.txt beside them. The more often a run saves
(run.save_every), the more kills hit a save. --seed decides victims and moments; what a moment hits depends on the machine, and a line per
kill says it. The exit code is 1 if anything differs. Linux only.
"""

import pathlib
import sys

sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import random
import signal

from common.command_line import add_number, new_parser
from common.errors import run_script
from tools.chaos import Chaos, Failed


def main() -> int:
    """Read the command line, and kill."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "what", nargs="+", metavar="CONFIG or section.key=value", help="a config, and settings that replace its own"
    )
    add_number(parser, "--kills", "number of kills", 10, least=1, metavar="N")
    add_number(parser, "--ranks", "of a run", 2, least=1, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments (%(default)s)")
    arguments = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no process stays behind
    try:
        Chaos(arguments.what, arguments.ranks, random.Random(arguments.seed)).run(arguments.kills)
    except Failed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_script(main)
