"""The report of a check: a line for each result, grouped, and the same as JSON."""

import platform
from collections.abc import Sequence
from pathlib import Path

from common.durable_files import write_json
from common.errors import UserError
from distributed.agreement import library_versions
from distributed.rank_names import host_name
from preflight.result import FAILS, OK, SKIPPED, WARNING, Result

GROUPS = ("data", "model", "precision", "run", "machine")
STATUSES = (OK, WARNING, FAILS, SKIPPED)


def lines(results: Sequence[Result], seconds: float) -> list[str]:
    """The report in words. The groups stand in their order, a group's results in the order in which they were found."""
    names = max((len(result.name) for result in results), default=0)
    groups = max(len(group) for group in GROUPS)
    said = []
    for group in [*GROUPS, *dict.fromkeys(result.group for result in results if result.group not in GROUPS)]:
        for result in results:
            if result.group == group:
                first, *more = result.text.splitlines() or [""]
                shown = result.figures.get("lines")  # examples to look at
                more += map(str, shown) if isinstance(shown, list) else ()
                said.append(f"{result.status:<7}  {group:<{groups}}  {result.name:<{names}}  {first}".rstrip())
                said += [" " * (7 + 2 + groups + 2 + names + 2) + line for line in more]
    return [*said, total(results, seconds)]


def total(results: Sequence[Result], seconds: float) -> str:
    """The last line: how many results there are of each status, and what that means."""
    counts = ", ".join(f"{count(results, status)} {status}" for status in STATUSES)
    if count(results, FAILS):
        verdict = "do not start this run before what fails is mended"
    elif count(results, WARNING):
        verdict = "nothing stands in the way of this run; read the warnings"
    else:
        verdict = "nothing stands in the way of this run"
    return f"{len(results)} checks in {seconds:.0f} s: {counts}; {verdict}"


def count(results: Sequence[Result], status: str) -> int:
    """Number of results with this status."""
    return sum(result.status == status for result in results)


def exit_code(results: Sequence[Result]) -> int:
    """1 if anything fails, else 0."""
    return int(count(results, FAILS) > 0)


def write_report(path: Path, results: Sequence[Result], command: Sequence[str], ranks: int, seconds: float) -> None:
    """Write all results with their figures, the command, versions and machine as JSON. Raises UserError."""
    content = {
        "command": list(command),
        "exit_code": exit_code(results),
        "seconds": round(seconds, 1),
        "results": [vars(result) for result in results],
        "versions": library_versions(),
        "machine": {"host": host_name(), "system": platform.platform(), "ranks": ranks},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}; name a file that can be written") from error
