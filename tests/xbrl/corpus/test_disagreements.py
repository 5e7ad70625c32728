"""Citations and percentages in letters, and letters that contradict the labels of their report."""

from dataclasses import replace
from decimal import Decimal

import pytest

from xbrl.answers.answer_reader import letter_in
from xbrl.answers.statements import articles, sentences
from xbrl.corpus.archive import PERCENTAGE, covers, find_disagreements
from xbrl.corpus.banks import make_bank
from xbrl.corpus.examples import FULL, make_example, read_filing
from xbrl.corpus.filing import write_reports
from xbrl.corpus.population import make_filings
from xbrl.read.dpm import BUILT_IN, load_cells
from xbrl.read.render import Addressee
from xbrl.rules.rules import evaluate, violations

CELLS = load_cells(BUILT_IN)


@pytest.mark.parametrize(
    ("text", "cited"),
    [
        ("CRR Art. 92(1)(a)", ["CRR 92(1)(a)"]),
        ("Article 92(1), point (a), of the CRR", ["CRR 92(1)(a)"]),
        ("Article 412(1) of Regulation (EU) No 575/2013", ["CRR 412(1)"]),
        ("Articles 414 and 428b(3) CRR and Article 430 CRR", ["CRR 414", "CRR 428b(3)", "CRR 430"]),
        ("CRD Art. 104(1)(a), 104a(4)", ["CRD 104(1)(a)", "CRD 104a(4)"]),
        ("Articles 141 to 142 CRD", ["CRD 141", "CRD 142"]),
        ("CRR Art. 412(1); Delegated Reg. (EU) 2015/61 Art. 4(2)", ["2015/61 4(2)", "CRR 412(1)"]),
        ("Article 7(2) of Commission Delegated Regulation (EU) 2015/61", ["2015/61 7(2)"]),
        ("Artikel 92 Absatz 1 Buchstabe a der Verordnung (EU) Nr. 575/2013", ["CRR 92(1)(a)"]),
        ("Art. 412 Abs. 1 CRR und Art. 104 der Richtlinie 2013/36/EU", ["CRD 104", "CRR 412(1)"]),
        ("as Article 395(1) demands", ["395(1)"]),
        ("ITS (EU) 2024/3117 Annex I", ["2024/3117 Annex I"]),
        ("the articles of association, 3 articles", []),
        ("Article " + "1, " * 20_000, ["1"]),
    ],
)
def test_citations(text, cited) -> None:
    assert sorted(f"{act} {number}".strip() for act, number in articles(text)) == cited


def test_a_citation_covers_what_it_does_not_contradict() -> None:
    article = ("CRR", "92(1)(a)")
    assert covers(article, ("CRR", "92")) and covers(article, ("", "92(1)"))
    assert not covers(article, ("CRR", "92(1)(b)"))
    assert not covers(article, ("CRD", "92")) and not covers(article, ("CRR", "92a"))


def test_percentages_and_sentences() -> None:
    text = "The LCR is 93% (CRR Art. 412(1)). It fell by 7,5 percentage points, i.e. 2.25 per cent. Quote: 4,5 Prozent, 3 Prozentpunkte."
    assert PERCENTAGE.findall(text) == ["93", "2.25", "4,5"]
    assert sentences("Under Art. 92 we act. You shall:\n- file; Stop at 4.5% now.") == [
        "Under Art. 92 we act.",
        "You shall:",
        "- file;",
        "Stop at 4.5% now.",
    ]


def reported(tmp_path, **ratios: str):
    """(results, violations) of a bank with these leverage and liquidity coverage ratios; by default 5% and 131%."""
    ratios = {"leverage": "0.05", "lcr": "1.31"} | ratios
    figures = {("C_47.00", "r0340", "c0010"): Decimal(ratios["leverage"])}
    figures["C_76.00.a", "r0030", "c0010"] = Decimal(ratios["lcr"])
    report = read_filing(write_reports(tmp_path, make_bank(0, 1), "2026-03-31", figures, CELLS), CELLS)
    results = evaluate(report)
    return results, violations(results)


BREACH = """To the Management Board of Nordhaven Bank
At 31 March 2026 your liquidity coverage ratio stood at 93.0%. Article 412(1) of Regulation (EU) No 575/2013 is not met.
Pursuant to Article 104(1) CRD we order you to restore the ratio to 100% within ten working days."""
SOUND = """To the Management Board of Nordhaven Bank
We have examined your report as of 31 March 2026. The LCR of 131% complies with Article 412(1) CRR, the minimum of 100%.
We have no objections. Please continue to report under Article 430 CRR."""
GERMAN = """An den Vorstand der Nordhaven Bank
Ihre Liquiditätsdeckungsquote lag zum 31.03.2026 mit 93,00 Prozent unter der Anforderung des Art. 412 Abs. 1 CRR.
Sie haben die Quote innerhalb von zehn Arbeitstagen wiederherzustellen."""


