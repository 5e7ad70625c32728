"""What all parts of a check share."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from configs.config import Config
from distributed.process_group import Ranks, StopSignal, read_on_first
from preflight.launch import Ended, Job, run_job
from preflight.result import FAILS, Result

T = TypeVar("T")
SAMPLE = "gradients.safetensors"
PREFIX = ".check-"  # of the scratch directory; no run may have such a name


@dataclass(frozen=True)
class Context:
    """A check on one rank. script: the user's own train.py. model: a directory with fewer layers, in place of the real one."""

    config: Config
    script: Path
    arguments: tuple[str, ...]  # of the command line, which give `config` again
    ranks: Ranks
    stop: StopSignal
    say: Callable[[str], None]  # on rank 0; no-op elsewhere
    model: Path | None = None

    @property
    def scratch(self) -> Path:
        """Where the runs of the check write: on the disk of the real run, beside it."""
        return scratch_directory(self.config)

    @property
    def sample(self) -> Path:
        """The gradients of the documents of step 1 (preflight/shares.py), if the probe had time and memory for all of them."""
        return self.scratch / SAMPLE

    @property
    def limit(self) -> float:
        """Seconds that a child may take."""
        return 60 * self.config.run.timeout_minutes

    def run(
        self, name: str, command: tuple[str, ...], world_size: int, kill_when: Callable[[], bool] | None = None
    ) -> Ended:
        """Run a command as children. A collective."""
        self.ranks.watch.at(f"the check's run '{name}'")
        job = Job(name, command, world_size, self.limit)
        return run_job(job, self.ranks, self.stop, self.scratch / "outputs", self.say, kill_when)

    def on_first(self, look: Callable[[], T]) -> T:
        """The result of `look()` on rank 0, on all ranks. A collective."""
        return read_on_first(look, self.ranks)

    def result_on_first(self, group: str, name: str, look: Callable[[], Result]) -> Result:
        """As `on_first`; a file that cannot be read or compared is a result that fails."""

        def guarded() -> Result:
            try:
                return look()
            except Exception as error:  # whatever a child has written, the report must come to its end
                return Result(group, name, FAILS, f"{type(error).__name__}: {' '.join(str(error).split())}")

        return self.on_first(guarded)

    def remove(self, *names: str) -> None:
        """Remove runs of the scratch directory that are no longer needed: checkpoints are large. A collective."""
        self.on_first(lambda: [shutil.rmtree(self.scratch / name, ignore_errors=True) for name in names])


def scratch_directory(config: Config) -> Path:
    """The directory of a check's own runs."""
    return Path(config.run.directory, f"{PREFIX}{config.run.name}")
