"""Look-ups in the DPM of the repository, and distilling a small DPM 2.0 database."""

import sqlite3
import zipfile
from pathlib import Path

import pytest

from common.errors import UserError
from xbrl.read.dpm import BUILT_IN, Cells, load_cells, table_code
from xbrl.read.dpm_distil import distil
from xbrl.read.render import form_texts


@pytest.fixture(scope="module")
def cells() -> Cells:
    return load_cells(BUILT_IN)


def test_a_file_names_its_table_in_any_case(cells):
    assert table_code("C_76.00.A.csv") == "C_76.00.a"
    assert all(table_code(f"{code}.csv") == code for code in cells.codes)


def test_an_invalid_distilled_file_is_rejected_with_one_sentence(tmp_path):
    file = tmp_path / "dpm.zip"
    file.write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match="not a distilled DPM.*regulator.py dpm"):
        load_cells(file)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("x", "y")
    with pytest.raises(UserError, match="its members are others"):
        load_cells(tmp_path / "other.zip")
    with pytest.raises(UserError, match="no such file"):
        load_cells(tmp_path / "absent.zip")


def dpm_database(path: Path) -> sqlite3.Connection:
    """A DPM 2.0 database with two versions of one table. The ratio changed from variable version 143076 to 5435202."""
    database = sqlite3.connect(path)
    database.executescript("""
    create table Release (Code, Status, ReleaseID);
    insert into Release values ('3.4', 'released', 1), ('4.2', 'released', 5), ('4.4', 'validation', 9);
    create table Framework (Code, FrameworkID); insert into Framework values ('COREP', 1);
    create table Module (FrameworkID, ModuleID); insert into Module values (1, 1), (1, 2);
    create table ModuleVersion (ModuleID, StartReleaseID, EndReleaseID, Code, VersionNumber, ModuleVID);
    insert into ModuleVersion values (1, 1, 5, 'COREP_OF', '3.1.0', 1), (1, 5, null, 'COREP_OF', '4.1.0', 2),
      (2, 5, null, 'AAA', '1.0.0', 3), (1, 9, null, 'COREP_OF', '5.0.0', 4);
    create table ModuleVersionComposition (ModuleVID, TableVID);
    insert into ModuleVersionComposition values (1, 10), (2, 11), (3, 11), (2, 12), (4, 13);
    create table TableVersion (Code, Name, TableID, AbstractTableID, KeyID, StartReleaseID, EndReleaseID, TableVID);
    insert into TableVersion values ('C_76.00.a', 'Old name', 1, null, null, 1, 5, 10),
      ('C_76.00.a', 'Calculations .a', 1, 9, null, 5, null, 11), ('X_28.00', 'Open', 2, null, 7, 5, null, 12),
      ('C_76.00', 'Calculations', 9, null, null, 1, null, 90), ('X_99.00', 'Later', 3, null, null, 9, null, 13);
    create table TableVersionCell (TableVID, CellID, CellCode, VariableVID);
    insert into TableVersionCell values (10, 1, '{C_76.00.a, r0030, c0010}', 143076),
      (11, 1, '{C_76.00.a, r0030, c0010}', 5435202), (11, 2, '{C_76.00.a, r0020, c0010}', null),
      (10, 2, '{C_76.00.a, r0020, c0010}', 99),
      (12, 3, '{X_28.00, r*, c350, s0001}', 77), (12, 5, '{X_28.00, r*, c360, s0001}', 66), (13, 4, '{X_99.00, r1, c1}', 88);
    create table Cell (RowID, ColumnID, CellID);
    insert into Cell values (1, 2, 1), (3, 2, 2), (null, 4, 3), (null, 4, 4), (null, 4, 5);
    create table TableVersionHeader (TableVID, HeaderID, HeaderVID, "Order");
    insert into TableVersionHeader values (10, 1, 1, 1), (10, 2, 2, 1), (11, 1, 1, 1), (11, 2, 2, 1), (12, 4, 4, 1);
    create table HeaderVersion (HeaderVID, Label);
    insert into HeaderVersion values (1, '  LCR
      ratio'), (2, 'Value'), (4, 'Share');
    create table VariableVersion (VariableID, PropertyID, ContextID, KeyID, VariableVID);
    insert into VariableVersion values (1000, 50, 60, null, 143076), (1000, 50, 60, null, 5435202), (77, 51, null, 7, 77),
      (99, 51, 60, null, 99), (143076, 51, 60, 7, 66),
      (88, 50, null, null, 88);
    create table CompoundKey (Signature, KeyID); insert into CompoundKey values ('52#', 7);
    create table Property (PropertyID, DataTypeID); insert into Property values (50, 1), (51, 1), (52, 2);
    create table DataType (Code, DataTypeID); insert into DataType values ('p', 1), ('s', 2);
    create table Category (Code, CategoryID); insert into Category values ('_PR', 1002), ('BA', 3);
    create table ItemCategory (ItemID, StartReleaseID, CategoryID, Code, Signature);
    insert into ItemCategory values (50, 1, 1002, 'old-pi1', null), (50, 1, 1002, 'pi1', null), (51, 1, 1002, 'pi2', null),
      (52, 1, 1002, 'INC', null), (53, 1, 1002, 'BAS', null), (54, 1, 3, 'x17', 'eba_BA:x17');
    create table ContextComposition (ContextID, PropertyID, ItemID); insert into ContextComposition values (60, 53, 54);
    """)
    database.commit()
    return database


