"""What one check found."""

from collections.abc import Mapping
from dataclasses import dataclass, field

OK, WARNING, FAILS, SKIPPED = "ok", "warning", "fails", "skipped"


@dataclass(frozen=True)
class Result:
    """One line of the report. text: what was found; where it fails or warns, also what to do. figures: for the JSON."""

    group: str  # data | model | precision | run | machine
    name: str
    status: str  # ok | warning | fails | skipped
    text: str
    figures: Mapping[str, object] = field(default_factory=dict)
