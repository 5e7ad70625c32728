"""Every figure, date, article, deadline and number of a letter, checked against the report and the rules."""

import itertools
import re

import pytest

from tests.xbrl.desk.reports import CLIENT, LCR, NAMED, read
from xbrl.answers.audit import wrong_articles, wrong_figures
from xbrl.answers.directives import write_directive
from xbrl.corpus.corpus import make_filings
from xbrl.corpus.profiles import FULL
from xbrl.corpus.trial import as_report
from xbrl.desk.engine import examine
from xbrl.desk.profiles import PROFILES
from xbrl.desk.statements import check_letter, marked, unsupported
from xbrl.desk.support import support_for
from xbrl.read.render import Addressee


@pytest.fixture(scope="module")
def support(tmp_path_factory):
    report = read(
        tmp_path_factory.mktemp("breach"), {LCR: "0.93", CLIENT: "0.27"}, notes=["Filed on 12 May 2026; 15 staff."]
    )
    return support_for(report, NAMED, examine(report, (), ()), (), PROFILES["full"])


def kinds(letter, support):
    return [(one.kind, one.text, bool(one.source)) for one in check_letter(letter, support)]


def test_each_kind_with_a_supported_and_an_unsupported_statement(support):
    assert kinds("The LCR is 93.00%, not 94.00%.", support) == [("figure", "93.00%", True), ("figure", "94.00%", False)]
    assert kinds("It is 7 percentage points below 100%.", support) == [
        ("figure", "7 percentage points", True),
        ("figure", "100%", True),
    ]
    dates = kinds("On 31 March 2026, 12 May 2026 and 2026-06-30.", support)
    assert dates == [("date", "31 March 2026", True), ("date", "12 May 2026", True), ("date", "2026-06-30", False)]
    assert kinds("See Article 412(1) CRR and Article 92 CRR.", support) == [
        ("article", "412(1)", True),
        ("article", "92", True),  # of requirements that are met
    ]
    assert kinds("CRR Art. 412(2); CRD Art. 412(1)", support) == [
        ("article", "412(2)", False),
        ("article", "412(1)", False),
    ]
    assert kinds("Nach Artikel 412 Absatz 1 CRR und Artikel 999 CRR", support) == [
        ("article", "412 Absatz 1", True),
        ("article", "999", False),
    ]
    terms = kinds("A plan is due within three working days, the rest within 44 days.", support)
    assert terms == [("deadline", "within three working days", True), ("deadline", "within 44 days", False)]
    assert kinds("15 staff and 16 clients", support) == [("number", "15", True), ("number", "16", False)]
    assert kinds("EUR 1,234,567 are missing", support) == [("number", "1,234,567", False)]


def test_names_are_no_numbers(support):
    letter = "1. Tier 1 in C 28.00 A12 c350 and C 76.00.a r0030 c0010 under Regulation (EU) No 575/2013 and Pillar 2.\n- CET1"
    assert kinds(letter, support) == []


def test_a_figure_beside_a_cell_must_be_that_of_the_cell(support):
    (right,) = check_letter("C 76.00.a r0030 c0010 shows 93.00%.", support)
    (wrong,) = check_letter("C 76.00.a r0030 c0010 shows 5.00%.", support)
    (elsewhere,) = check_letter("The leverage ratio in C 47.00 r0340 c0010 is 5.00%.", support)
    assert right.source and elsewhere.source
    assert wrong.problem == "this figure is that of LR_MIN, value, not of C 76.00.a r0030 c0010"


@pytest.mark.parametrize(
    "hidden",
    [
        *(
            "(94%)",
            "17-18%",
            "94.5pp",
            ".945",
            "1.200.000 EUR",
            "USD 77m",
            "1e9",
            "250bps",
            "17x",
            "Tier 94.5%",
            "Stage 17",
        ),
        *("ninety-four per cent", "ninety four percent", "seventeen clients", "twice the limit", "half of it"),
        *(
            "31.12.2031",
            "12/31/2031",
            "2031-06",
            "by tomorrow",
            "within a fortnight",
            "two calendar days",
            "14-day term",
        ),
        *("C 99.00 r9999 c9999", "{C 99.00, r0010, c0010}", "C 47.00 r0340 c0990", "C 99.00"),
        *("Regulation (EU) 2099/111", "Directive 1999/77/EU", "Article 412(1) CRR, 412(9)", "exposures: 17/18"),
    ],
)
def test_no_form_of_writing_hides_a_statement(support, hidden):
    found = check_letter(f"We note {hidden} here.", support)
    assert [one for one in found if not one.source], found


