"""The judge of the law: each of its cases, on examples that keep to the law and on examples that do not."""

import ast
import json
import pathlib
import re

import pytest

from tests.xbrl.rules import law_check
from tests.xbrl.rules.law_check import CASES, audit, judge, main, read_answer
from xbrl.corpus.generate import Request, make_unit, plan_units
from xbrl.rules.rules import RULES_FILE

ROOT = pathlib.Path(__file__).parents[3]
REPORT = """Some Bank (LEI) | reference date 2026-03-31 | amounts in EUR
not filed: C 22.00
C 02.00.a Capital Adequacy - Risk Exposure Amounts
r0010 c0010 TOTAL RISK EXPOSURE AMOUNT | 1000000 thousand
C 03.00 Capital Adequacy - Ratios
r0010 c0010 CET1 Capital ratio | 9.40%
r0030 c0010 T1 Capital ratio | 11.10%
r0050 c0010 Total capital ratio | 13.50%
r0130 c0010 Total SREP capital requirement ratio (TSCR) | 9.50%
r0140 c0010 TSCR: to be made up of CET1 capital | 5.34%
r0160 c0010 Overall capital requirement ratio (OCR) | 13.50%
r0180 c0010 OCR: to be made up of Tier 1 | 11.10%
C 04.00 Capital Adequacy - Memorandum Items
r0740 c0010 Combined Buffer Requirement | 40000 thousand
C 27.00 Identification of the counterparty
SYNC00A x
c070 Type of counterparty | eba_qTE:qx2056
C 28.00 Exposures in the non-trading and trading book
SYNC00A
c350 % of Tier 1 capital | 24.00%
SYNC00B
c350 % of Tier 1 capital | 25.00%
C 47.00 Leverage ratio calculation
r0340 c0010 Leverage Ratio | 3.10%
r0420 c0010 Total SREP leverage ratio requirement (TSLRR) | 3.10%
C 76.00.a Liquidity Coverage. Calculations. Total (DA)
r0010 c0010 Liquidity buffer | 100 million
r0020 c0010 Net liquidity outflow | 99 million
Earlier reports
2025-12-31: CET1 ratio 4.00%"""


def judged(report, answer, rules=(), facts=()):
    """Return the complaints about an answer to the text of a report."""
    messages = [{"role": "user", "content": report}, {"role": "assistant", "content": answer}]
    return judge({"messages": messages, "violations": list(rules), "note_facts": list(facts)})


def contradictions(text):
    """Return the printed or legal requirements that the figures of a report do not meet."""
    complaints = judged(text, "Note:\nnone\nViolations:\nnone\nDirective:\n")
    return [sentence for case, sentence in complaints if case == "contradicted"]


def test_the_judge_imports_nothing_of_the_project():
    tree = ast.parse(pathlib.Path(law_check.__file__).read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert names == {
        "collections",
        "collections.abc",
        "dataclasses",
        "decimal",
        "json",
        "pathlib",
        "re",
        "sys",
        "typing",
    }


def test_law_command_counts_and_complains(tmp_path, capsys):
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps(example(facts=facts)) + "\n" for facts in ([], [PLEDGED])), encoding="utf-8")
    assert main([str(file)]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["examples"] == 2 and json.loads(captured.out)["misstatement"] == 1
    assert captured.err == ": misstatement: the note states pledged, and PLEDGED_COUNTED is no finding\n"


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("", "", ""),
        ("CET1 Capital ratio | 9.40%", "CET1 Capital ratio | 9.30%", "r0010 is 0.0930 beside 0.0534 + "),
        ("Leverage Ratio | 3.10%", "Leverage Ratio | 3.09%", "requirement 0.0310"),
        ("c350 % of Tier 1 capital | 24.00%", "c350 % of Tier 1 capital | 25.01%", "exposure to SYNC00A"),
        ("Liquidity buffer | 100 million", "Liquidity buffer | 96 million", "liquidity buffer"),
    ],
)
def test_the_judge_sees_each_contradiction(before, after, sentence):
    assert before in REPORT
    lines = contradictions(REPORT.replace(before, after))
    assert sentence in lines[0] if sentence else lines == []


