"""When run.save_minutes have passed since the last save. A save is a collective, and no two clocks agree: rank 0's decides."""

import time

from distributed.process_group import Ranks, agree_any


class SaveTimer:
    """Started at the first step of a start, and again at every save. `minutes`: 0 for no saves by time."""

    def __init__(self, minutes: float, ranks: Ranks) -> None:
        self.seconds, self.ranks = 60 * minutes, ranks
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self.last = time.monotonic()

    def is_due(self) -> bool:
        """Whether a save is due by rank 0's clock. A collective, unless `minutes` is 0: all ranks get the same answer."""
        is_over = self.ranks.rank == 0 and time.monotonic() - self.last >= self.seconds
        return self.seconds > 0 and agree_any(is_over, self.ranks)
