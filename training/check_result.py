"""One line of the report of a check, of a run (training/quick_check.py) or before it (scripts/check.py)."""

from dataclasses import dataclass

OK, WARNING, FAILS, SKIPPED = "ok", "warning", "fails", "skipped"


@dataclass(frozen=True)
class Result:
    """One line of the report. The text of a line that fails or warns also says what to do."""

    status: str  # ok | warning | fails | skipped
    text: str
    group: str = ""  # data | model | run
    name: str = ""
