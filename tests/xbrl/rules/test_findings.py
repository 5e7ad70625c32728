"""findings.csv: reading, writing, and correcting the engine's results with it."""

from dataclasses import replace
from decimal import Decimal

import pytest

from common.errors import UserError
from xbrl.corpus.banks import make_bank
from xbrl.corpus.examples import read_filing
from xbrl.corpus.filing import write_reports
from xbrl.read.dpm import load_cells
from xbrl.read.filed_report import Note
from xbrl.read.render import cell_name
from xbrl.read.replies import with_notes
from xbrl.rules.findings import Finding, apply_findings, lifted_results, load_findings, write_findings
from xbrl.rules.rules import evaluate

LCR, LEVERAGE = ("C_76.00.a", "r0030", "c0010"), ("C_47.00", "r0340", "c0010")
BANK, PERIOD, NOTE = make_bank(0, 1), "2026-03-31", Note("Bonds of 9% are pledged.").id


def read(tmp_path, lcr: str, notes=()):
    figures = {LCR: Decimal(lcr), LEVERAGE: Decimal("0.0351")}
    cells = load_cells()
    files = write_reports(tmp_path, BANK, PERIOD, figures, cells, (), "json")
    return with_notes(read_filing(files, cells), notes), cells


def finding(state: str, **more) -> Finding:
    return Finding(BANK.entity, PERIOD, "LCR_PLEDGED", state, cell_name(LCR), kind="pledged", note=NOTE, **more)


def test_findings_add_replace_and_lift(tmp_path) -> None:
    sound = evaluate(read(tmp_path, "1.04")[0])
    assert apply_findings(sound, []) == apply_findings(sound, [finding("benign")]) == []
    (added,) = apply_findings(sound, [finding("violated", value=Decimal("0.95"), limit=Decimal(1))])
    assert (added.rule_id, added.kind, added.relation) == ("LCR_PLEDGED", "note", "min")
    assert (added.value, added.limit) == (Decimal("0.95"), 1)
    assert (added.unit, added.decimals) == ("xbrli:pure", 4) and "7(2)" in added.legal
    low = evaluate(read(tmp_path, "0.93")[0])
    assert [result.rule_id for result in apply_findings(low, [])] == ["LCR_MIN"]
    assert apply_findings(low, [replace(finding("lifted"), rule="LCR_MIN")]) == []
    (corrected,) = apply_findings(low, [replace(finding("violated", value=Decimal("0.5")), rule="LCR_MIN")])
    assert (corrected.value, corrected.limit) == (Decimal("0.5"), 1)


def test_a_finding_concerns_one_client_only(tmp_path) -> None:
    shares = {("C_28.00", client, "c350"): Decimal(share) for client, share in (("AA", "0.31"), ("BB", "0.42"))}
    files = write_reports(tmp_path, BANK, PERIOD, {LCR: Decimal("0.93"), **shares}, load_cells(), (), "json")
    results = evaluate(read_filing(files, load_cells()))
    assert [(result.rule_id, result.row) for result in apply_findings(results, [])] == [
        ("LCR_MIN", ""), ("LE_LIMIT", "AA"), ("LE_LIMIT", "BB"),
    ]  # fmt: skip
    waived = Finding(BANK.entity, PERIOD, "LE_LIMIT", "lifted", "C 28.00 AA c350", legal="CRR Art. 7")
    assert [result.row for result in apply_findings(results, [waived])] == ["", "BB"]
    assert [(result.row, result.legal) for result in lifted_results(results, [waived])] == [("AA", "CRR Art. 7")]
    everywhere = replace(waived, cell="", legal="")
    assert [result.rule_id for result in apply_findings(results, [everywhere])] == ["LCR_MIN"]
    assert [(result.row, result.legal) for result in lifted_results(results, [everywhere])] == [
        ("AA", "CRR Art. 395(1)"), ("BB", "CRR Art. 395(1)"),
    ]  # fmt: skip
    corrected = replace(waived, state="violated", value=Decimal("0.5"))
    assert [result.value for result in apply_findings(results, [corrected])] == [
        Decimal("0.93"),
        Decimal("0.5"),
        Decimal("0.42"),
    ]