def test_the_judge_knows_the_years_output_floor():
    floored = REPORT.replace(
        "C 03.00 Capital", "r0036 c0010 UNFLOORED | 900000 thousand\nC 02.00.b X\nr0010 c0020 S | {} thousand\nC 03.00 Capital"
    )  # fmt: skip
    assert contradictions(floored.format(1_818_000)) == []  # 55% of 1,818,000 are below 1,000,000
    assert len(contradictions(floored.format(1_819_000))) == 1
    assert len(contradictions(floored.format(1_700_000).replace("2026-03-31", "2027-03-31"))) == 1  # 60%
    assert contradictions(floored.format(1_700_000).replace("2026-03-31", "2024-12-31")) == []
    # Until 2029 the floor is at most 125% of 900 million; from 2030 it is 72.5% without a cap.
    capped = floored.format(3_000_000).replace("AMOUNT | 1000000", "AMOUNT | 1125000")
    assert contradictions(capped) == contradictions(capped.replace("2026-03-31", "2029-12-31")) == []
    assert len(contradictions(capped.replace("2026-03-31", "2030-03-31"))) == 1
    assert len(contradictions(capped.replace("AMOUNT | 1125000", "AMOUNT | 1124000"))) == 1


@pytest.mark.parametrize(
    ("rule", "before", "met", "equal"),
    [
        ("CET1_MIN", "CET1 Capital ratio | 9.40%", "4.51%", "4.50%"),
        ("TSCR_CET1", "CET1 Capital ratio | 9.40%", "5.35%", "5.34%"),
        ("CBR_CET1", "CET1 Capital ratio | 9.40%", "9.37%", "9.36%"),  # 5.34% + 40 / 1000, and two roundings
        ("LR_TSLRR", "Leverage Ratio | 3.10%", "3.11%", "3.10%"),
        ("LE_LIMIT", "c350 % of Tier 1 capital | 25.00%", "24.99%", "25.00%"),
        ("OUTPUT_FLOOR", "EXPOSURE AMOUNTS | 1000000 thousand", "1200000 thousand", "1100000 thousand"),
    ],
)
def test_a_finding_on_a_met_limit_is_unfounded(rule, before, met, equal):
    """A figure equal to the limit may have been rounded to the limit."""
    floor = "r0036 c0010 UNFLOORED | 900000 thousand\nC 02.00.b X\nr0010 c0020 S | 2000000 thousand\nC 03.00 Capital"
    report = REPORT.replace("C 03.00 Capital", floor).replace("EXPOSURE AMOUNT |", "EXPOSURE AMOUNTS |")
    for figure, expected in ((met, {"unfounded"}), (equal, set())):
        printed = report.replace(before, f"{before.rpartition('| ')[0]}| {figure}")
        complaints = judged(printed, "Violations:\nnone", [rule])
        assert before in report and {case for case, text in complaints if text.startswith(rule)} == expected


def test_higher_limits_and_the_leverage_buffer_are_known():
    limits = REPORT.replace("C 27.00 Identification", "C 26.00 Limits\nr030 c010 % | 40.00%\nC 27.00 Identification")
    assert contradictions(limits.replace("| 24.00%", "| 40.00%")) == []
    assert len(contradictions(limits.replace("| 24.00%", "| 40.01%"))) == 1
    assert len(contradictions(limits.replace("| 25.00%", "| 30.00%"))) == 1  # no institution
    olrr = "LR_OLRR | C 47.00 r0340 c0010 | 3.10% | min 3.35% | CRR Art. 92(1a); CRD Art. 141b"
    report = NOTED.replace("r0420 c0010", "r0440 c0010 OLRR | 3.35%\nr0420 c0010")
    assert cases([olrr], report=report) == set() and cases([], report=report) == {"contradicted"}
    early = report.replace("2026-03-31", "2022-12-31")
    assert cases([olrr], report=early) == {"leverage_buffer"} and cases([], report=early) == set()