@pytest.mark.parametrize("letter", [BREACH, GERMAN])
def test_a_letter_that_agrees_with_a_breach(tmp_path, letter) -> None:
    results, violated = reported(tmp_path, lcr="0.93")
    assert [result.rule_id for result in violated] == ["LCR_MIN"]
    assert find_disagreements(letter, results, violated) == []


def test_a_letter_that_agrees_with_a_sound_report(tmp_path) -> None:
    assert find_disagreements(SOUND, *reported(tmp_path)) == []


def test_an_approval_of_a_report_with_a_breach(tmp_path) -> None:
    first, *others = find_disagreements(SOUND, *reported(tmp_path, leverage="0.0251"))
    assert first == "the letter says 'no objections' and demands nothing, but the labels have LR_MIN"
    (missing,) = others
    assert missing.startswith("the labels have LR_MIN | C 47.00 r0340 c0010 | 2.51% | min 3% | CRR Art. 92(1)(d)")
    assert missing.endswith("which the letter does not object to")


def test_an_order_on_a_sound_report(tmp_path) -> None:
    assert find_disagreements(BREACH, *reported(tmp_path)) == [
        "the letter demands something ('we order'), but the labels have no violation",
        "the letter cites CRR Art. 412(1) (LCR_MIN), but the labels have no violation of it",
    ]


def test_a_letter_on_another_violation(tmp_path) -> None:
    results, violated = reported(tmp_path, leverage="0.0251")
    found = find_disagreements(BREACH, results, violated)
    assert [reason.split(" (")[0].split(" |")[0] for reason in found] == [
        "the letter cites CRR Art. 412(1)",
        "the labels have LR_MIN",
    ]


def test_a_finding_of_a_note_is_a_label(tmp_path) -> None:
    """The labels, not the engine, are compared: a waiver lifts LCR_MIN, and pledged assets violate LCR_PLEDGED."""
    results, violated = reported(tmp_path, lcr="0.93")
    assert "the letter demands something" in find_disagreements(BREACH, results, [])[0]
    pledged = replace(
        violated[0], rule_id="LCR_PLEDGED", legal="Delegated Reg. (EU) 2015/61 Art. 7(2)", value=Decimal("0.85")
    )
    letter = "Without the pledged assets the LCR is 85%, below 100% (Delegated Reg. (EU) 2015/61 Art. 7(2)). You shall restore it."
    assert find_disagreements(letter, results, [pledged]) == []


def test_a_sentence_that_clears_a_violation_is_no_objection(tmp_path) -> None:
    results, violated = reported(tmp_path, lcr="0.93")
    cleared = "Your note is noted: 93% in C 76.00.a r0030 c0010 is no breach of CRR Art. 412(1), which is waived under Article 8."
    assert find_disagreements(cleared, results, []) == []
    (missing,) = find_disagreements(cleared, results, violated)
    assert missing.startswith("the labels have LCR_MIN") and missing.endswith("which the letter does not object to")


def test_generated_letters_agree_with_their_reports_and_not_with_others(tmp_path) -> None:
    """60 letters of the generator: hardly any false alarm, and every letter on other violations is found."""
    filings = [filing for index in range(15) for filing in make_filings(8, index, 4, FULL)]
    read = []
    for filing in filings:
        report = read_filing(write_reports(tmp_path, filing.bank, filing.period, filing.figures, CELLS), CELLS)
        bank = Addressee(filing.bank.entity, filing.bank.name, filing.bank.country, filing.bank.model)
        results = evaluate(report)
        read.append(
            (
                letter_in(make_example(report, bank, CELLS, FULL)["messages"][-1]["content"]),
                results,
                violations(results),
            )
        )
    alarms = sum(bool(find_disagreements(*one)) for one in read)
    assert alarms <= 2
    swapped = [
        find_disagreements(letter, *of_other)
        for (letter, *own), (_, *of_other) in zip(read, read[7:] + read[:7], strict=True)
        if {result.rule_id for result in own[1]} != {result.rule_id for result in of_other[1]}
    ]
    assert len(swapped) > 40 and all(swapped)
