"""EBA xBRL-CSV packages, with a fact per row or a row per entry: facts, warnings, and errors for malformed packages."""

import json
import zipfile
from decimal import Decimal
from pathlib import Path

import pytest

from common.errors import UserError
from xbrl.read import safety
from xbrl.read.dpm import load_cells
from xbrl.read.render import STYLES, render_report
from xbrl.read.xbrl import merge_reports, read_report
from xbrl.read.xbrl_csv import FIXED_ROWS, KEY_COLUMNS
from xbrl.rules.quality import check_quality
from xbrl.rules.rules import evaluate

SAMPLE = Path(__file__).with_name("eba_lcr_sample")
EXTENDS = "http://www.eba.europa.eu/eu/fr/xbrl/crr/fws/corep/4.2/mod/corep_lcr_da.json"
REPORT_JSON = json.dumps({"documentInfo": {"documentType": "https://xbrl.org/2021/xbrl-csv", "extends": [EXTENDS]}})
PARAMETERS = "name,value\r\nentityID,rs:LEI1.CON\r\nrefPeriod,2026-03-31\r\nbaseCurrency,iso4217:EUR\r\n"
PARAMETERS += "decimalsMonetary,-3\r\ndecimalsPercentage,4\r\n"
INDICATORS = "templateID,reported\r\n"
FILES = {
    "META-INF/reportPackage.json": '{"documentInfo": {"documentType": "https://xbrl.org/report-package/2023"}}',
    "reports/report.json": REPORT_JSON,
    "reports/parameters.csv": PARAMETERS,
    "reports/FilingIndicators.csv": "templateID,reported\r\nC_76.00,true\r\nC_73.00,false\r\n",
    "reports/c_76.00.a.csv": "datapoint,factValue\r\ndp3231697,1200000\r\ndp5435202,1.2\r\n",
}


def package(folder: Path, name: str = "bank.zip", **changes: str | bytes | None) -> Path:
    """Write a zip of FILES. `changes` maps the file name of a member to its new content, or to None to omit the member."""
    files = {f"bank/{member}": content for member, content in FILES.items()}
    for key, content in changes.items():
        files[next((member for member in files if member.endswith("/" + key)), f"bank/reports/{key}")] = content
    target = folder / name
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in files.items():
            if content is not None:
                archive.writestr(member, content)
    return target


def read(path: Path):
    return read_report(path, load_cells())


def test_a_package_becomes_facts_with_cells(tmp_path):
    """A byte order mark and bare line feeds change nothing."""
    table = "\ufeffdatapoint,factValue\ndp3231697,1200000\ndp5435202,1.2\n"
    for changes in ({}, {"c_76.00.a.csv": table, "parameters.csv": "\ufeff" + PARAMETERS}):
        report = read(package(tmp_path, **changes))
        assert (report.format, report.entity, report.period) == ("xBRL-CSV", "LEI1.CON", "2026-03-31")
        assert (report.currency, report.warnings) == ("EUR", ())
        assert report.filing_indicators == {"C_76.00": True, "C_73.00": False}
        buffer, ratio = report.facts
        assert (buffer.value, buffer.unit, buffer.decimals) == (Decimal(1200000), "iso4217:EUR", -3)
        assert buffer.cell == ("C_76.00.a", "r0010", "c0010")
        assert (ratio.concept, ratio.value, ratio.unit) == ("dp5435202", Decimal("1.2"), "xbrli:pure")
        assert ratio.decimals == 4


