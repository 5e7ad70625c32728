"""Scores by the kind of note, and of minimal pairs."""

import pytest

from xbrl.answers.groups import pairs_right, score_kinds

EXAMPLES = [
    {"kind": "pledged", "engine": [], "pair": "1"},
    {"kind": "pledged", "engine": [], "pair": "1"},
    {"kind": "waiver", "engine": ["LCR_MIN"], "pair": "2"},
    {"kind": "waiver", "engine": ["LCR_MIN", "LR_MIN"], "pair": "2"},
    {"kind": "", "engine": [], "pair": "3"},  # of the third pair only one report is evaluated
]
TRUE = [("LCR_PLEDGED",), (), (), ("LCR_MIN", "LR_MIN"), ()]
SAID = [("LCR_PLEDGED",), (), ("LCR_MIN",), ("LCR_MIN", "LR_MIN"), ()]


def test_scores_by_kind_of_note():
    kinds = score_kinds(EXAMPLES, TRUE, SAID)
    assert list(kinds) == ["pledged", "waiver", "note alone", "with a note"]
    assert (kinds["pledged"]["f1"], kinds["pledged"]["exact"], kinds["pledged"]["n_reports"]) == (1, 1, 2)
    assert kinds["waiver"]["f1"] == pytest.approx(4 / 5) and kinds["waiver"]["exact"] == 0.5
    assert (kinds["waiver"]["precision"], kinds["waiver"]["recall"]) == (pytest.approx(2 / 3), 1)
    assert kinds["waiver"]["note_f1"] == pytest.approx(2 / 3)  # of LCR_MIN alone, which the waiver decides
    assert kinds["note alone"]["n_reports"] == 2 and kinds["with a note"]["n_reports"] == 4
    assert kinds["with a note"]["note_f1"] == pytest.approx(4 / 5)
    assert score_kinds([{}], [()], [()]) == {}
    # Without the field `engine` it is not known what the engine finds.
    assert list(score_kinds([{"kind": "waiver"}], [()], [()])) == ["waiver", "with a note"]


def test_a_pair_is_right_if_both_of_its_reports_are():
    assert pairs_right(EXAMPLES, TRUE, SAID) == [True, False]
    assert pairs_right(EXAMPLES, TRUE, TRUE) == [True, True]
