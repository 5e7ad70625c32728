"""The built-in DPM table, and the way from a small DPM 2.0 database to a distilled file."""

import sqlite3

import pytest

from data.regulator.dpm import BUILT_IN, Cells, load_cells
from errors import UserError


@pytest.fixture(scope="module")
def cells() -> Cells:
    return load_cells(BUILT_IN)


@pytest.mark.parametrize(
    ("table", "count"),
    [("C_01.00", 110), ("C_02.00.a", 101), ("C_03.00", 28), ("C_47.00", 87), ("C_76.00.a", 30), ("C_84.00.a", 19)],
)
def test_every_cell_with_a_datapoint_is_there(cells, table, count):
    found = cells.in_table(table)
    assert len(found) == count
    assert len({(cell.row, cell.column) for cell in found}) == count


def test_a_datapoint_leads_to_its_cell_and_back(cells):
    cell = cells.by_datapoint("dp5435202")
    assert (cell.table, cell.row, cell.column, cell.type) == ("C_76.00.a", "r0030", "c0010", "percentage")
    assert cell.row_label == "LIQUIDITY COVERAGE RATIO (%)"
    assert cells.by_cell("C_76.00.a", "r0030", "c0010") == cell


def test_a_datapoint_in_two_tables_is_told_apart_by_the_table(cells):
    assert cells.by_datapoint("dp3220634", "C_01.00").row == "r0015"
    assert cells.by_datapoint("dp3220634", "C_47.00").row == "r0320"
    assert cells.by_datapoint("dp3220634", "C_03.00") is None
    assert [cell.table for cell in cells.all_of("dp3220634")] == ["C_01.00", "C_47.00"]


def test_grey_and_unknown_cells_are_none(cells):
    assert cells.by_cell("C_84.00.a", "r0220", "c0010") is None
    assert cells.by_datapoint("dp1") is None
    assert cells.by_datapoint("eba_met:mi53") is None


def test_a_table_knows_its_module_and_file(cells):
    table = cells.table("C_76.00.a")
    assert (table.template, table.module, table.csv_file) == ("C_76.00", "COREP_LCR_DA", "c_76.00.a.csv")
    assert table.entry_point == "http://www.eba.europa.eu/eu/fr/xbrl/crr/fws/corep/4.2/mod/corep_lcr_da.json"
    assert cells.table("C_28.00").keys == ("qINC",)
    assert cells.table_code("C_76.00.A.csv") == "C_76.00.a"
    assert cells.table_code("u_01.00.csv") == "U_01.00"


def test_open_rows_are_starred(cells):
    assert cells.by_cell("C_28.00", "*", "c350").type == "percentage"


def test_a_broken_distilled_file_is_one_sentence(tmp_path):
    file = tmp_path / "dpm-4.2.sqlite"
    file.write_bytes(b"SQLite format 3\0 nonsense")
    with pytest.raises(UserError, match="fetch_dpm.py"):
        load_cells(file)
    sqlite3.connect(tmp_path / "other.sqlite").execute("create table x (y)")
    with pytest.raises(UserError, match="not a distilled DPM"):
        load_cells(tmp_path / "other.sqlite")
    with pytest.raises(UserError, match="no such file"):
        load_cells(tmp_path / "absent.sqlite")