def test_keys_units_and_open_rows(tmp_path):
    table = "datapoint,CUS,factValue,unit\r\ndp146850,eba_CU:USD,5,iso4217:USD\r\ndp146850,eba_CU:GBP,6,iso4217:GBP\r\n"
    report = read(package(tmp_path, **{"c_76.00.a.csv": None, "c_76.00.w.csv": table}))
    assert [(fact.dimensions, fact.unit) for fact in report.facts] == [
        ({"CUS": "eba_CU:USD"}, "iso4217:USD"),
        ({"CUS": "eba_CU:GBP"}, "iso4217:GBP"),
    ]
    assert {fact.cell for fact in report.facts} == {("C_76.00.w", "r0010", "c0010")}
    assert report.warnings == ()
    table = "datapoint,qINC,factValue\r\ndp5488066,LEI7,100\r\ndp5488066,,1\r\ndp5486643,LEI7,true\r\ndp5490355,LEI7,eba_qXX:qx1\r\n"
    report = read(package(tmp_path, **{"c_28.00.csv": table, "c_76.00.a.csv": None}))
    assert [fact.value for fact in report.facts] == [Decimal(100), Decimal(1), True, "eba_qXX:qx1"]
    assert {fact.cell[:2] for fact in report.facts} == {("C_28.00", "*")}
    assert [fact.dimensions for fact in report.facts[:2]] == [{"qINC": "LEI7"}, {}]
    assert [fact.unit for fact in report.facts] == ["iso4217:EUR", "iso4217:EUR", None, None]


def test_a_real_sample_is_read_with_its_cells():
    """The EBA's own sample is the first report that a supervisor tries. It names datapoints of release 3.2 and no cells."""
    report = read(SAMPLE)
    assert (report.entity, report.period, report.currency) == ("DUMMYLEI123456789012.CON", "2023-12-31", "EUR")
    assert len(report.facts) == 2 + 30 + 3
    assert all(fact.cell for fact in report.facts)
    assert (report.warnings, report.incomplete) == ((), ())
    ratio = next(fact for fact in report.facts if fact.cell == ("C_76.00.a", "r0030", "c0010"))
    assert (ratio.concept, ratio.value, ratio.unit) == ("dp143076", Decimal("68.41"), "xbrli:pure")
    cells = load_cells()
    # C 00.01 is filed with every COREP module, so it does not indicate a COREP OF return.
    assert cells.table("C_00.01").module == ""
    assert check_quality(report, cells) == []
    lines = render_report(report, cells).splitlines()
    assert "r0030 c0010 LIQUIDITY COVERAGE RATIO (%) | 6841.00%" in lines
    assert {line.split(" ")[0] + " " + line.split(" ")[1] for line in lines if line.startswith("C ")} == {
        *("C 00.01", "C 76.00.a", "C 76.00.w")
    }
    assert "dp" not in "".join(lines)


def test_a_maturity_in_years_is_no_percentage(tmp_path):
    """The type of the cell decides about a number without a unit; 2.50 with two decimals looks like a ratio."""
    rows = "datapoint,factValue\r\ndp5477109,2.50\r\n"
    report = read(package(tmp_path, **{"c_08.03.csv": rows, "parameters.csv": f"{PARAMETERS}decimalsDecimal,2\r\n"}))
    for style in STYLES:
        lines = render_report(report, load_cells(), style).splitlines()
        assert [line.split()[-1] for line in lines if "0.00 to <0.15" in line] == ["2.5"]


def test_an_unknown_datapoint_is_named_without_percentage(tmp_path):
    table = "datapoint,factValue\r\ndp5435202,1.2\r\ndp999999999,1340000\r\ndp3220634,7\r\ndp5,1\r\ndp6,1\r\n"
    report = read(package(tmp_path, **{"c_76.00.a.csv": table}))
    (warning,) = report.incomplete
    assert warning.startswith(
        f"{report.path}: 4 of 5 facts have no cell in the EBA's Data Point Model up to release 4.2"
    )
    assert "(dp999999999, dp3220634, dp5 and 1 more)" in warning  # the second is known, but not in this table
    assert warning.endswith("; ask the bank what they are")
    assert report.warnings == ()
    text = render_report(report, load_cells())
    assert "dp999999999 | 1340000\n" in text + "\n"
    assert text.count("%") == 2  # of the ratio, in its label and its value
    broken = read(package(tmp_path, **{"c_76.00.a.csv": "datapoint,factValue\r\ndp999999999,1.2\r\n"}))
    (lcr,) = [result for result in evaluate(broken) if result.rule_id == "LCR_MIN"]
    assert lcr.state == "undecided"
    assert lcr.reason.startswith("C 76.00.a r0030 c0010 was not read and cannot be recomputed:")


