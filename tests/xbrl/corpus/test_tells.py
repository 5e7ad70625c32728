"""Features of a report without its digits that give violations away: found where planted, absent from the corpus."""

import pytest

from tests.xbrl.corpus.tells import find_tells
from xbrl.corpus.corpus import make_filings
from xbrl.corpus.profiles import FULL
from xbrl.corpus.trial import as_report
from xbrl.read.dpm import BUILT_IN, load_cells
from xbrl.read.printed_cells import printed_cells
from xbrl.read.render import render_report

SURPLUS = ("C_03.00", "r0020", "c0010")


def example_of(text, violations=()):
    return {"messages": [{"role": "user", "content": text}], "violations": list(violations)}


def test_printed_cells_are_named_by_table_row_and_column():
    text = "Bank\nC 03.00 Ratios\nr0010 c0010 CET1 ratio | 4.31%\nC 28.00 Clients\nSYNC00\nc350 % of Tier 1 | 26.00%\nnote on C 03.00 r0010 c0010 | x"
    assert printed_cells(text) == {"C 03.00 r0010 c0010": "4.31%", "C 28.00 c350": "26.00%"}


@pytest.mark.parametrize(
    ("line", "violation", "tell"),
    [
        ("r0880 c0010 Item | 12 thousand", "LCR_MIN", "C 03.00 r0880 c0010 is reported"),
        ("r0010 c0010 Ratio | -12 thousand", "LCR_MIN", "C 03.00 r0010 c0010 is negative"),
        ("r0010 c0010 Ratio | 2.017 thousand", "LCR_MIN", "a figure like 9.9 thousand"),
        ("r0010 c0010 Ratio | -12 thousand", "CET1_MIN", None),  # the rule reads this cell
        ("r0010 c0010 Ratio | 2.017 thousand", "CET1_MIN", "a figure like 9.9 thousand"),
        ("r0010 c0010 Ratio | 12 thousand", "LCR_MIN", None),
    ],
)
def test_a_planted_tell_is_found_unless_it_is_the_violation(line, violation, tell):
    rest = "r0020 c0010 Surplus | -1 thousand\nr0700 c0010 Item | 7 thousand"
    clean = [example_of(f"C 03.00 Ratios\nr0010 c0010 Ratio | 12 thousand\n{rest}")] * 40
    table = f"C 03.00 Ratios\n{line}\n{rest}"
    tells = find_tells([*clean, *[example_of(table, [violation])] * 40])
    found = {feature for feature in tells if "is not reported" not in feature}
    assert (tell in found) if tell else not found


def test_the_corpus_has_no_tells():
    cells, examples = load_cells(BUILT_IN), []
    for index in range(45):
        for filing in make_filings(5, index, 4, FULL):
            report = as_report(filing.bank, filing.period, filing.figures, filing.figures)
            examples.append(example_of(render_report(report, cells), filing.violated))
            assert SURPLUS in filing.figures  # a surplus row is there in sound reports and in all others
    assert 40 < sum(not example["violations"] for example in examples) < 90
    assert find_tells(examples) == {}