ENTITY = "SYNB00AAAAAAAAAAAA11"
ROW = f"{ENTITY},2026-03-31,LCR_PLEDGED,violated,C 76.00.a r0030 c0010,0.95,1,,{NOTE},pledged"
LIFTED, OTHER = ROW.replace("violated", "lifted"), ROW.replace("0.95", "0.94")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("period,", "date,", "line 1: the column 'period' is missing; the columns are entity,period,rule,state,"),
        (NOTE, "", "line 2, column note: '' is not the name of a note; without it nothing is decided"),
        (NOTE, NOTE[:8], f"line 2, column note: '{NOTE[:8]}' is not the name of a note"),
        (",legal,", ",article,", "line 1: the column 'article' is unknown"),
        (",kind\n", ",kind,value\n", "line 1: expected a header with distinct column names"),
        (f"{ENTITY},", ",", "line 2, column entity: '' is not the code of a bank"),
        ("2026-03-31", "2026-02-30", "line 2, column period: '2026-02-30' is not a reference date"),
        ("LCR_PLEDGED", "LCR_PLEGED", "line 2, column rule: 'LCR_PLEGED' is not a rule .*; did you mean LCR_PLEDGED?"),
        ("violated", "harmless", "line 2, column state: 'harmless' is not one of violated, lifted, benign"),
        ("C 76.00.a r0030 c0010", "LCR", "line 2, column cell: 'LCR' is not a cell such as C 76.00.a r0030 c0010"),
        (",0.95,", ",95%,", "line 2, column value: '95%' is not a number; 0.95 is 95%"),
        (",pledged", "", "line 2: 9 fields, but the header has 10"),
        (",pledged", ',"pledged', "line 2: invalid CSV"),
        (
            ",pledged\n",
            ",callable\n",
            "line 2, column kind: 'callable' is not a kind of note: one of connected, own_shares,",
        ),
        ("pledged\n", f"pledged\n{LIFTED}\n", "line 3, column state: LCR_PLEDGED is violated in .*, line 2"),
        ("pledged\n", f"pledged\n{OTHER}\n", "line 3, column value: LCR_PLEDGED is 0.95 in .*, line 2; keep one"),
    ],
)
def test_mistakes_in_findings_csv_name_line_and_column(tmp_path, old, new, message) -> None:
    path = tmp_path / "findings.csv"
    text = "entity,period,rule,state,cell,value,limit,legal,note,kind\n" + ROW + "\n"
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=f"findings.csv,? {message}"):
        load_findings(path)


def test_findings_csv_of_other_programs(tmp_path) -> None:
    """A byte order mark, spaces, CRLF, an entity with its scope and missing optional columns are accepted, Latin-1 is not."""
    path = tmp_path / "findings.csv"
    path.write_bytes(f"\ufeffperiod,entity,rule,state\r\n 2026-03-31 ,{ENTITY}.CON,LCR_MIN,lifted\r\n".encode())
    assert load_findings(path) == {
        (f"{ENTITY}.CON", "2026-03-31"): (Finding(f"{ENTITY}.CON", "2026-03-31", "LCR_MIN", "lifted"),)
    }
    path.write_bytes("entity,period,rule,state,legal\nÄ,,,,".encode("latin-1"))
    with pytest.raises(UserError, match="findings.csv is not valid UTF-8 at byte 31"):
        load_findings(path)
    with pytest.raises(UserError, match="absent.csv: no such file"):
        load_findings(tmp_path / "absent.csv")
    findings = (finding("violated", value=Decimal("0.95"), limit=Decimal(1)), finding("benign"))
    write_findings(path, findings)
    assert load_findings(path) == {(BANK.entity, PERIOD): findings}


def test_the_engine_completes_a_finding(tmp_path):
    sound = evaluate(read(tmp_path, "1.04")[0])
    bare = Finding(BANK.entity, PERIOD, "LCR_MIN", "violated", where="findings.csv, line 2")
    (added,) = apply_findings(sound, [bare])
    assert (added.cell, added.value, added.limit, added.kind) == (LCR, Decimal("1.04"), 1, "breach")
    assert "412(1)" in added.legal
    for rule, cell, column in (
        ("LCR_PLEDGED", "", "cell"),
        ("NSFR_MIN", "", "cell"),
        ("LCR_PLEDGED", cell_name(LCR), "value"),
    ):
        message = (
            f"findings.csv, line 2, column {column}: it is empty, and the engine has no {column} for {rule}; add it"
        )
        with pytest.raises(UserError, match=message):
            apply_findings(sound, [replace(bare, rule=rule, cell=cell)])
    # The rules read the buffer, but the report leaves it out.
    cell = "C 76.00.a r0010 c0010"
    counted = Finding(BANK.entity, PERIOD, "PLEDGED_COUNTED", "violated", cell, Decimal(9_000_000), Decimal(5_000_000))
    added = apply_findings(evaluate(read(tmp_path, "1.04")[0]), [counted])[-1]
    assert (added.rule_id, added.unit) == ("PLEDGED_COUNTED", "iso4217:EUR")