@pytest.mark.parametrize(
    ("text", "value", "decimals"),
    [
        ("1.2", Decimal("1.2"), 4),
        ("-.5", Decimal("-0.5"), 4),
        ("12e-1", Decimal("1.2"), 4),
        ("1.23d2", Decimal("1.23"), 2),
        ("1.23dINF", Decimal("1.23"), "INF"),
        ("1.20", Decimal("1.20"), 4),
        ("#nil", None, None),
        ("#empty", "", None),
        ("##1", "#1", None),
        *((text, text, None) for text in ("n/a", "1,5", "NaN", "1_000", "٣")),  # kept as it is, with a warning
    ],
)
def test_values(tmp_path, text, value, decimals):
    report = read(package(tmp_path, **{"c_76.00.a.csv": f'datapoint,factValue\r\ndp5435202,"{text}"\r\n'}))
    (fact,) = report.facts
    assert (fact.value, fact.decimals) == (value, decimals)
    assert type(fact.value) is type(value)
    start = "line 2: {C_76.00.a, r0030, c0010} dp5435202 has the non-numeric value"
    assert [start in warning for warning in report.warnings] == [True] * isinstance(value, str)


def test_inconsistent_duplicates_are_kept_with_one_warning(tmp_path):
    tables = {
        "c_01.00.csv": "datapoint,factValue\r\ndp3220634,100000\r\n",
        "c_47.00.csv": "datapoint,factValue\r\ndp3220634,200000\r\ndp3220634,200000\r\n",
        "c_76.00.a.csv": None,
    }
    report = read(package(tmp_path, **tables))
    assert [fact.cell[0] for fact in report.facts] == ["C_01.00", "C_47.00", "C_47.00"]
    (warning,) = report.warnings
    assert "{C_01.00, r0015, c0010} dp3220634 is reported as 100000 and as 200000" in warning