def test_a_ratio_that_is_named_without_its_cell_binds_its_figures(support):
    assert kinds("Your LCR was 93.00%, not 100%.", support) == [("figure", "93.00%", True), ("figure", "100%", True)]
    assert kinds("Your LCR was 5.00%.", support) == [("figure", "5.00%", False)]
    assert kinds("Your leverage ratio was 93.00%.", support) == [("figure", "93.00%", False)]


def test_figures_that_changed_places_in_a_known_sentence_are_found(support):
    right = "1. Client A12: 27.00% of Tier 1 in C 28.00 A12 c350, 2 percentage points above the limit of 25% under CRR Art. 395(1)."
    assert unsupported(check_letter(right, support)) == []
    swapped = right.replace("27.00%", "x").replace("25%", "27.00%").replace("x", "25%")
    (first, *_) = unsupported(check_letter(swapped, support))
    assert (
        first.problem
        == "no result has the value 25%, the limit 27.00%, the gap 2 percentage points, as the sentence says"
    )
    other = right.replace("A12", "B34")
    assert [one.text for one in unsupported(check_letter(other, support))] == ["27.00%", "2 percentage points", "25%"]


def test_articles_of_other_subjects_are_not_supported(support):
    assert kinds("CRR Art. 414", support) == [("article", "414", True)]  # liquidity
    assert kinds("CRD Art. 141", support) == [("article", "141", False)]  # distributions


def test_the_pieces_are_the_letter(support):
    letter = "On 31 March 2026 the LCR was 94.00% (CRR Art. 412(1)), so act within 44 days.\nEnd"
    pieces = list(marked(letter, check_letter(letter, support)))
    assert "".join(piece for piece, _ in pieces) == letter
    assert [piece for piece, one in pieces if one and not one.source] == ["94.00%", "within 44 days"]


def test_right_letters_are_supported_and_wrong_ones_are_not():
    """Of 16 generated letters nothing is unsupported; each changed figure, article, date and deadline is found."""
    changed = dict.fromkeys(("figure", "article", "date", "deadline"), 0)
    letters = swaps = caught = 0
    for index in range(8):
        filings = make_filings(5, index, 2, FULL)
        reports = [as_report(one.bank, one.period, one.figures, one.figures) for one in filings]
        for place, filing in enumerate(filings):
            bank = Addressee(filing.bank.entity, filing.bank.name, filing.bank.country, filing.bank.model)
            engine = examine(reports[place], reports[:place], ())
            letter = write_directive(engine.violated, bank, filing.period, engine.context, 0, bool(index % 2))
            known = support_for(reports[place], bank, engine, reports[:place], PROFILES["full"])
            assert unsupported(check_letter(letter, known)) == []
            letters += 1
            swaps += len(pairs := list(swapped_figures(letter, known)))
            caught += sum(bool(unsupported(check_letter(wrong, known))) for wrong in pairs)
            for kind, wrong in wrong_letters(letter).items():
                new = [one for one in check_letter(wrong, known) if one.kind == kind and one.text not in letter]
                changed[kind] += len(new)
                assert all(not one.source for one in new), new
    assert letters == 16 and all(count > 4 for count in changed.values()), changed
    assert swaps > 20 and caught >= 0.85 * swaps, (swaps, caught)


def swapped_figures(letter, known):
    """The letter with two neighbouring figures in each other's place."""
    figures = [one for one in check_letter(letter, known) if one.kind == "figure"]
    for one, two in itertools.pairwise(figures):
        if one.text != two.text:
            yield f"{letter[: one.start]}{two.text}{letter[one.end : two.start]}{one.text}{letter[two.end :]}"


def wrong_letters(letter):
    def change(function):
        return function(f"Violations:\nDirective:\n{letter}").partition("Directive:\n")[2]

    day = re.sub(r"\b(\d\d) (March|June|September|December)", lambda match: f"{int(match[1]) - 1} {match[2]}", letter)
    term = re.sub(r"within (two|three|five|seven|ten|fifteen|twenty) working", "within eleven working", letter)
    return {"figure": change(wrong_figures), "article": change(wrong_articles), "date": day, "deadline": term}
