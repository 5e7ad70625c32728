"""Reference dates."""

import datetime

FIRST_PERIOD = datetime.date(2026, 3, 31)  # first reference date of the modules of DPM release 4.2


def quarter_end(quarter: int, start: str = "") -> str:
    """The reference date `quarter` quarters after `start` (default: `FIRST_PERIOD`), YYYY-MM-DD."""
    first = datetime.date.fromisoformat(start) if start else FIRST_PERIOD
    month = first.month + 3 * quarter
    next_day = datetime.date(first.year + month // 12, month % 12 + 1, 1)
    return (next_day - datetime.timedelta(days=1)).isoformat()


def long_date(date: str) -> str:
    """A date as letters write it: `31 March 2026` for 2026-03-31."""
    day = datetime.date.fromisoformat(date)
    return f"{day.day} {day:%B} {day.year}"
