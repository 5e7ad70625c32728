"""From files to examples: bytes, labels, text forms, splits, the data card."""

import json
import pathlib
import subprocess
import sys
import zipfile
from decimal import Decimal

import pytest

from data.regulator.answers import Answer, parse_answer, write_answer
from data.regulator.banks import make_bank
from data.regulator.baselines import micro_f1, score_baselines
from data.regulator.corpus import FULL, make_filing
from data.regulator.directives import directive, severity
from data.regulator.dpm import BUILT_IN, load_cells
from data.regulator.examples import make_example, read_filing, read_register, split_banks, write_register
from data.regulator.filing import write_packages
from data.regulator.render import Addressee, format_figure, format_limit, render_report
from data.regulator.rules import built_in_rules, evaluate, violations
from errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[3]
# What the few figures below can decide.
RULES = [rule for rule in built_in_rules() if rule.id in ("CET1_MIN", "TSCR_CET1", "LCR_MIN", "OF_SUM")]
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


def the_report(folder, figures=FIGURES):
    bank = make_bank(0, 0)
    bank = type(bank)(**{**vars(bank), "decimals": -3, "currency": "EUR"})
    return read_filing(
        write_packages(folder, bank, "2026-03-31", figures, load_cells(BUILT_IN), ["C_04.00"]), load_cells(BUILT_IN)
    )


def test_packages_are_one_per_module_and_the_same_bytes(tmp_path):
    filing = make_filing(0, 3, 0, FULL)
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    first, second = (
        write_packages(folder, filing.bank, filing.period, filing.figures, load_cells(BUILT_IN)) for folder in folders
    )
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert [path.name.split("_")[3] for path in first] == ["COREPLCRDA", "COREPLR", "COREPNSFR", "COREPOF"]
    with zipfile.ZipFile(first[0]) as package:
        assert json.loads(package.read(f"{first[0].stem}/reports/report.json"))["documentInfo"]["extends"][0].endswith(
            "corep_lcr_da.json"
        )


def test_files_read_back_as_they_were_meant(tmp_path):
    filing = make_filing(0, 3, 0, FULL)
    report = read_filing(
        write_packages(tmp_path, filing.bank, filing.period, filing.figures, load_cells(BUILT_IN)), load_cells(BUILT_IN)
    )
    assert {fact.cell: fact.value for fact in report.facts} == filing.figures
    assert (report.entity, report.period, report.currency) == (
        f"{filing.bank.entity}.CON",
        filing.period,
        filing.bank.currency,
    )
    assert report.warnings == ()
    money = next(fact for fact in report.facts if fact.cell == ("C_01.00", "r0010", "c0010"))
    assert (money.decimals, money.unit) == (filing.bank.decimals, f"iso4217:{filing.bank.currency}")


def test_a_cell_outside_the_dpm_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"C_01.00, r9999"):
        the_report(tmp_path, {("C_01.00", "r9999", "c0010"): Decimal(1)})


def test_report_text_in_both_styles(tmp_path):
    report, cells = the_report(tmp_path), load_cells(BUILT_IN)
    assert report.filing_indicators == {
        "C_01.00": True,
        "C_02.00": True,
        "C_03.00": True,
        "C_04.00": False,
        "C_76.00": True,
    }
    lines = render_report(report, cells, "cells", BANK).splitlines()
    assert lines[0] == f"Nordhaven Bank ({report.entity}) | reference date 2026-03-31 | amounts in EUR"
    assert lines[1:3] == ["C 01.00 Capital Adequacy - Own funds definition", "r0010 c0010 OWN FUNDS | 90001 thousand"]
    assert "r0010 c0010 CET1 Capital ratio | 4.30%" in lines
    assert len(lines) == 1 + 4 + len(FIGURES)
    compact = render_report(report, cells, "labels", BANK).splitlines()
    assert compact[0] == "Nordhaven Bank 2026-03-31"
    assert compact[-3:] == ["TREA 1860 mn", "CET1 ratio 4.3%", "LCR 104.2%"]
    with pytest.raises(UserError, match="no report style"):
        render_report(report, cells, "poem")


