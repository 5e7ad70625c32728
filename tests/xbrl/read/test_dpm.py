"""Look-ups in the DPM of the repository."""

import sqlite3
from contextlib import closing

import pytest

from common.errors import UserError
from xbrl.read.dpm import BUILT_IN, Cells, load_cells, table_code
from xbrl.read.dpm_database import release_id
from xbrl.read.render import form_texts


@pytest.fixture(scope="module")
def cells() -> Cells:
    return load_cells()


def test_a_file_names_its_table_in_any_case(cells):
    assert table_code("C_76.00.A.csv") == "C_76.00.a"
    assert all(table_code(f"{code}.csv") == code for code in cells.codes)


def test_cells_of_older_releases_are_found(cells):
    """The ids of one ratio in three releases, and a cell that release 4.2 no longer has."""
    ratio = cells.by_cell("C_76.00.a", "r0030", "c0010")
    labels = (ratio.type, ratio.row_label, ratio.column_label)
    assert (ratio.datapoint, *labels) == (
        *("dp5435202", "percentage", "LIQUIDITY COVERAGE RATIO (%)"),
        "Value / Percentage",
    )
    for datapoint in ("dp3232274", "dp143076"):
        older = cells.by_datapoint(datapoint, "C_76.00.a")
        assert (older.row, older.column, older.current) == ("r0030", "c0010", False)
        assert older not in cells.in_table("C_76.00.a") and older in cells.all_in_table("C_76.00.a")
    assert cells.by_signature(ratio.metric, {})[0][0] == ratio
    assert cells.by_datapoint("dp143076", "C_28.00") is None
    removed = cells.by_cell("C_02.00.a", "r0010", "c0020")
    assert (removed.datapoint, removed.current) == ("dp3294979", False)


def test_open_rows_leave_their_key_open(cells):
    share = cells.by_cell("C_28.00", "*", "c350")
    members = {"qJLM": "qx2035", "qLJI": "qx2011", "qZZX": "qx2130"}
    expected = ((share,), ("qINC",))
    assert cells.by_signature("qALA", members, ["qINC"]) == expected
    assert cells.by_signature("qALA", {**members, "qINC": "qx1"}) == expected
    assert cells.by_signature("qALA", members) == ((), ())


def test_a_table_names_its_module_and_keys(cells):
    table = cells.table("C_28.00")
    assert (table.template, table.module, table.module_version) == ("C_28.00", "COREP_LE", "3.3.0")
    assert table.entry_point == "http://www.eba.europa.eu/eu/fr/xbrl/crr/fws/corep/4.2/mod/corep_le.json"
    assert (table.keys, cells.table("X_99.00"), cells.release) == (("qINC",), None, "4.2")


def test_built_in_cells_are_found_by_their_signature(cells):
    """Every built-in cell is count by its metric and dimensions, which is how xBRL-XML identifies it."""
    count = 0
    for table in ("C_01.00", "C_03.00", "C_28.00", "C_76.00.a", "F_01.01"):
        for cell in cells.in_table(table):
            members = dict(part.partition(":")[2].split("=") for part in cell.members.split())
            explicit = {name: member.partition(":")[2] for name, member in members.items()}
            places, _ = cells.by_signature(cell.metric, explicit, cells.table(table).keys)
            assert cell in places
            count += 1
    assert count == 110 + 28 + 34 + 30 + 61


def test_forms_have_every_label_of_a_module(cells) -> None:
    texts = list(form_texts(cells, ("COREP_LCR_DA",)))
    assert {text.split(" ")[1][:2] for text in texts} == {"72", "73", "74", "75", "76", "77"}
    assert any("\nr0030 c0010 LIQUIDITY COVERAGE RATIO (%) | 352.02%" in text for text in texts)
    with pytest.raises(UserError, match="has no module COREP; choose from AE, CODIS, COREP_ALM"):
        next(form_texts(cells, ("COREP",)))


def test_the_packaged_data_model_is_small():
    assert BUILT_IN.stat().st_size <= 2 * 2**20


def test_a_draft_release_is_refused():
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("create table Release as select '4.2' as Code, 'draft' as Status, 5 as ReleaseID")
        with pytest.raises(UserError, match="does not contain the final DPM release 4.2"):
            release_id(database)


def test_advice_on_unknown_facts_depends_on_the_syntax(cells):
    """MiCA 4.0 describes dp3295992 with the dimension qAAJ, release 4.2 without it. xBRL-CSV names the datapoint itself."""
    assert cells.by_datapoint("dp3295992", "Q_02.00")
    assert cells.by_signature("qAOB", {"qAAA": "qx2078"})[0]
    assert cells.by_signature("qAOB", {"qAAA": "qx2078", "qAAJ": "qx2044"})[0] == ()
    named = {syntax: cells.explain_unknown(BUILT_IN, 2, ["x"], syntax)[0] for syntax in ("xBRL-CSV", "xBRL-XML")}
    assert named["xBRL-CSV"].endswith("; ask the bank what they are")
    assert named["xBRL-XML"].endswith("; ask the bank for xBRL-CSV if its taxonomy is older, else what they are")
