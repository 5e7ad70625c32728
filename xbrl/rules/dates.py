"""Reference dates and remittance dates."""

import datetime

FIRST_PERIOD = datetime.date(2026, 3, 31)  # first reference date of the modules of DPM release 4.2
DAYS_TO_REMIT = 42  # ITS (EU) 2024/3117 Art. 3(1)(b): 12 May, 11 August, 11 November and 11 February


def quarter_end(quarter: int, start: str = "") -> str:
    """The reference date `quarter` quarters after `start` (default: `FIRST_PERIOD`), YYYY-MM-DD."""
    first = datetime.date.fromisoformat(start) if start else FIRST_PERIOD
    month = first.month + 3 * quarter
    next_day = datetime.date(first.year + month // 12, month % 12 + 1, 1)
    return (next_day - datetime.timedelta(days=1)).isoformat()


def days_after(period: str, days: int) -> str:
    """The date `days` days after a reference date, YYYY-MM-DD."""
    return (datetime.date.fromisoformat(period) + datetime.timedelta(days=days)).isoformat()


def long_date(date: str) -> str:
    """A date as letters write it: `31 March 2026` for 2026-03-31."""
    day = datetime.date.fromisoformat(date)
    return f"{day.day} {day:%B} {day.year}"