@pytest.mark.parametrize(
    ("value", "unit", "decimals", "plain", "compact"),
    [
        ("0.0431", "xbrli:pure", 4, "4.31%", "4.31%"),
        ("1.042", "xbrli:pure", 4, "104.20%", "104.2%"),
        ("-0.07", "xbrli:pure", 2, "-7%", "-7%"),
        ("0.04315", "xbrli:pure", 4, "4.315%", "4.315%"),  # more places than claimed: nothing is rounded away
        ("1340000", "iso4217:EUR", -3, "1340 thousand", "1340 k"),
        ("12400000000", "iso4217:EUR", -6, "12400 million", "12.4 bn"),
        ("1340001", "iso4217:EUR", 0, "1340001", "1340001"),
        ("0", "iso4217:EUR", -3, "0 thousand", "0"),
    ],
)
def test_figures(value, unit, decimals, plain, compact):
    assert format_figure(Decimal(value), unit, decimals) == plain
    assert format_figure(Decimal(value), unit, decimals, compact=True) == compact


def test_limits_have_no_false_places():
    assert [format_limit(Decimal(value), None, 4) for value in ("0.045", "1", "0.0562", "0.98374219")] == [
        "4.5%",
        "100%",
        "5.62%",
        "98.37%",
    ]
    assert format_limit(Decimal(1_290_000), "iso4217:EUR", -3) == "1290 thousand"


def test_the_answer_and_back(tmp_path):
    report = the_report(tmp_path)
    violated = violations(evaluate(report, RULES))
    text = write_answer(violated, "To the Board.\nDo it.")
    assert text.splitlines() == [
        "Violations:",
        "CET1_MIN | C 03.00 r0010 c0010 | 4.30% | min 4.5% | CRR Art. 92(1)(a)",
        "OF_SUM | C 01.00 r0010 c0010 | 90001 thousand | expected 92000 thousand | CRR Art. 72",
        "Directive:",
        "To the Board.",
        "Do it.",
    ]
    assert parse_answer(text) == Answer(("CET1_MIN", "OF_SUM"), "To the Board.\nDo it.")
    assert (
        write_answer(violated, "x", "labels").splitlines()[1]
        == "CET1_MIN | CET1 ratio | 4.3% | min 4.5% | CRR Art. 92(1)(a)"
    )
    assert parse_answer(write_answer([], "Well done.")) == Answer((), "Well done.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("The bank is fine.", None),
        ("Violations:", None),
        ("Violations:\nnone", Answer((), "")),  # cut short before the letter
        ("Violations:\nLR_MIN | Lever", Answer(("LR_MIN",), "")),
        ("Violations:\nLR_MIN | a\nLR_MIN | b\nDirective:\nx", Answer(("LR_MIN",), "x")),
        (
            "Violations:\nGOLD_MIN | a\nDirective:\nx",
            Answer(("GOLD_MIN",), "x"),
        ),  # an invented rule is a false positive
        ("Violations:\nnone\nLR_MIN | a\nDirective:\nx", None),
        ("Violations:\nthe leverage is low\nDirective:\nx", None),
        ("violations:\nnone\nDirective:\nx", None),
    ],
)
def test_parsing(text, expected):
    assert parse_answer(text) == expected


def test_letters(tmp_path):
    violated = violations(evaluate(the_report(tmp_path), RULES))
    letter = directive(violated, BANK, "2026-03-31")
    assert letter.startswith("To the Board of Managing Directors of Nordhaven Bank\nReport of 31 March 2026\n")
    for part in (
        "4.30%",
        "4.5%",
        "CRR Art. 92(1)(a)",
        "C 01.00 r0010 c0010",
        "92000 thousand",
        "Article 430 CRR",
        "Measures:",
        "within ten working days",
    ):
        assert part in letter
    assert letter == directive(violated, BANK, "2026-03-31")
    assert len({directive(violated, BANK, f"20{year}-03-31").split("\n", 2)[2] for year in range(20, 40)}) > 5
    assert (
        directive(violated[:1], BANK, "2026-03-31", "short")
        == "Nordhaven Bank must restore CET1 ratio to 4.5% and file a capital plan within 30 days."
    )
    assert "No measure" in directive([], BANK, "2026-03-31", "short")


def test_a_short_letter_names_the_highest_limit_that_a_ratio_misses(tmp_path):
    ratios = {"r0010": "0.0430", "r0140": "0.0562"}
    figures = {("C_03.00", row, "c0010"): Decimal(value) for row, value in ratios.items()}
    figures["C_76.00.a", "r0030", "c0010"] = Decimal("0.9")
    letter = directive(violations(evaluate(the_report(tmp_path, figures), RULES)), BANK, "2026-03-31", "short")
    assert letter == (
        "Nordhaven Bank must restore CET1 ratio to 5.62% and LCR to 100% and file a capital plan and a liquidity plan within 10 days."
    )