def test_empty_values_report_no_fact_and_are_counted(tmp_path):
    report = read(package(tmp_path, **{"c_76.00.a.csv": "datapoint,factValue\r\ndp5435202,\r\ndp3231697,1\r\n"}))
    assert len(report.facts) == 1
    assert report.warnings == ("bank/reports/c_76.00.a.csv: 1 rows have an empty factValue and report no fact",)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"report.json": None}, "report.json"),
        ({"report.json": "{"}, "not valid JSON"),
        ({"report.json": REPORT_JSON.replace("2021/xbrl-csv", "xbrl-csv")}, "documentType"),
        ({"report.json": REPORT_JSON.replace(f'"{EXTENDS}"', "")}, "extends no module"),
        ({"parameters.csv": None}, "parameters.csv with the entity and the reference period is missing"),
        ({"parameters.csv": PARAMETERS.replace("refPeriod", "period")}, "has no refPeriod"),
        *(
            ({"parameters.csv": PARAMETERS.replace("2026-03-31", day)}, f"csv line 3: refPeriod '{day}' is not a date")
            for day in ("2026-02-30", "9999-12-31", "20260331", "2026-03-31T00:00:00", "٢026-03-31")
        ),
        ({"parameters.csv": PARAMETERS + "refPeriod,2026-06-30\r\n"}, "line 7: duplicate parameter refPeriod"),
        ({"parameters.csv": PARAMETERS.replace(",-3", ",three")}, "decimalsMonetary 'three'"),
        ({"FilingIndicators.csv": f"{INDICATORS}C_76.00,yes\r\n"}, "line 2: expected the columns templateID,reported"),
        ({"FilingIndicators.csv": f"{INDICATORS}C_1,true\r\nC_1,false\r\n"}, "line 3: C_1 is both filed and not filed"),
        ({"c_76.00.a.csv": "datapoint,factValue\r\ndp1\r\n"}, "line 2: 1 fields, but the header has 2"),
        ({"c_76.00.a.csv": "datapoint,value\r\ndp1,2\r\n"}, "line 1: the columns datapoint and factValue"),
        ({"c_76.00.a.csv": "datapoint,factValue\r\nx1,2\r\n"}, "line 2: 'x1' is not a datapoint"),
        ({"c_76.00.a.csv": 'datapoint,factValue\r\ndp1,"2\r\n'}, "invalid CSV"),
        ({"c_76.00.a.csv": "datapoint,factValue\r\ndp1,é\r\n".encode("latin-1")}, "is not valid UTF-8"),
        ({"c_76.00.a.csv": ""}, "expected a header with distinct column names"),
        ({"c_76.00.a.csv": None, "FilingIndicators.csv": None}, "the report is empty"),
    ],
)
def test_a_malformed_package_is_rejected_with_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(UserError) as caught:
        read(package(tmp_path, **changes))
    assert sentence in str(caught.value)
    assert "bank.zip" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_operating_systems_are_ignored(tmp_path):
    path = package(tmp_path)
    plain = read(path)
    clutter = ["__MACOSX/bank/reports/._report.json", "__MACOSX/bank/reports/report.json", "__MACOSX/._bank"]
    clutter += [f"bank/reports/{name}" for name in (".DS_Store", "Thumbs.db", "._c_76.00.a.csv", "desktop.ini")]
    with zipfile.ZipFile(path, "a") as archive:
        for name in clutter:
            archive.writestr(name, b"\x00\x05\x16\x07")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unpacked")
    for place in (path, tmp_path / "unpacked", tmp_path / "unpacked" / "bank"):
        assert (read(place).facts, read(place).warnings) == (plain.facts, ())


@pytest.mark.parametrize(
    "name", ["/etc/x.csv", "bank/../../x.csv", "..\\x.csv", "C:/x.csv", "a\nb.csv", "__MACOSX/../../x"]
)
def test_a_member_outside_the_package_is_rejected(tmp_path, name):
    path = package(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "x")
    with pytest.raises(UserError, match="outside the package"):
        read(path)


def test_a_symlink_out_of_the_package_is_rejected(tmp_path):
    path = package(tmp_path)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unpacked")
    secret = tmp_path / "secret.csv"
    secret.write_text("datapoint,factValue\ndp1,1\n")
    (tmp_path / "unpacked/bank/reports/c_01.00.csv").symlink_to(secret)
    with pytest.raises(UserError, match="outside the package"):
        read(tmp_path / "unpacked")


def test_zip_bombs_are_rejected(tmp_path, monkeypatch):
    bomb = package(tmp_path, **{"c_01.00.csv": b"0" * (2 * 2**20)})
    with pytest.raises(UserError, match="zip bomb"):
        read(bomb)
    path = package(tmp_path)
    monkeypatch.setattr(safety, "MAX_MEMBERS", 4)
    with pytest.raises(UserError, match="5 members, more than 4"):
        read(path)
    monkeypatch.setattr(safety, "MAX_MEMBERS", 5)
    monkeypatch.setattr(safety, "MAX_MEMBER_BYTES", 100)
    with pytest.raises(UserError, match="over 100"):
        read(path)
    monkeypatch.setattr(safety, "MAX_MEMBER_BYTES", 1000)
    monkeypatch.setattr(safety, "MAX_TOTAL_BYTES", 400)
    with pytest.raises(UserError, match="when expanded, over 400"):
        read(path)


