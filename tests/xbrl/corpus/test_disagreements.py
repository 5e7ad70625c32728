"""Letters that contradict the labels of their report in articles, cells or percentages."""

from dataclasses import replace
from decimal import Decimal

import pytest

from xbrl.answers.answer_reader import letter_in
from xbrl.answers.profiles import FULL
from xbrl.answers.statements import sentences
from xbrl.corpus.archive import PERCENTAGE, find_disagreements, may_agree
from xbrl.corpus.banks import make_bank
from xbrl.corpus.examples import make_example, read_filing
from xbrl.corpus.filing import write_reports
from xbrl.corpus.population import make_filings
from xbrl.desk.letters import LANGUAGES, Context, write_letter
from xbrl.read.dpm import load_cells
from xbrl.rules.rules import evaluate, violations

CELLS = load_cells()


def test_citations_percentages_and_sentences() -> None:
    article = ("CRR", "92(1)(a)")
    assert may_agree(article, ("CRR", "92")) and may_agree(article, ("", "92(1)"))
    assert not any(may_agree(article, unlike) for unlike in (("CRR", "92(1)(b)"), ("CRD", "92"), ("CRR", "92a")))
    text = "The LCR is 93% (CRR Art. 412(1)). It fell by 7,5 percentage points, i.e. 2.25 per cent. Quote: 4,5 Prozent, 3 Prozentpunkte."
    assert PERCENTAGE.findall(text) == ["93", "2.25", "4,5"]
    parts = ["Under Art. 92 we act.", "You shall:", "- file;", "Stop at 4.5% now."]
    assert sentences("Under Art. 92 we act. You shall:\n- file; Stop at 4.5% now.") == parts


def reported(folder, leverage="0.05", lcr="1.31"):
    """Return (results, violations) of a bank with these leverage and liquidity coverage ratios."""
    figures = {("C_47.00", "r0340", "c0010"): Decimal(leverage), ("C_76.00.a", "r0030", "c0010"): Decimal(lcr)}
    results = evaluate(read_filing(write_reports(folder, make_bank(0, 1), "2026-03-31", figures, CELLS), CELLS))
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
CLEARED = (
    "Your note is noted: 93% in C 76.00.a r0030 c0010 is no breach of CRR Art. 412(1), which is waived under Article 8."
)
LEVERAGE = "the labels have LR_MIN | C 47.00 r0340 c0010 | 2.51% | min 3% | CRR Art. 92(1)(d)"
CITED = "the letter cites CRR Art. 412(1) (LCR_MIN), but the labels have no violation of it"


@pytest.mark.parametrize(
    ("letter", "ratios", "expected"),
    [
        (BREACH, {"lcr": "0.93"}, []),
        (GERMAN, {"lcr": "0.93"}, []),
        (SOUND, {}, []),
        (SOUND, {"leverage": "0.0251"}, ["the letter says 'no objections' and demands nothing, but the labels have LR_MIN", LEVERAGE]),
        (BREACH, {}, ["the letter demands something ('we order'), but the labels have no violation", CITED]),
        (BREACH, {"leverage": "0.0251"}, [CITED, LEVERAGE]),
        (CLEARED, {"lcr": "0.93"}, ["the labels have LCR_MIN"]),  # a sentence that clears a violation is no objection
    ],
)  # fmt: skip
def test_a_letter_beside_the_labels(tmp_path, letter, ratios, expected) -> None:
    lines = find_disagreements(letter, *reported(tmp_path, **ratios))
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)
        assert line.endswith("which the letter does not object to") == start.startswith("the labels have")


def test_a_finding_of_a_note_is_a_label(tmp_path) -> None:
    """The letter is compared with the labels, not with the engine's results. A note may lift LCR_MIN or add LCR_PLEDGED."""
    results, violated = reported(tmp_path, lcr="0.93")
    assert find_disagreements(CLEARED, results, []) == []
    assert "the letter demands something" in find_disagreements(BREACH, results, [])[0]
    legal = "Delegated Reg. (EU) 2015/61 Art. 7(2)"
    pledged = replace(violated[0], rule_id="LCR_PLEDGED", legal=legal, value=Decimal("0.85"))
    letter = f"Without the pledged assets the LCR is 85%, below 100% ({legal}). You shall restore it."
    assert find_disagreements(letter, results, [pledged]) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_untested_rules_in_a_letter_are_no_objection(tmp_path, language) -> None:
    results, violated = reported(tmp_path)
    untested = tuple(result for result in results if result.state == "undecided")
    addressee = make_bank(0, 1).addressee
    letter = write_letter(violated, addressee, "2026-03-31", Context(untested=untested), language=language)
    assert "LR_OLRR" in [result.rule_id for result in untested] and "92(1a)" in letter
    assert find_disagreements(letter, results, violated) == []
    for context in (Context(), Context(unexamined="undecided")):  # the paragraph on the right to be heard is no demand
        clean = write_letter([], addressee, "2026-03-31", context, language=language, grouped=True)
        assert find_disagreements(clean, results, []) == []


def test_generated_letters_agree_only_with_their_reports(tmp_path) -> None:
    """Of 60 generated letters at most two raise a false alarm. Every letter beside a report with other violations is reported."""
    read = []
    for filing in [filing for index in range(15) for filing in make_filings(8, index, 4, FULL)]:
        report = read_filing(write_reports(tmp_path, filing.bank, filing.period, filing.figures, CELLS), CELLS)
        answer = make_example(report, filing.bank.addressee, CELLS, FULL)["messages"][-1]["content"]
        results = evaluate(report)
        read.append((letter_in(answer), results, violations(results)))
    assert sum(bool(find_disagreements(*own)) for own in read) <= 2
    swapped = [
        find_disagreements(letter, *of_other)
        for (letter, *own), (_, *of_other) in zip(read, read[7:] + read[:7], strict=True)
        if {result.rule_id for result in own[1]} != {result.rule_id for result in of_other[1]}
    ]
    assert len(swapped) > 40 and all(swapped)
