"""From report files to examples: file contents, printed reports and figures, labels, answers, the register."""

import dataclasses
import json
import zipfile
from decimal import Decimal

import pytest

from common.errors import UserError
from tests.processes import run_python
from xbrl.answers.answer_reader import Answer, parse_answer
from xbrl.answers.answers import write_answer
from xbrl.answers.profiles import FULL
from xbrl.corpus.banks import make_bank
from xbrl.corpus.card import token_counter
from xbrl.corpus.examples import make_example, read_filing
from xbrl.corpus.filing import write_reports
from xbrl.corpus.population import make_filings
from xbrl.read.dpm import load_cells
from xbrl.read.filed_report import Fact
from xbrl.read.register import read_register, write_register
from xbrl.read.render import Addressee, format_fact, format_figure, format_limit, render_earlier, render_report
from xbrl.rules.rules import built_in_rules, evaluate, violations

# Rules that the figures below can decide.
RULES = [rule for rule in built_in_rules() if rule.id in ("CET1_MIN", "TSCR_CET1", "LCR_MIN", "OF_SUM")]
CELLS = load_cells()
PROFILE = dataclasses.replace(FULL, instruction="Find the violations.", rules=RULES)
BANK = Addressee("LEI", "Nordhaven Bank", "FI", "savings bank")
FIGURES = {
    ("C_01.00", "r0010", "c0010"): Decimal(90_001_000),
    ("C_01.00", "r0015", "c0010"): Decimal(80_000_000),
    ("C_01.00", "r0020", "c0010"): Decimal(80_000_000),
    ("C_01.00", "r0750", "c0010"): Decimal(12_000_000),
    ("C_02.00.a", "r0010", "c0010"): Decimal(1_860_000_000),
    ("C_03.00", "r0010", "c0010"): Decimal("0.0430"),
    ("C_76.00.a", "r0030", "c0010"): Decimal("1.042"),
}


def make_report(folder, figures=FIGURES, period="2026-03-31"):
    """Write `figures` as report files and read them back."""
    bank = dataclasses.replace(make_bank(0, 0), decimals=-3, currency="EUR")
    return read_filing(write_reports(folder, bank, period, figures, CELLS, ["C_04.00"]), CELLS)


@pytest.mark.parametrize("syntax", ["csv", "json"])
def test_both_syntaxes_read_back_the_same_figures(tmp_path, syntax):
    open_rows = 0
    for index in range(8):
        (filing,) = make_filings(0, index, 1, FULL)
        paths = write_reports(tmp_path, filing.bank, filing.period, filing.figures, CELLS, filing.unfiled, syntax)
        report = read_filing(paths, CELLS)
        assert report.warnings == () and len({path.name.split("_")[3] for path in paths}) == len(paths)  # a module each
        assert report.format == ("xBRL-CSV" if syntax == "csv" else "xBRL-JSON")
        read = {}
        for fact in report.facts:
            open_rows += "qINC" in fact.keys
            for table, row, column in (fact.cell, *fact.other_cells):
                read[table, fact.keys.get("qINC", row), column] = fact.value
            if isinstance(fact.value, Decimal):
                money = fact.unit == f"iso4217:{filing.bank.currency}"
                assert money or fact.unit == "xbrli:pure"
                assert fact.decimals == (filing.bank.decimals if money else filing.bank.ratio_decimals)
        expected = {key: value for key, value in filing.figures.items() if key != ("C_47.00", "r0320", "c0010")}
        assert {key: read.get(key) for key in expected} == expected  # Tier 1 is one fact that is shown in two tables
        assert (report.entity, report.period) == (f"{filing.bank.entity}.{filing.bank.scope}", filing.period)
        assert report.currency == filing.bank.currency
        assert [template for template, filed in report.filing_indicators.items() if not filed] == list(filing.unfiled)
    assert open_rows > 10
    if syntax == "csv":
        with zipfile.ZipFile(paths[-1]) as package:
            info = json.loads(package.read(f"{paths[-1].stem}/reports/report.json"))["documentInfo"]
        assert info["extends"][0].endswith(".json") and "/mod/" in info["extends"][0]
    else:
        assert json.loads(paths[-1].read_text())["documentInfo"]["taxonomy"][0].endswith(".xsd")


