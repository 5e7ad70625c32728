"""When to kill: what a run is doing, seen from outside in the names of its files, and random moments to wait for."""

import json
import math
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

POLL = 0.001  # seconds; a save of a tiny model takes some tens of milliseconds


@dataclass(frozen=True)
class Seen:
    """What a run was doing. Seconds are counted from the start of its launch."""

    latest: str = ""  # content of `checkpoints/latest`
    temporary: tuple[str, ...] = ()  # checkpoints/*.tmp: in a save, or in the removal of an old checkpoint
    exporting: bool = False
    saves: int = 0  # that have begun since the launch
    started_after: float = 0.0  # when the first save of this launch began, 0 if none has
    save_took: float = 0.0  # the last one, from its temporary name to `latest`
    seconds: float = 0.0
    aim: str = ""  # start | steps | save

    def line(self) -> str:
        """For the log."""
        if self.temporary:
            doing = f"in {', '.join(self.temporary)}"
        elif self.exporting:
            doing = "in the export"
        else:
            doing = "in training" if self.started_after else "at the start"
        return f"aimed at {self.aim:5} | {doing:24} | latest {self.latest or 'none':11} | {self.seconds:5.1f} s"


@dataclass(frozen=True)
class Moment:
    """`delay` seconds after the launch (start), or after its `saves`-th save began (save) or ended (steps)."""

    aim: str
    saves: int
    delay: float


def draw_moment(rng: random.Random, start_seconds: float, save_seconds: float) -> Moment:
    """Half of the moments are in a save or just after it, a third between steps, a sixth before the first step.

    `start_seconds` and `save_seconds` say how long a launch and a save take.
    """
    aim = rng.choice(["save", "save", "save", "steps", "steps", "start"])
    if aim == "start":
        return Moment(aim, 0, rng.uniform(0, start_seconds))
    if aim == "steps":
        return Moment(aim, 1, rng.uniform(0, 1.0))
    return Moment(aim, rng.randint(1, 5), rng.uniform(0, 1.3 * save_seconds))


def look(run: Path, before: Seen) -> Seen:
    """The names that a run directory shows now."""
    checkpoints = run / "checkpoints"
    try:
        names = sorted(path.name for path in checkpoints.iterdir())
    except OSError:
        names = []
    try:
        latest = (checkpoints / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        latest = ""
    temporary = tuple(name for name in names if name.endswith(".tmp") and name.startswith("step-"))
    return replace(before, latest=latest, temporary=temporary, exporting=(run / "export.tmp").is_dir())


def await_moment(
    run: Path, before: Seen, moment: Moment | None, exit_code: Callable[[], int | None], longest: float
) -> Seen:
    """Watch a run until the moment comes (None: never), its launch ends, or `longest` seconds have passed.

    `before` is what `look` saw before the launch.
    """
    begin = time.monotonic()
    seen = replace(before, aim=moment.aim if moment else "")
    ignored = _creation_times(run)  # temporary directories of an earlier launch, until they are created anew
    saving, began = "", 0.0  # the temporary name of the save in flight, and when it was first seen
    kill_at = begin + moment.delay if moment and moment.aim == "start" else math.inf
    while True:
        now = time.monotonic()
        previous = seen.latest
        seen = replace(look(run, seen), seconds=now - begin)
        created = _creation_times(run)
        current = [name for name in created if name > f"{seen.latest}.tmp" and created[name] != ignored.get(name)]
        if not saving and (current or seen.latest != previous):
            saving, began = (current[0] if current else f"{seen.latest}.tmp"), now
            seen = replace(seen, saves=seen.saves + 1, started_after=seen.started_after or now - begin)
            if moment and moment.aim == "save" and seen.saves >= moment.saves:
                kill_at = min(kill_at, now + moment.delay)
        if saving and f"{seen.latest}.tmp" >= saving:
            seen, saving = replace(seen, save_took=now - began), ""
            if moment and moment.aim == "steps" and seen.saves >= moment.saves:
                kill_at = min(kill_at, now + moment.delay)
        if now >= kill_at or now - begin > longest or exit_code() is not None:
            return seen
        time.sleep(POLL)


def _creation_times(run: Path) -> dict[str, int]:
    """Temporary name of a checkpoint -> when its directory last changed, in ns."""
    found = {}
    for path in (run / "checkpoints").glob("step-*.tmp"):
        with suppress(OSError):  # renamed meanwhile
            found[path.name] = path.stat().st_ctime_ns
    return found


def half_checkpoints(directory: Path) -> list[str]:
    """Files that are missing or too short under the name of a complete checkpoint, by the manifest."""
    problems = []
    for manifest in directory.glob("step-*/manifest.json"):
        folder = manifest.parent
        if folder.suffix:
            continue
        for name, stated in json.loads(manifest.read_text(encoding="utf-8"))["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != stated["size"]:
                problems.append(f"{folder.name}/{name} is missing or has another size")
    complete = {path.parent for path in directory.glob("step-*/manifest.json")}
    problems += [
        f"{path.name} has no manifest.json"
        for path in directory.glob("step-*")
        if path.is_dir() and not path.suffix and path not in complete
    ]
    return problems
