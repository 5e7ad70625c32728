"""Compute when a return was due, and whether its file shows that it was late: LATE_FILING.

ITS (EU) 2024/3117 Art. 3(1): monthly returns are due on the 15th calendar day after the reference date, quarterly returns on
12 May, 11 August, 11 November and 11 February. A due date on a Saturday, a Sunday or a public holiday of the Member State
moves to the next working day (Art. 3(2)). Public holidays are not known here, so files made up to that day are undecided.
The first returns on own funds and leverage under this regulation, as of 31 March 2025, were due on 30 June 2025 (Art. 24(1)).
Before 2025 (EU) 2021/451 had the same dates in its Art. 3(1). ALMM are left out: small and non-complex institutions file them
quarterly (Art. 18(b)), and no return tells whether the bank is such an institution.

The names of EBA files end with the time of creation: `LEI.CON_DE_COREP040200_COREPLCRDA_2026-03-31_20260415120000000.zip`.
The file may have arrived later. A file made after the due date is surely late, unless it corrects an earlier file. A file made
before the due date proves nothing.
"""

import datetime
import pathlib
from decimal import Decimal

from xbrl.read.filed_report import EBA_NAME, Report, is_day
from xbrl.rules.rules import RuleResult

RULE = "LATE_FILING"
POINTS = {"monthly": "(a)", "quarterly": "(b)"}  # points of Art. 3(1)
# Module -> how often it is filed: ITS (EU) 2024/3117 Art. 5, 7, 11, 12 and 14 to 17
MODULES = {
    "COREP_LCR_DA": "monthly",
    **dict.fromkeys(("COREP_OF", "COREP_LR", "COREP_LE", "COREP_NSFR", "FINREP9"), "quarterly"),
}
LATER = dict.fromkeys((("COREP_OF", "2025-03-31"), ("COREP_LR", "2025-03-31")), "2025-06-30")  # Art. 24(1)
QUARTERLY = {"03-31": "05-12", "06-30": "08-11", "09-30": "11-11", "12-31": "02-11"}  # 02-11 of the next year


def due_date(module: str, period: str) -> str:
    """Return the day on which a return is due by Art. 3, YYYY-MM-DD, moved from a weekend to Monday; "" if it is not known.

    It is not known for other modules, and for quarterly returns whose reference date ends no calendar quarter (Art. 3(3)).
    """
    frequency = MODULES.get(module)
    day = datetime.date.fromisoformat(period)
    if frequency == "monthly":
        due = day + datetime.timedelta(days=15)
    elif frequency == "quarterly" and period[5:] in QUARTERLY:
        due = datetime.date.fromisoformat(f"{day.year + (day.month == 12)}-{QUARTERLY[period[5:]]}")
    else:
        return ""
    return _working_day(due).isoformat()


def late_filings(report: Report) -> list[RuleResult]:
    """Return one result LATE_FILING for each return: violated, met, or undecided with its reason.

    The file names tell when the files were made; the earliest file of a module counts. `value` and `limit` are days after the
    reference date. The cell names only the module, because its figures are not at fault: the remedy is an explanation and the
    next return on time, not the same return again.
    """
    first: dict[str, str] = {}  # module -> day on which its earliest file was made; "" -> "" for files without a time
    for path in report.files or (report.path,):
        name = EBA_NAME.search(pathlib.Path(path).name)
        day = f"{name[2][:4]}-{name[2][4:6]}-{name[2][6:8]}" if name else ""
        if name and is_day(day):
            module = next((module for module in MODULES if module.replace("_", "") == name[1]), name[1])
            first[module] = min(day, first.get(module, day))
        else:
            first[""] = ""
    modules = sorted(first, key=lambda module: not module)  # files without a time come last
    return [judge_return(module, first[module], report.period) for module in modules]


def judge_return(module: str, day: str, period: str) -> RuleResult:
    """Judge whether a return made on `day` was late. `day` and `period` are YYYY-MM-DD; an unknown module is ""."""
    due = LATER.get((module, period)) or (due_date(module, period) if module else "")
    law = f"ITS (EU) {'2021/451' if period < '2025' else '2024/3117'}"
    article = "Art. 24(1)" if (module, period) in LATER else f"Art. 3(1){POINTS.get(MODULES.get(module, ''), '')}"
    state, reason, days = "undecided", f"no due date is known for {module} as of {period}", (None, None)
    if not module:
        reason = "the file's name has no time of creation"
    if due:
        state, more = "violated", ": late for certain, unless it corrects an earlier file"
        if day <= due:
            state, more = "ok", ". When it arrived is not known"
        elif day <= _latest(due):
            state, more = "undecided", ", or later if that is a public holiday"
        reason = f"{module} as of {period} was made on {day}; it was due on {due}{more}"
        start, *ends = map(datetime.date.fromisoformat, (period, day, due))
        days = tuple(Decimal((end - start).days) for end in ends)
    return RuleResult(
        rule_id=RULE,
        kind="filing",
        state=state,
        cell=(module, "", ""),
        value=days[0],
        limit=days[1],
        relation="max",
        legal=f"{law} {article}",
        unit="days",
        title="Return made or received after its due date",
        reason=reason,
    )


def _working_day(day: datetime.date) -> datetime.date:
    """Return the day itself, or the Monday after a weekend."""
    return day + datetime.timedelta(days=7 - day.weekday() if day.weekday() > 4 else 0)


def _latest(due: str) -> str:
    """Return the last day to which holidays can move a due date: the next working day.

    In April it is four days later, because Easter moves a date from Good Friday to Tuesday.
    """
    day = datetime.date.fromisoformat(due)
    return _working_day(day + datetime.timedelta(days=4 if day.month == 4 else 1)).isoformat()