def test_report_text_in_both_styles(tmp_path):
    report = make_report(tmp_path)
    filed = dict.fromkeys(("C_01.00", "C_02.00", "C_03.00", "C_76.00"), True)
    assert report.filing_indicators == filed | {"C_04.00": False}
    lines = render_report(report, CELLS, "cells", BANK).splitlines()
    assert lines[0] == f"Nordhaven Bank ({report.entity}) | reference date 2026-03-31 | amounts in EUR"
    assert lines[1] == "not filed: C 04.00"
    assert lines[2:4] == ["C 01.00 Capital Adequacy - Own funds definition", "r0010 c0010 OWN FUNDS | 90001 thousand"]
    assert "r0010 c0010 CET1 Capital ratio | 4.30%" in lines
    assert len(lines) == 2 + 4 + len(FIGURES)
    compact = render_report(report, CELLS, "labels", BANK).splitlines()
    assert compact[0] == "Nordhaven Bank"
    assert compact[-3:] == ["TREA 1860 mn", "CET1 ratio 4.3%", "LCR 104.2%"]


@pytest.mark.parametrize(
    ("value", "unit", "decimals", "plain", "compact"),
    [
        ("0.0431", "xbrli:pure", 4, "4.31%", "4.31%"),
        ("1.042", "xbrli:pure", 4, "104.20%", "104.2%"),
        ("-0.07", "xbrli:pure", 2, "-7%", "-7%"),
        ("0.04315", "xbrli:pure", 4, "4.315%", "4.315%"),  # more places than `decimals` claims: not rounded
        ("1340000", "iso4217:EUR", -3, "1340 thousand", "1340 k"),
        ("12400000000", "iso4217:EUR", -6, "12400 million", "12.4 bn"),
        ("1340001", "iso4217:EUR", 0, "1340001", "1340001"),
        ("0", "iso4217:EUR", -3, "0 thousand", "0"),
    ],
)
def test_format_of_figures(value, unit, decimals, plain, compact):
    assert format_figure(Decimal(value), unit, decimals) == plain
    assert format_figure(Decimal(value), unit, decimals, compact=True) == compact


def test_counts_are_no_percentages_and_limits_are_rounded():
    def text(value, decimals, type="", cell=("C 76.00.a", "0030", "0010"), kind=""):
        fact = Fact("x", Decimal(value), "xbrli:pure", decimals, "A", "2026-03-31", {}, cell, type=type)
        return format_fact(fact, kind=kind)

    assert text("101", 0) == text("101", "INF") == text("101", 0, "integer") == "101"
    assert text("0.0431", 4) == text("0.0431", 4, "percentage") == "4.31%"
    assert text("1", 0, "percentage") == text("1", 0, "percentage", cell=None) == "100%"
    assert text("0.0431", 4, cell=None) == "0.0431"  # without a cell or type, the unit is unknown
    assert (text("2.5", 2, kind="decimal"), text("1", "INF", kind="percentage")) == ("2.5", "100%")
    for value, printed in {"0.045": "4.5%", "1": "100%", "0.0562": "5.62%", "0.98374219": "98.37%"}.items():
        assert format_limit(Decimal(value), None, 4) == printed
    assert format_limit(Decimal(1_290_000), "iso4217:EUR", -3) == "1290 thousand"


def test_an_answer_is_written_and_parsed(tmp_path):
    report = make_report(tmp_path)
    violated = violations(evaluate(report, RULES))
    text = write_answer(violated, "To the Board.\nDo it.")
    assert text.splitlines() == [
        *("Note:", "none", "Violations:"),
        "CET1_MIN | C 03.00 r0010 c0010 | 4.30% | min 4.5% | CRR Art. 92(1)(a)",
        "OF_SUM | C 01.00 r0010 c0010 | 90001 thousand | expected 92000 thousand | CRR Art. 72",
        *("Directive:", "To the Board.", "Do it."),
    ]
    answer = parse_answer(text)
    assert (answer.rule_ids, answer.directive, answer.void) == (("CET1_MIN", "OF_SUM"), "To the Board.\nDo it.", 0)
    assert parse_answer(write_answer([], "Well done.")) == Answer((), "Well done.")


def test_earlier_reports_are_shown_and_letters_mention_them(tmp_path):
    key = ("C_03.00", "r0010", "c0010")
    dates = ("2025-09-30", "2025-12-31", "2026-03-31", "2026-06-30")
    reports = [
        make_report(tmp_path, {**FIGURES, key: Decimal(ratio)}, date)
        for date, ratio in zip(dates, ("0.05", "0.0440", "0.0435", "0.0430"), strict=True)
    ]
    example = make_example(reports[3], BANK, CELLS, PROFILE, reports[:3])
    assert example["messages"][0]["content"].endswith(
        "Earlier reports\n2025-12-31: CET1 ratio 4.40%, LCR 104.20%\n2026-03-31: CET1 ratio 4.35%, LCR 104.20%"
    )
    assert "4.35%" in example["messages"][1]["content"]
    alone = make_example(reports[3], BANK, CELLS, PROFILE)["messages"]
    assert alone[0]["content"].startswith("Find the violations.\n\nNordhaven Bank (")
    assert "Earlier reports" not in alone[0]["content"] and "4.35%" not in alone[1]["content"]
    assert render_earlier([], [key]) == ""


