"""Where a run's curves are shown beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow. On rank 0 alone.

A sink has `plot(step, values)`, where a value is a number or a text in Markdown, `flush()` and `close()`. The last two services
are used only if their package is installed, and each as its own environment variables say (project, server, offline).
"""

import importlib.util
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from common.durable_files import fsync
from common.errors import UserError

EVENT_FILES = "events.out.tfevents.*"
_MAX_CLOCK_SKEW = 5.0  # seconds

Say = Callable[[str], None]
Values = Mapping[str, float | str]


class Sink(Protocol):
    """What shows rows of curves."""

    def plot(self, step: int, values: Values) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def check_sinks(names: Sequence[str]) -> None:
    """Raise UserError if the package of a sink (run.log_to) is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"run.log_to={name}: the package {name} is not installed; install it or remove it there")


def open_sinks(
    names: Sequence[str], directory: Path, start_step: int, config: dict, sent: Collection[tuple[int, str]], say: Say
) -> list[Sink]:
    """The sinks of a run that continues at `start_step`; 0 starts anew.

    sent: (step, curve) of rows that an earlier start has written behind that step. The services have them already, and none
    of them can take a row back.
    """
    sinks: list[Sink] = []
    if "tensorboard" in names:
        sinks.append(TensorBoard(directory / "tensorboard", start_step, say))
    if services := [name for name in names if name != "tensorboard"]:
        from training.services import open_services

        sinks += open_services(services, directory, start_step > 0, config, sent, say)
    return sinks


class TensorBoard:
    """Event files. TensorBoard ignores what earlier files have from the step on at which a run continues."""

    def __init__(self, folder: Path, start_step: int, say: Say) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only on rank 0

        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if start_step == 0:
            for path in folder.glob(EVENT_FILES):
                path.unlink()
        self._wait_for_a_later_name(say)
        self.writer = SummaryWriter(folder, purge_step=start_step or None)

    def plot(self, step: int, values: Values) -> None:
        """Add scalars, which TensorBoard groups by the part of their names before the slash, and texts."""
        for name, value in values.items():
            (self.writer.add_text if isinstance(value, str) else self.writer.add_scalar)(name, value, step)

    def flush(self) -> None:
        """Flush the events to disk."""
        self.writer.flush()
        fsync(max(self.folder.glob(EVENT_FILES)))

    def close(self) -> None:
        """Close the file."""
        self.writer.close()

    def _wait_for_a_later_name(self, say: Say) -> None:
        """TensorBoard reads event files in the order of their names, which begin with the second they were made in."""
        names = [path.name.split(".")[3] for path in self.folder.glob(EVENT_FILES)]
        seconds = [int(name) for name in names if name.isdigit()]
        ahead = max(seconds, default=0) + 1 - time.time()
        if ahead > 0:
            time.sleep(min(ahead, _MAX_CLOCK_SKEW))
        if ahead > _MAX_CLOCK_SKEW:
            say(f"the clock is {ahead:.0f} s behind the last start's: TensorBoard may show steps twice")
