"""Notes of the bank in its files, and findings.csv: what no engine finds."""

from dataclasses import replace
from decimal import Decimal

import pytest

from common.errors import UserError
from data.regulator.banks import make_bank
from data.regulator.dpm import BUILT_IN, load_cells
from data.regulator.examples import read_filing
from data.regulator.filing import write_reports
from data.regulator.findings import Finding, apply_findings, load_findings, parse_cell, write_findings
from data.regulator.render import cell_name, render_report
from data.regulator.report import Note
from data.regulator.rules import evaluate

LCR, LEVERAGE = ("C_76.00.a", "r0030", "c0010"), ("C_47.00", "r0340", "c0010")
BANK, PERIOD = make_bank(0, 1), "2026-03-31"


def read(tmp_path, lcr: str, notes=()):
    figures = {LCR: Decimal(lcr), LEVERAGE: Decimal("0.0351")}
    cells = load_cells(BUILT_IN)
    files = write_reports(tmp_path, BANK, PERIOD, figures, cells, (), "json", notes)
    return read_filing(files, cells), cells


def finding(state: str, **more) -> Finding:
    return Finding(BANK.entity, PERIOD, "LCR_PLEDGED", state, cell_name(LCR), kind="pledged", **more)


def test_notes_are_read_back_with_the_cells_they_are_attached_to(tmp_path) -> None:
    notes = (Note("Bonds of 9% are pledged.", (LCR,), "en"), Note("Leverage, “audited”.", (LEVERAGE,), "en"))
    report, cells = read(tmp_path, "1.04", notes)
    assert sorted(report.notes, key=notes.index) == list(notes) and not report.warnings
    lines = render_report(report, cells, "labels").splitlines()
    assert lines[1:3] == ["Leverage ratio 3.51%", "LCR 104%"]
    assert sorted(lines[3:]) == ["Note: Bonds of 9% are pledged.", "Note: Leverage, “audited”."]
    assert "note on C 76.00.a r0030 c0010 | Bonds of 9% are pledged." in render_report(report, cells).splitlines()


def test_findings_add_replace_and_lift(tmp_path) -> None:
    sound = evaluate(read(tmp_path, "1.04")[0])
    assert apply_findings(sound, []) == apply_findings(sound, [finding("benign")]) == []
    (added,) = apply_findings(sound, [finding("violated", value=Decimal("0.95"), limit=Decimal(1))])
    assert (added.rule_id, added.kind, added.value, added.limit, added.relation) == (
        "LCR_PLEDGED",
        "note",
        Decimal("0.95"),
        1,
        "min",
    )
    assert (added.unit, added.decimals) == ("xbrli:pure", 4) and "Art. 7(2)" in added.legal
    low = evaluate(read(tmp_path, "0.93")[0])
    assert [result.rule_id for result in apply_findings(low, [])] == ["LCR_MIN"]
    assert apply_findings(low, [replace(finding("lifted"), rule="LCR_MIN")]) == []
    (corrected,) = apply_findings(low, [replace(finding("violated", value=Decimal("0.5")), rule="LCR_MIN")])
    assert (corrected.value, corrected.limit) == (Decimal("0.5"), 1)


def test_findings_csv_round_trip_and_its_mistakes(tmp_path) -> None:
    path = tmp_path / "findings.csv"
    findings = (finding("violated", value=Decimal("0.95"), limit=Decimal(1)), finding("benign"))
    write_findings(path, findings)
    assert load_findings(path) == {(BANK.entity, PERIOD): findings}
    text = path.read_text()
    for old, new, message in [
        ("benign", "harmless", "line 3: the state 'harmless' must be one of"),
        ("0.95", "95%", "line 2: the value '95%' is not a number; write 0.95 for 95%"),
        ("period,", "date,", "line 1: the column 'period' is missing"),
    ]:
        path.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message):
            load_findings(path)


@pytest.mark.parametrize("cell, row", [(LCR, ""), (("C_28.00", "*", "c350"), "SYNC00AB")])
def test_printed_cells_are_parsed(cell, row) -> None:
    assert parse_cell(cell_name(cell, row)) == (cell, row)