def test_severity_follows_the_shortfall(tmp_path):
    def grade(ratio):
        return severity(
            violations(evaluate(the_report(tmp_path, {("C_03.00", "r0010", "c0010"): Decimal(ratio)}), RULES))
        )

    assert [grade(ratio) for ratio in ("0.0440", "0.0430", "0.0404", "-0.01")] == [
        "minor",
        "moderate",
        "serious",
        "serious",
    ]


def test_an_example(tmp_path):
    example = make_example(
        the_report(tmp_path), BANK, load_cells(BUILT_IN), "cells", "full", "Find the violations.", RULES
    )
    assert [message["role"] for message in example["messages"]] == ["user", "assistant"]
    assert example["messages"][0]["content"].startswith("Find the violations.\n\nNordhaven Bank (")
    assert example["violations"] == ["CET1_MIN", "OF_SUM"]
    assert parse_answer(example["messages"][1]["content"]).rule_ids == ("CET1_MIN", "OF_SUM")
    assert example["id"] == f"{example['bank']}-2026-03-31"


def test_splits_are_by_bank():
    banks = [f"B{number}" for number in range(20)]
    split = split_banks(banks, (0.8, 0.1, 0.1), seed=4)
    assert [list(split.values()).count(name) for name in ("train", "validation", "test")] == [16, 2, 2]
    assert split == split_banks(banks, (0.8, 0.1, 0.1), seed=4) != split_banks(banks, (0.8, 0.1, 0.1), seed=5)
    with pytest.raises(UserError, match="add up to 1"):
        split_banks(banks, (0.8, 0.1, 0.2), seed=4)
    with pytest.raises(UserError, match="too few"):
        split_banks(banks[:2], (0.8, 0.1, 0.1), seed=4)


def test_register(tmp_path):
    path = tmp_path / "register.csv"
    odd = Addressee("A", "Müller, Sohn & Co", "DE", "savings bank")
    write_register(path, [odd, BANK])
    assert read_register(path) == {"A": odd, "LEI": BANK}
    write_register(path, [odd, odd])
    with pytest.raises(UserError, match="line 3: entity A"):
        read_register(path)
    path.write_text("entity,name\n")
    with pytest.raises(UserError, match="'country'"):
        read_register(path)


def test_baselines():
    assert micro_f1([("A",), ("A", "B")], [("A",), ("C",)]) == {"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5}
    scores = score_baselines([["B"], ["A", "B"], []], [["A"], []])
    assert {name: round(score["f1"], 3) for name, score in scores.items()} == {
        "always clean": 0.0,
        "flag everything": 0.4,  # 1 of 4 said, 1 of 1 found
        "most frequent violation": 0.0,
    }


def make(out, *more):
    command = [
        sys.executable,
        "scripts/make_reports.py",
        "--out",
        str(out),
        "--examples",
        "21",
        "--processes",
        "1",
        *more,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_make_reports_is_the_same_to_the_byte_and_complete(tmp_path):
    done = make(tmp_path / "a", "--splits", "0.6", "0.2", "0.2")
    assert done.returncode == 0, done.stderr
    assert make(tmp_path / "b", "--splits", "0.6", "0.2", "0.2").returncode == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    assert sum(file.suffix == ".zip" for file in files) == 21 * 4

    examples = {
        split: [json.loads(line) for line in (tmp_path / "a" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation", "test")
    }
    assert sum(map(len, examples.values())) == 21
    banks = [{example["bank"] for example in part} for part in examples.values()]
    assert sum(map(len, banks)) == len(set().union(*banks)) == 11  # two quarters a bank, the last has one
    card = json.loads((tmp_path / "a" / "dataset.json").read_text())
    assert {split: counts["examples"] for split, counts in card["splits"].items()} == {
        split: len(part) for split, part in examples.items()
    }
    for split, part in examples.items():
        for example in part:
            assert example["split"] == split
            assert list(parse_answer(example["messages"][1]["content"]).rule_ids) == example["violations"]

    again = make(tmp_path / "a", "--splits", "0.6", "0.2", "0.2")
    assert again.returncode == 0 and "already made" in again.stdout
    other = make(tmp_path / "a", "--seed", "1")
    assert other.returncode == 2 and other.stderr.splitlines()[-1].startswith("error: ")