def test_rounded_figures_are_no_contradiction():
    """A printed ratio was rounded to four places. Its parts are compared if it is missing, or if they do not round to it."""
    labels = "Some Bank\nLiquidity buffer 2623.9 mn\nNet outflow 2624 mn\nLCR 100%"
    assert contradictions(labels) == []
    for old, new in (("\nLCR 100%", ""), ("24 mn", "26 mn")):
        assert len(contradictions(labels.replace(old, new))) == 1
    assert contradictions(REPORT.replace("outflow | 99 million", "outflow | 102 million")) == []  # 101 each
    assert len(contradictions(REPORT.replace("outflow | 99 million", "outflow | 103 million"))) == 1


PLEDGED = '"pledged with Landesbank" | pledged | applies | EUR 500000 | Landesbank | 2025-08-14'
COUNTED = (
    "PLEDGED_COUNTED | C 76.00.a r0010 c0010 | 100 million | max 99500 thousand | Delegated Reg. (EU) 2015/61 Art. 7(2)"
)
LCR_PLEDGED = "LCR_PLEDGED | C 76.00.a r0030 c0010 | 95.00% | min 100% | Delegated Reg. (EU) 2015/61 Art. 4(2), 7(2)"
NOTED = f"{REPORT.partition('Earlier')[0]}note on C 76.00.a r0010 c0010 | Bonds are pledged with Landesbank."


def example(lines=(), facts=(), report=NOTED, **more) -> dict:
    """Make an example with these lines of `Violations:` and `Note:`."""
    answer = "\n".join(["Note:", *(facts or ["none"]), "Violations:", *(lines or ["none"]), "Directive:", "Buy."])
    parsed = read_answer(answer)
    stated = [dict(fact) for fact in parsed.facts or ()]
    violated = list(dict.fromkeys(line.rule for line in parsed.violations))
    messages = [{"role": "user", "content": report}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "violations": violated, "note_facts": stated, "period": "2026-03-31"} | more


def cases(*arguments, **more) -> set[str]:
    return {case for case, _ in judge(example(*arguments, **more))}


def test_a_stated_misstatement_is_always_a_finding():
    assert cases([], [PLEDGED]) == {"misstatement"} and cases() == cases([COUNTED], [PLEDGED]) == set()
    assert cases([], [PLEDGED.replace("| applies", "| does not apply")]) == set()
    for kind in ("own_shares", "profit"):
        assert "misstatement" in cases([], [PLEDGED.replace("| pledged |", f"| {kind} |")])
    assert cases([COUNTED], []) == {"unfounded"}
    assert cases([], [PLEDGED], note_facts=[]) == {"misstatement", "facts"}
    without_facts = example([])
    del without_facts["note_facts"]
    without_facts["messages"][1]["content"] = without_facts["messages"][1]["content"].removeprefix("Note:\nnone\n")
    assert judge(without_facts) == []  # whether the note states anything is not known


def test_facts_alone_are_judged_with_the_labels():
    stated = [{"kind": "pledged", "applies": True, "amount": None, "who": []}]
    report = "Some Bank\nLeverage ratio 5%\nLCR 104%\nNote: Bonds are pledged; LCR would be 95% without them."
    answer = 'Note:\n"Bonds are pledged" | pledged | applies | - | - | -'
    for rules, expected in ((["LCR_PLEDGED", "PLEDGED_COUNTED"], set()), (["LCR_PLEDGED"], {"misstatement"})):
        assert {case for case, _ in judged(report, answer, rules, stated)} == expected


def test_connected_clients_count_together():
    connected = ['"owns it" | connected | applies | - | Delta Oil and SYNC00B | -']
    row = "c070 Type of counterparty | eba_qTE:qx2056"
    assert cases([], connected, report=NOTED.replace(row, "c021 Name | Delta Oil")) == {"consequence"}
    without = NOTED.replace(f"SYNC00A x\n{row}", "c021 Name | Delta Oil")  # a row without the line of its key
    assert without != NOTED and cases([], connected, report=without) == set()