def test_a_corrupt_member_is_rejected(tmp_path):
    path = package(tmp_path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("bank/reports/c_76.00.a.csv").header_offset
    content[offset + 80 : offset + 90] = b"\xff" * 10
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        read(path)


def test_a_duplicate_member_name_is_rejected(tmp_path):
    path = package(tmp_path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("bank/reports/parameters.csv", PARAMETERS.replace("LEI1", "LEI2"))
    with pytest.raises(UserError, match="occurs twice"):
        read(path)


def test_packages_of_one_bank_are_merged(tmp_path):
    own_funds = {"c_01.00.csv": "datapoint,factValue\r\ndp3220634,100000\r\n", "c_76.00.a.csv": None}
    own_funds["FilingIndicators.csv"] = "templateID,reported\r\nC_01.00,true\r\nC_73.00,true\r\n"
    first, second = read(package(tmp_path)), read(package(tmp_path, "of.zip", **own_funds))
    merged = merge_reports([first, second, first])
    assert merged.facts == first.facts + second.facts
    assert merged.filing_indicators == {"C_76.00": True, "C_73.00": True, "C_01.00": True}
    assert (merged.format, merged.currency) == ("xBRL-CSV", "EUR")
    assert merged.files == (first.path, second.path, first.path)
    of, bank = tmp_path / "of.zip", tmp_path / "bank.zip"
    assert merged.warnings == (f"C_73.00 is filed according to {of}, but not according to {bank}",)
    table = {"c_76.00.a.csv": "datapoint,factValue\r\ndp5435202,0.9\r\n"}
    first, second = read(package(tmp_path)), read(package(tmp_path, "again.zip", **table))
    merged = merge_reports([first, second])
    assert len(merged.facts) == 3
    assert len(merged.warnings) == 1 and "is reported as 1.2 and as 0.9" in merged.warnings[0]
    foreign = read(package(tmp_path, "foreign.zip", **{"parameters.csv": PARAMETERS.replace("LEI1", "LEI2")}))
    with pytest.raises(UserError, match="only reports of one bank"):
        merge_reports([first, foreign])
    later = read(package(tmp_path, "later.zip", **{"parameters.csv": PARAMETERS.replace("2026-03-31", "2026-06-30")}))
    with pytest.raises(UserError, match="has the period"):
        merge_reports([first, later])


LEI, CLOUD = "SYNB00AAAAAAAAAAAA11", "SYNP00CCCCCCCCCCCC33"
REGISTER = {  # tables of a register of information (DORA) in the layout of EBA taxonomy 4.0; their content is invented
    "b_01.02": ["c0010,c0020,c0030,c0110", f"{LEI},Nordhaven Bank,eba_GA:DE,81250000000"],
    "b_01.03": ["c0010,c0020,c0030,c0040"],
    "b_02.01": ["c0010,c0030,c0050", "4711,,1250000.50", '"2024-002, cloud",4711,#nil'],
    "b_02.02": [
        "c0010,c0020,c0030,c0050,c0060,c0100,c0130,c0150,c0160",
        f"4711,{LEI},{CLOUD},F1,eba_TA:S17,90,eba_GA:IE,eba_GA:IE,eba_GA:IE",
    ],
    "b_03.01": ["c0010,c0020,c0030", f"4711,{LEI},true"],
    "b_99.01": ["c0010,c0020", "Standalone contract,"],
}


def read_register(folder: Path, **tables: list[str]):
    """Read the report of REGISTER with `tables` added or replaced."""
    files = {f"{name}.csv": "".join(f"{line}\r\n" for line in lines) for name, lines in (REGISTER | tables).items()}
    files["parameters.csv"] = PARAMETERS + "decimalsInteger,0\r\n"
    return read(package(folder, **{"c_76.00.a.csv": None, "FilingIndicators.csv": None}, **files))


def test_each_register_cell_is_a_keyed_fact(tmp_path):
    """Only columns that are numeric in the DPM hold numbers: a contract number is a name."""
    report = read_register(tmp_path)
    assert (report.entity, report.currency, report.warnings, report.incomplete) == ("LEI1.CON", "EUR", (), ())
    key = {"CRZ": "4711", "qLES": LEI, "ICT": CLOUD, "IOB": "F1", "TYA": "eba_TA:S17"}
    key |= dict.fromkeys(("qNNB", "qNMP", "qNMR"), "eba_GA:IE")
    assert [(fact.cell, fact.dimensions, fact.value) for fact in report.facts] == [
        (("B_01.02", "*", "c0020"), {"ESI": LEI}, "Nordhaven Bank"),
        (("B_01.02", "*", "c0030"), {"ESI": LEI}, "eba_GA:DE"),
        (("B_01.02", "*", "c0110"), {"ESI": LEI}, Decimal(81250000000)),
        (("B_02.01", "*", "c0050"), {"CRZ": "4711"}, Decimal("1250000.50")),
        (("B_02.01", "*", "c0030"), {"CRZ": "2024-002, cloud"}, "4711"),
        (("B_02.01", "*", "c0050"), {"CRZ": "2024-002, cloud"}, None),
        (("B_02.02", "*", "c0100"), key, Decimal(90)),
        (("B_03.01", "*", "c0030"), {"CRZ": "4711", "qLEA": LEI}, True),
        (("B_99.01", "r0040", "c0010"), {}, "Standalone contract"),
    ]
    assert [(fact.unit, fact.decimals) for fact in report.facts if isinstance(fact.value, Decimal)] == [
        *[("iso4217:EUR", -3)] * 2,
        ("xbrli:pure", 0),
    ]


def test_register_key_columns_agree_with_the_dpm():
    cells = load_cells()
    assert set(KEY_COLUMNS) == {code for code in cells.codes if cells.table(code).module == "DORA"}
    for code, keys in KEY_COLUMNS.items():
        assert set(keys.values()) == set(cells.table(code).keys), code
        assert not {cell.column for cell in cells.in_table(code)} & set(keys), code
    assert {code: {cell.row for cell in cells.in_table(code)} for code in FIXED_ROWS} == {"B_99.01": {"r0040"}}


def test_oddities_of_a_register_give_warnings(tmp_path):
    odd = ["c0010,c0020,c0050", "A,eba_CO:x1,about 5", "A,eba_CO:x2,", ",eba_CO:x3,", "B,#none,"]
    unknown = {"x_01.00": ["c0010,c0020", "5,a", "6,"], "x_02.00": ["KEY,c0010", "k1,5"]}
    report = read_register(tmp_path, **{"b_02.01": odd, **unknown})
    table = "bank/reports/{}.csv"
    assert report.warnings == (
        f"{table.format('b_02.01')} line 2: {{B_02.01, *, c0050}} B_02.01.c0050 [CRZ=A] has the non-numeric value 'about 5'",
        f"{table.format('b_02.01')} line 4: the key column c0010 is empty",
        f"{table.format('b_02.01')}: 1 rows have only key columns and report no fact",
        f"{table.format('x_01.00')}: the key columns of X_01.00 are not known; rows are numbered",
        f"{table.format('x_02.00')}: the key columns of X_02.00 are not known; assumed: KEY",
        "{B_02.01, *, c0020} B_02.01.c0020 [CRZ=A] is reported as 'eba_CO:x1' and as 'eba_CO:x2'",
    )
    assert [(fact.value, fact.dimensions) for fact in report.facts if fact.cell[0].startswith("X")] == [
        *(("5", {"row": "1"}), ("a", {"row": "1"}), ("6", {"row": "2"}), ("5", {"KEY": "k1"})),
    ]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["c0020,c0030", "x,"], "b_02.01.csv line 1: the key column c0010 of B_02.01 is missing"),
        (["c0010,datapoint", "x,y"], "line 1: the columns datapoint and factValue are required"),
        (["name,amount", "x,y"], "or the columns c0010, c0020, ... of a register"),
    ],
)
def test_a_malformed_register_is_rejected_with_one_sentence(tmp_path, lines, sentence):
    with pytest.raises(UserError) as caught:
        read_register(tmp_path, **{"b_02.01": lines})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
