"""Helpers that write reports to files, read them back and make the desk's records."""

import dataclasses
from decimal import Decimal
from pathlib import Path

from xbrl.corpus.banks import make_bank
from xbrl.corpus.examples import read_filing
from xbrl.corpus.filing import write_reports
from xbrl.desk.letters import Hearing
from xbrl.desk.record import Case, Reply, make_record
from xbrl.read.dpm import load_cells
from xbrl.read.filed_report import Note, Report
from xbrl.read.render import Addressee
from xbrl.read.replies import BankReply, add_replies, write_replies

CELLS = load_cells()
BANK = dataclasses.replace(make_bank(0, 0), currency="EUR", decimals=-3, ratio_decimals=4, scope="IND")
NAMED = Addressee(BANK.entity, BANK.name, BANK.country, BANK.model)
PERIOD = "2026-03-31"
HEARD = Hearing("2026-05-20")
CET1, T1, TC = (("C_03.00", row, "c0010") for row in ("r0010", "r0030", "r0050"))
LR, LCR, NSFR = ("C_47.00", "r0340", "c0010"), ("C_76.00.a", "r0030", "c0010"), ("C_84.00.a", "r0220", "c0040")
CLIENT = ("C_28.00", "A12", "c350")
OTHER_CLIENT = ("C_28.00", "B34", "c350")
SOUND = {
    CET1: "0.10",
    T1: "0.12",
    TC: "0.15",
    LR: "0.05",
    LCR: "1.30",
    NSFR: "1.10",
    CLIENT: "0.20",
    OTHER_CLIENT: "0.08",
}
# A report without own funds and large exposures, which has no mandatory template to miss.
SMALL = {LR: "0.05", LCR: "1.30", NSFR: "1.10"}


def write(
    folder: Path, changes: dict | None = None, figures=None, notes=(), bank=BANK, period: str = PERIOD
) -> list[Path]:
    """Write the files of one report with `figures` (default: `SOUND`), updated by `changes`, and `notes` as replies beside them.

    A change to None removes a figure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merged = {**(SOUND if figures is None else figures), **(changes or {})}
    numbers: dict = {cell: Decimal(value) for cell, value in merged.items() if value is not None}
    replies = [BankReply(f"{bank.entity}.{bank.scope}", period, Note(text, (LCR,))) for text in notes]
    if replies:
        path = folder / "replies.csv"
        before = path.read_text() if path.is_file() else ""  # of other dates
        write_replies(path, replies)
        _, header, rows = path.read_text().partition(path.read_text().splitlines()[0] + "\n")
        path.write_text((before or header) + rows)
    return write_reports(folder, bank, period, numbers, CELLS, (), "json")


def read(folder: Path, changes: dict | None = None, figures=None, notes=()) -> Report:
    files = write(folder, changes, figures, notes)
    ((report,), _) = add_replies([read_filing(files, CELLS)], files)
    return report


def contradict(files: list[Path]) -> list[Path]:
    """Give the leverage ratio a second value, 2%, in its own file."""
    for path in files:
        text = path.read_text()
        if "COREPLR" in path.name:
            assert text.count('"0.05"') == 1
            first = text.index('"f2"')
            fact = text[first : text.rindex("}\n}\n}") + 1].rstrip()
            again = fact.replace('"f2"', '"f9"').replace('"0.05"', '"0.02"')
            path.write_text(text.replace(fact, f"{fact},\n{again}"))
    return files


def record(report: Report, answer: str | None = None, profile: str = "full", decisions=(), bank=NAMED, **reply):
    """Make the record of a report, with a model's answer or by the engine alone."""
    replied = None if answer is None and not reply else Reply(profile, (), answer, **reply)
    return make_record(Case(report, bank, (), tuple(decisions), replied, hearing=HEARD))


def verdicts(outcome: dict) -> list[tuple[str, str]]:
    return [(finding["verdict"], finding["rule"]) for finding in outcome["findings"]]
