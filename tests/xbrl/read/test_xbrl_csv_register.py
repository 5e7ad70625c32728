"""Registers in xBRL-CSV: tables with one column per column of the template, as in DORA's register of information."""

from decimal import Decimal

import pytest

from common.errors import UserError
from tests.xbrl.read.dora_package import CLOUD, LEI, TABLES, dora_package
from xbrl.read.dpm import BUILT_IN, load_cells
from xbrl.read.filed_report import Report
from xbrl.read.xbrl import read_report
from xbrl.read.xbrl_csv import FIXED_ROWS, KEY_COLUMNS


def read(tmp_path, **changes) -> Report:
    return read_report(dora_package(tmp_path, **changes), load_cells(BUILT_IN))


def of_table(report: Report, table: str) -> dict[tuple[str, str], object]:
    """(first key of the row, column) -> value."""
    return {
        (next(iter(fact.keys.values()), ""), fact.cell[2]): fact.value
        for fact in report.facts
        if fact.cell is not None and fact.cell[0] == table
    }


def test_each_cell_of_a_register_is_a_fact_with_the_key_of_its_row(tmp_path) -> None:
    """Only columns that are known to be numeric hold numbers: the number of a contract is a name."""
    report = read(tmp_path)
    assert (report.format, report.entity, report.period) == ("xBRL-CSV", f"{LEI}.CON", "2025-12-31")
    assert (report.currency, report.warnings) == ("EUR", ())
    assert report.filing_indicators == {table.upper(): True for table in TABLES}
    texts = ("Nordhaven Bank", "eba_GA:DE", "eba_CT:x12", "Example Authority", "2026-04-15")
    assert of_table(report, "B_01.01") == {(LEI, f"c00{n}0"): text for n, text in enumerate(texts, 2)}
    # 5 + 10 of the entity, 0 branches, 3 + 4 of two contracts, 9 of a service, 1, 2, and 1 definition
    assert len(report.facts) == 5 + 10 + 3 + 4 + 9 + 1 + 2 + 1
    facts = {fact.concept: fact for fact in report.facts}
    name, assets, days = (facts[one] for one in ("B_01.01.c0020", "B_01.02.c0110", "B_02.02.c0100"))
    assert (name.cell, name.dimensions, name.unit) == (("B_01.01", "*", "c0020"), {"ERI": LEI}, None)
    assert (assets.value, assets.unit, assets.decimals) == (Decimal(81250000000), "iso4217:EUR", -3)
    assert (days.value, days.unit, days.decimals) == (Decimal(90), "xbrli:pure", 0)
    key = {"CRZ": "4711", "qLES": LEI, "ICT": CLOUD, "IOB": "F1", "TYA": "eba_TA:S17"}
    assert days.dimensions == key | dict.fromkeys(("qNNB", "qNMP", "qNMR"), "eba_GA:IE")
    contracts = of_table(report, "B_02.01")
    assert contracts["4711", "c0050"] == Decimal("1250000.50")
    assert contracts["2024-002, cloud", "c0050"] is None  # #nil
    assert contracts["2024-002, cloud", "c0030"] == "4711"
    numeric = {fact.cell[0] for fact in report.facts if fact.cell and isinstance(fact.value, Decimal)}
    assert numeric == {"B_01.02", "B_02.01", "B_02.02"}
    assert of_table(report, "B_03.01") == {("4711", "c0030"): True}
    (definition,) = [fact for fact in report.facts if fact.cell and fact.cell[0] == "B_99.01"]
    assert (definition.cell, definition.dimensions) == (("B_99.01", "r0040", "c0010"), {})


def test_the_key_columns_are_those_of_the_dpm() -> None:
    cells = load_cells(BUILT_IN)
    assert set(KEY_COLUMNS) == {code for code in cells.codes if cells.table(code).module == "DORA"}
    for code, keys in KEY_COLUMNS.items():
        assert set(keys.values()) == set(cells.table(code).keys), code
        assert not {cell.column for cell in cells.in_table(code)} & set(keys), code
    assert {code: {cell.row for cell in cells.in_table(code)} for code in FIXED_ROWS} == {"B_99.01": {"r0040"}}


def test_oddities_of_a_register_give_warnings(tmp_path) -> None:
    lines = [
        "c0010,c0020,c0030,c0040,c0050",
        "A,eba_CO:x1,,eba_CU:EUR,about 5",
        "A,eba_CO:x2,,,",
        ",eba_CO:x3,,,",
        "B,,#none,,",
    ]
    report = read(tmp_path, **{"b_02.01": lines})
    table = next(warning.split(" line ")[0] for warning in report.warnings)
    assert table.endswith("/reports/b_02.01.csv")
    assert report.warnings == (
        f"{table} line 2: {{B_02.01, *, c0050}} B_02.01.c0050 [CRZ=A] has the non-numeric value 'about 5'",
        f"{table} line 4: the key column c0010 is empty",
        f"{table}: 1 rows have only key columns and report no fact",
        "{B_02.01, *, c0020} B_02.01.c0020 [CRZ=A] is reported as 'eba_CO:x1' and as 'eba_CO:x2'",
    )


def test_a_register_of_another_framework_is_read_as_text_with_assumed_keys(tmp_path) -> None:
    report = read(tmp_path, **{"x_01.00": ["c0010,c0020", "5,a", "5,b"], "x_02.00": ["KEY,c0010", "k1,5", "k2,6"]})
    assert [(fact.value, fact.dimensions) for fact in report.facts if fact.cell[0] == "X_01.00"] == [
        ("5", {"row": "1"}),
        ("a", {"row": "1"}),
        ("5", {"row": "2"}),
        ("b", {"row": "2"}),
    ]
    assert of_table(report, "X_02.00") == {("k1", "c0010"): "5", ("k2", "c0010"): "6"}
    assert [warning.partition(": ")[2] for warning in report.warnings] == [
        "the key columns of X_01.00 are not known; rows are numbered",
        "the key columns of X_02.00 are not known; assumed: KEY",
    ]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["c0020,c0030,c0040,c0050", "x,,,"], "b_02.01.csv line 1: the key column c0010 of B_02.01 is missing"),
        (["c0010,datapoint", "x,y"], "line 1: the columns datapoint and factValue are required"),
        (["name,amount", "x,y"], "or the columns c0010, c0020, ... of a register"),
    ],
)
def test_a_malformed_register_is_rejected_with_one_sentence(tmp_path, lines, sentence) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, **{"b_02.01": lines})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
