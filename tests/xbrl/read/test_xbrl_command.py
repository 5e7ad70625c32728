"""The command line of xbrl/scripts/read_report.py."""

import json
import subprocess
import sys
import zipfile
from decimal import Decimal
from pathlib import Path

from tests.processes import run_python
from tests.xbrl.desk.reports import write
from xbrl.rules.rules import built_in_rules

ROOT = Path(__file__).resolve().parents[3]
REPORT = {
    "documentInfo": {
        "documentType": "https://xbrl.org/2021/xbrl-csv",
        "extends": ["http://example.org/mod/corep_of.json"],
    }
}
PARAMETERS = "name,value\nentityID,rs:{}\nrefPeriod,2026-03-31\nbaseCurrency,iso4217:EUR\ndecimalsMonetary,-3\ndecimalsPercentage,4\n"


def package(path: Path, entity: str, **tables: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bank/reports/report.json", json.dumps(REPORT))
        archive.writestr("bank/reports/parameters.csv", PARAMETERS.format(entity))
        for name, rows in tables.items():
            archive.writestr(f"bank/reports/{name}.csv", "datapoint,factValue\n" + rows)
    return path


def run(*arguments: object) -> subprocess.CompletedProcess:
    return run_python("xbrl/scripts/read_report.py", *arguments)


def rows_of(done: subprocess.CompletedProcess) -> list[dict]:
    return [json.loads(line, parse_float=Decimal) for line in done.stdout.splitlines()]


def test_prints_facts_summary_and_unknown_datapoints(tmp_path):
    rows = "dp3221256,0.04312345678901234567\ndp3214277,-5000\ndp999999999,1340000\n"
    file = package(tmp_path / "a.zip", "LEI1", **{"c_03.00": rows})
    process = subprocess.run(
        [sys.executable, "xbrl/scripts/read_report.py", file], cwd=ROOT, capture_output=True, text=True
    )
    ratio, surplus, unknown, last = rows_of(process)
    assert ratio == {
        **{"concept": "dp3221256", "value": Decimal("0.04312345678901234567"), "unit": "xbrli:pure", "decimals": 4},
        **{"entity": "LEI1", "period": "2026-03-31", "dimensions": {}, "cell": ["C_03.00", "r0010", "c0010"]},
    }
    assert surplus["value"] == -5000 and "cell" not in unknown
    summary = last["summary"]
    assert (summary["format"], summary["entity"], summary["period"]) == ("xBRL-CSV", "LEI1", "2026-03-31")
    assert (summary["facts"], summary["numeric_facts"], summary["facts_with_cell"]) == (3, 3, 2)
    assert [warning.rpartition("(")[2] for warning in summary["warnings"]] == ["FILING_INDICATOR)", *["MANDATORY)"] * 3]
    (warning,) = summary["incomplete"]
    assert "1 of 3 facts have no cell" in warning and warning.endswith("; ask the bank what they are")
    done = run(file, "--text")
    assert (process.returncode, process.stderr) == (done.returncode, done.stderr) == (0, f"warning: {warning}\n")
    assert "| 4.31" in done.stdout and done.stdout.splitlines()[-1] == "dp999999999 | 1340000"


def test_rules_as_json_and_as_a_table(tmp_path):
    tables = {"c_03.00": "dp3221256,0.0431\n", "c_76.00.a": "dp3231697,60000000\ndp5435201,100000000\n"}
    file = package(tmp_path / "a.zip", "LEI1", **tables)
    *results, last = rows_of(run(file, "--rules"))
    assert "summary" in last
    rows = {row["rule_id"]: row for row in results}
    assert rows.keys() >= {"FILING_INDICATOR", "MANDATORY", *(rule.id for rule in built_in_rules())}
    cet1 = rows["CET1_MIN"]
    assert (cet1["state"], cet1["value"], cet1["limit"], cet1["formula"]) == (
        *("violated", Decimal("0.0431"), Decimal("0.045")),
        "{C_03.00,r0010,c0010} < 0.045",
    )
    assert [(figure["cell"], figure["value"], figure["source"]) for figure in cet1["inputs"]] == [
        (["C_03.00", "r0010", "c0010"], Decimal("0.0431"), "reported")
    ]
    assert (rows["TSCR_CET1"]["state"], rows["LR_MIN"]["state"]) == ("not decidable", "not applicable")
    lines = run(file, "--rules", "--text").stdout.splitlines()
    assert lines[0] == "LEI1 | 2026-03-31 | EUR | xBRL-CSV"
    start = next(number for number, line in enumerate(lines) if "LCR_MIN" in line)
    assert lines[start].startswith("  violated | LCR_MIN | 60.00% | min 100% | CRR Art. 412(1)")
    assert lines[start + 1 : start + 4] == [
        "      Liquidity coverage ratio below 100%",
        "      violated if C 76.00.a r0030 c0010 < 1",
        "      C 76.00.a r0030 c0010 = 60% (not reported; C 76.00.a r0010 c0010 / C 76.00.a r0020 c0010 = "
        "60000 thousand EUR / 100000 thousand EUR, Delegated Reg. (EU) 2015/61 Art. 4(1))",
    ]
    assert "  not applicable | LR_MIN | C 47.00 has no facts" in lines


def test_modules_of_one_bank_are_merged(tmp_path):
    files = write(tmp_path / "noted", notes=["Bonds are pledged."])
    (last,) = rows_of(run(*files, "--summary"))
    assert last["summary"]["notes"] == [
        {"text": "Bonds are pledged.", "cells": [["C_76.00.a", "r0030", "c0010"]], "language": ""}
    ]
    assert len(last["summary"]["files"]) == len(files) > 1
    (tmp_path / "empty").mkdir()
    foreign = package(tmp_path / "c.zip", "LEI2", **{"c_76.00.a": "dp5435202,1.1\n"})
    for arguments, message in (
        ((files[0], foreign), "only reports of one bank"),
        ((tmp_path / "empty",), "contains no reports"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert message in done.stderr


LEI = "SYNB00AAAAAAAAAAAA11"


def test_a_folder_is_joined_by_bank_and_date(tmp_path):
    """Two modules of one bank that disagree, another scope, another bank as an unpacked folder, and refused files."""
    (tmp_path / "march").mkdir()
    ratio = {"c_03.00": "dp3221256,0.0431\n"}
    package(tmp_path / "march" / "of.zip", f"{LEI}.CON", **ratio)
    package(tmp_path / "lcr.zip", f"{LEI}.CON", **{"c_76.00.a": "dp5435202,0.9\n", "c_03.00": "dp3221256,0.05\n"})
    package(tmp_path / "solo.zip", f"{LEI}.IND", **ratio)
    (tmp_path / "deep").mkdir()
    with zipfile.ZipFile(package(tmp_path / "deep.zip", "LEI9", **ratio)) as archive:
        archive.extractall(tmp_path / "deep")
    (tmp_path / "deep.zip").unlink()
    refused = tmp_path / f"{LEI}.CON_DE_COREP040200_COREPLR_2026-03-31_20260501.zip"
    refused.write_text("not a zip")
    (tmp_path / "bad.xbrl").write_text("<xbrl>")
    (tmp_path / "notes.txt").write_text("not a report")
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf")
    done = run(tmp_path, "--workers", 2)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [error.split(": ")[1] for error in errors] == [str(refused), str(tmp_path / "bad.xbrl")]
    assert "3 reports of 4 files, 1 incomplete; 2 files refused" in done.stderr
    rows = rows_of(done)
    assert [row["report"] for row in rows if "summary" in row] == [
        "LEI9 2026-03-31",
        f"{LEI}.CON 2026-03-31",
        f"{LEI}.IND 2026-03-31",
    ]
    joined = rows[-3]["summary"]
    assert (joined["facts"], joined["files"]) == (3, [str(tmp_path / "lcr.zip"), str(tmp_path / "march" / "of.zip")])
    assert [warning for warning in joined["warnings"] if "is reported as" in warning] == [
        "{C_03.00, r0010, c0010} dp3221256 is reported as 0.05 and as 0.0431"
    ]
    missing, differing = joined["incomplete"]
    expected = (
        f"{tmp_path / 'lcr.zip'} and {tmp_path / 'march' / 'of.zip'} both have C_03.00 and differ; remove the one"
    )
    assert missing.startswith(f"{refused}: ") and differing.startswith(expected)
    assert [row for row in rows if "incomplete" in row.get("summary", {})] == [rows[-3]]
    text = run(tmp_path, "--text", "--workers", 1).stdout.splitlines()
    assert f"== {LEI}.CON 2026-03-31 (lcr.zip, of.zip)" in text
    assert f"== incomplete: {joined['incomplete'][0]}" in text
    assert f"== {LEI}.IND 2026-03-31 (solo.zip)" in text