def test_an_open_row_is_named_by_its_key(tmp_path):
    code = "SYNC00ABCDEFGHIJKL12"
    figures = {("C_28.00", code, "c350"): Decimal("0.2600"), ("C_28.00", code, "c210"): Decimal(26_000_000)}
    figures |= {("C_27.00", code, "c070"): "eba_qTE:qx2055"}
    report = make_report(tmp_path, figures)
    lines = render_report(report, CELLS, "cells").splitlines()
    assert lines[1:] == [
        "C 27.00 Identification of the counterparty",
        f"{code} LEI",
        "c070 Type of counterparty | eba_qTE:qx2055",
        "C 28.00 Exposures in the non-trading and trading book",
        code,
        "c210 Total | 26000 thousand",
        "c350 % of Tier 1 capital | 26.00%",
    ]
    (result,) = violations(evaluate(report, [rule for rule in built_in_rules() if rule.id == "LE_LIMIT"]))
    assert write_answer([result], "x").splitlines()[3] == (
        f"LE_LIMIT | C 28.00 {code} c350 | 26.00% | max 25% | CRR Art. 395(1)"
    )


def test_a_missing_figure_is_called_not_reported(tmp_path):
    report = make_report(tmp_path)
    rules = [rule for rule in built_in_rules() if rule.id in ("CET1_SURPLUS", "CET1_SIGN")]
    assert write_answer(violations(evaluate(report, rules)), "x").splitlines()[3:5] == [
        "CET1_SURPLUS | C 03.00 r0020 c0010 | not reported | expected -3700 thousand | CRR Art. 92(1)(a)",
        "CET1_SIGN | C 03.00 r0020 c0010 | not reported | max 0 | CRR Art. 92(1)(a)",
    ]


def test_register(tmp_path):
    path = tmp_path / "register.csv"
    odd = Addressee("A", "Müller, Sohn & Co", "DE", "savings bank")
    write_register(path, [odd, BANK])
    assert read_register(path) == {"A": odd, "LEI": BANK}
    write_register(path, [odd, odd])
    with pytest.raises(UserError, match="line 3: entity A"):
        read_register(path)
    path.write_text("name,entity,country,type\n A Bank , LEI , DE , bank \n")
    assert read_register(path) == {"LEI": Addressee("LEI", "A Bank", "DE", "bank")}
    path.write_text("entity,name,country,type\nLEI, ,DE,bank\n")  # its letter would have no addressee
    with pytest.raises(UserError, match="line 2, column name: it is empty"):
        read_register(path)
    path.write_text("entity,name\n")
    with pytest.raises(UserError, match="'country'"):
        read_register(path)


def test_a_directory_without_a_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot load a tokenizer from .*: it has no tokenizer.json"):
        token_counter(tmp_path)


def test_make_reports_writes_what_its_card_says(tmp_path):
    out = tmp_path / "a"
    command = ("xbrl/scripts/make_reports.py", "--out", out, "--examples", "24", "--processes", "1", "--style", "short")
    command += ("--splits", "0.5", "0.25", "0.25")
    done = run_python(*command)
    assert done.returncode == 0, done.stderr
    last = "test: 5 notes in 5 reports, each at most 1 times; 1 reports without"
    assert done.stdout.splitlines()[-1].startswith(last)
    card = json.loads((out / "dataset.json").read_text())
    assert card["notes"]["train"] == {"notes": 10, "reports": 10, "most": 1, "without": 2}
    assert len((out / "note_facts.jsonl").read_text().splitlines()) == 20
    assert sum(card["files"].values()) + 1 == len(list((out / "reports").iterdir()))  # and replies.csv
    for split, counts in card["splits"].items():
        part = [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]
        assert counts["examples"] == len(part) == (12 if split == "train" else 6)
        assert counts["clean"] == sum(not example["violations"] for example in part)
        assert sum(counts["violations"].values()) == sum(len(example["violations"]) for example in part)
        assert all(example["split"] == split for example in part)
    again = run_python(*command)
    assert again.returncode == 0 and "already made" in again.stdout
    refused = run_python(*command, "--profile", "quickstart")
    assert refused.returncode == 2 and "--style is of the profile full; leave it out with --profile q" in refused.stderr
