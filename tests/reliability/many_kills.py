"""As scripts/chaos.py, with forked ranks in place of torchrun: a start takes two seconds and not ten. From the root:

    python -m tests.reliability.many_kills KILLS SEED [async]

The launcher is this process, so the victims are a rank or all of them.
"""

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from reliability.campaign import Campaign
from reliability.workload import write_workload
from tests.reliability.forked import ForkedLaunch

STEPS = 60


def main() -> int:
    kills, seed, in_background = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["async"]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="many-kills-") as name:
        folder = Path(name)
        config = write_workload(folder, STEPS)

        def launch(run: str) -> ForkedLaunch:
            arguments = [str(config), f"run.name={run}", f"run.async_save={in_background}"]
            return ForkedLaunch(arguments, 2, folder / f"{run}.out")

        reference = launch("reference")
        while reference.exit_code() is None:
            time.sleep(0.05)
        campaign = Campaign(launch, folder / "runs", "reference", seed=seed, say=lambda line: print(line, flush=True))
        campaign.run(kills)
    victims = Counter(kill.victim for kill in campaign.kills)
    inside = sum(bool(kill.seen.temporary) for kill in campaign.kills)
    left = sum(bool(kill.left) for kill in campaign.kills)
    print(
        f"{len(campaign.kills)} kills in {(time.monotonic() - begin) / 60:.1f} min ({dict(victims)}); {inside} in a save, {left} left "
        f"a temporary checkpoint; {len(campaign.problems)} differences"
    )
    print(*campaign.problems, sep="\n")
    return 1 if campaign.problems else 0


if __name__ == "__main__":
    sys.exit(main())