def test_a_limit_missed_without_the_amount_counts():
    large = [PLEDGED.replace("500000", "5000000")]
    assert cases([COUNTED.replace("99500", "95000")], large) == {"consequence"}
    assert cases([COUNTED.replace("99500", "95000"), LCR_PLEDGED], large) == set()
    assert cases([COUNTED, LCR_PLEDGED], [PLEDGED]) == set()  # 99.5 of 99 million: rounding leaves it open
    much = REPORT.replace("Liquidity buffer | 100 million", "Liquidity buffer | 120 million")
    assert cases(
        [COUNTED.replace("100 million", "120 million").replace("99500", "119500"), LCR_PLEDGED], [PLEDGED], report=much
    ) == {"consequence"}
    assert cases([COUNTED.replace("99500", "90000")], [PLEDGED]) == {"consequence"}  # 100 million less 0.5 million
    assert cases([COUNTED.replace("r0010", "r0030")], [PLEDGED]) == {"consequence"}


def test_guideline_citations_and_late_cells_are_refused():
    guideline = "OCR_CALC | C 03.00 r0160 c0010 | 13.50% | expected 13.6% | EBA/GL/2022/03"
    assert cases([guideline]) == {"guideline"}
    late = "LATE_FILING | C 01.00 r0010 c0010 | 65 | max 42 | ITS (EU) 2024/3117 Art. 3(1)"
    assert cases([late]) == {"late"}
    assert cases([late.replace("C 01.00 r0010 c0010", "COREP_OF")]) == set()


@pytest.mark.parametrize("profile", ["short", "quickstart"])
def test_a_hundred_reports_draw_no_complaint(tmp_path, profile):
    """The judge is not blind: it complains if any finding is removed, or any fact of a note is reversed.

    The long form is judged in tests/xbrl/corpus/test_corpus.py, which makes it.
    """
    request = Request(100, 0, profile, [0.8, 0.1, 0.1])
    examples = [example for unit in plan_units(request) for example in make_unit(tmp_path, request, unit).examples]
    counts, complaints = audit(examples)
    assert complaints == [] and not any(counts[case] for case in CASES)
    assert counts["examples"] == 100 and counts["with_facts"] >= 20
    assert counts["clean"] >= 15 and counts["pillar1"] >= 15
    if profile == "quickstart":  # its labels do not name all that follows
        return
    for item in examples:
        violated = item["violations"]
        for removed in set(violated) - {"LCR_CALC", "TSCR_FLOOR", "TSCR_CET1_FLOOR", "TSCR_T1_FLOOR"}:
            fewer = [rule for rule in violated if rule != removed]
            assert judge(item | {"violations": fewer}), (removed, item["id"])
        for reversed_fact in item["note_facts"]:
            facts = [fact | {"applies": fact["applies"] != (fact is reversed_fact)} for fact in item["note_facts"]]
            assert judge(item | {"note_facts": facts}), (reversed_fact, item["id"])


def test_the_page_has_every_rule_with_its_citations():
    page = (ROOT / "docs" / "xbrl.md").read_text(encoding="utf-8")
    links = {label.casefold() for label in re.findall(r"^\[([^]]+)]: http", page, re.MULTILINE)}
    section = page.split("\n## The rules\n")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.count(" | ") == 3]
    listed = {row[0]: row for row in rows[2:]}  # below the heads of the columns
    stored = [json.loads(line) for line in RULES_FILE.read_text(encoding="utf-8").splitlines()]
    assert list(listed) == [rule["id"] for rule in stored]
    for rule in stored:
        _, linked, checked, meaning = listed[rule["id"]]
        sources = re.findall(r"\[([^]]+)](?:\[([^]]+)])?", linked)
        article = re.sub(r"\[([^]]+)](\[[^]]+])?", r"\1", linked)
        versions = rule["legal"] if isinstance(rule["legal"], list) else []
        since = [f"from {version['from']}" if version["from"] else "until then" for version in versions[::-1]]
        dated = [f"{when}: {version['text']}" for when, version in zip(since, versions[::-1], strict=True)]
        guidance = [f"guidance: {rule['guidance']}"] if "guidance" in rule else []
        assert article == "; ".join([*(dated or [rule["legal"]]), *guidance]), rule["id"]
        assert checked == rule["checked"] and checked in ("text", "memory") and meaning
        assert {(label or text).casefold() for text, label in sources} <= links, rule["id"]
        assert sources or checked == "memory", rule["id"]  # whoever says that a text was read links it
