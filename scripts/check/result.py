"""One line of the report of a check."""

from collections.abc import Mapping
from dataclasses import dataclass, field

OK, WARNING, FAILS, SKIPPED = "ok", "warning", "fails", "skipped"


@dataclass(frozen=True)
class Result:
    """One line of the report: its verdict in words, and its figures for the JSON.

    The text of a line that fails or warns also says what to do.
    """

    status: str  # ok | warning | fails | skipped
    text: str
    figures: Mapping[str, object] = field(default_factory=dict)
    group: str = ""  # data | model | run | machine
    name: str = ""