def test_a_database_is_distilled(tmp_path):
    target = tmp_path / "dpm.zip"
    source = dpm_database(tmp_path / "source.sqlite")
    assert distil(source, target) == "2 tables, 6 cells"
    cells = load_cells(target)
    assert (cells.release, cells.codes, cells.open_keys) == ("4.2", ("C_76.00.a", "X_28.00"), {"INC"})
    distil(source, tmp_path / "again.zip")
    assert target.read_bytes() == (tmp_path / "again.zip").read_bytes()
    ratio = cells.by_cell("C_76.00.a", "r0030", "c0010")
    labels = (ratio.type, ratio.row_label, ratio.column_label)
    assert (ratio.datapoint, *labels) == ("dp5435202", "percentage", "LCR ratio", "Value")
    assert (ratio.metric, ratio.members) == ("pi1", "eba_dim_3.4:BAS=eba_BA:x17")
    # The id in a report of an earlier release, and the variable id in a report from before DPM 2.0.
    for datapoint in ("dp143076", "dp1000"):
        older = cells.by_datapoint(datapoint, "C_76.00.a")
        assert (older.row, older.table_label, older.current) == ("r0030", "Calculations", False)
    assert [cell.datapoint for cell in cells.in_table("C_76.00.a")] == ["dp5435202"]
    assert cells.by_signature("pi1", {"BAS": "x17"}) == ((ratio,), ())
    assert cells.by_signature("pi1", {}) == ((), ())
    # A cell that release 4.2 no longer has, and a variable whose id equals the version id of another variable.
    assert cells.by_cell("C_76.00.a", "r0020", "c0010").datapoint == "dp99"
    assert [cell.row for cell in cells.by_signature("pi2", {"BAS": "x17"})[0]] == ["r0020"]
    assert cells.by_datapoint("dp143076", "X_28.00") is None
    open_row = cells.by_cell("X_28.00", "*", "c350")
    assert (open_row.datapoint, open_row.sheet) == ("dp77", "s0001")
    assert cells.by_signature("pi2", {}, ["INC"]) == ((open_row,), ("INC",))
    assert cells.by_signature("pi2", {"INC": "x1"}) == ((open_row,), ("INC",))
    table = cells.table("C_76.00.a")
    assert (table.template, table.module, table.module_version) == ("C_76.00", "COREP_OF", "4.1.0")
    assert table.entry_point == "http://www.eba.europa.eu/eu/fr/xbrl/crr/fws/corep/4.2/mod/corep_of.json"
    assert cells.table("X_28.00").keys == ("INC",)
    assert cells.table("X_99.00") is None


def test_an_unsuitable_database_is_rejected_with_one_sentence(tmp_path):
    with pytest.raises(UserError, match="not a DPM 2.0 database"):
        distil(sqlite3.connect(tmp_path / "x.sqlite"), tmp_path / "out.zip")
    database = dpm_database(tmp_path / "y.sqlite")
    database.execute("update Release set Status = 'draft' where Code = '4.2'")
    with pytest.raises(UserError, match="does not contain the final DPM release 4.2"):
        distil(database, tmp_path / "out.zip")


def test_built_in_cells_are_found_by_their_signature(cells):
    """Every built-in cell is found by its metric and dimensions, which is how xBRL-XML identifies it."""
    found = 0
    for table in ("C_01.00", "C_03.00", "C_28.00", "C_76.00.a", "F_01.01"):
        for cell in cells.in_table(table):
            members = dict(part.partition(":")[2].split("=") for part in cell.members.split())
            explicit = {name: member.partition(":")[2] for name, member in members.items()}
            places, _ = cells.by_signature(cell.metric, explicit, cells.table(table).keys)
            assert cell in places
            found += 1
    assert found == 110 + 28 + 34 + 30 + 61


def test_forms_have_every_label_of_a_module(cells) -> None:
    texts = list(form_texts(cells, ("COREP_LCR_DA",)))
    assert {text.split(" ")[1][:2] for text in texts} == {"72", "73", "74", "75", "76", "77"}
    assert any("\nr0030 c0010 LIQUIDITY COVERAGE RATIO (%) | 352.02%" in text for text in texts)
    with pytest.raises(UserError, match="has no module COREP; choose from AE, CODIS, COREP_ALM"):
        next(form_texts(cells, ("COREP",)))


def test_the_data_point_model_of_the_repository_is_small():
    assert BUILT_IN.stat().st_size <= 2 * 2**20
