"""What the measures say of answers that are wrong, or right, in a known way."""

import pytest

from xbrl.answers.audit import (
    MEASURES,
    audit,
    audit_table,
    in_markdown,
    other_words,
    wrong_articles,
    wrong_cells,
    wrong_figures,
)

REPORT = "Nordbank | reference date 2026-03-31\nC 76.00.a Liquidity\nr0030 c0010 LCR | 93.10%\nr0010 c0010 Buffer | 1340 thousand"
LINE = "LCR_MIN | C 76.00.a r0030 c0010 | 93.10% | min 100% | CRR Art. 412(1)"
LETTER = (
    "To the Board of Nordbank\nReport of 31 March 2026\nUnder Article 414 CRR we direct: the LCR of 93.1% "
    "(C 76.00.a r0030 c0010) misses the minimum of 100% (CRR Art. 412(1)) by 6.9 percentage points.\n"
    "- Submit within five working days a plan to restore the liquidity buffer."
)
OTHER = (
    "Addressee: the Board of Nordbank\nYour LCR stood at 93.1% on 31 March 2026, 6.9 percentage points short of the 100% that "
    "CRR Art. 412(1) demands (Article 414 CRR).\n- The liquidity plan is due within five working days."
)
ANSWER = f"Violations:\n{LINE}\nDirective:\n{LETTER}"


def example(name, answer, violations, **fields):
    messages = [{"role": "user", "content": REPORT}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": messages, "violations": violations, **fields}


BREACH = example(
    *("a", ANSWER, ["LCR_MIN"]), references=[LETTER, OTHER], measures=[{"subject": "liquidity", "deadline_days": 5}]
)
CLEAN = example("b", "Violations:\nnone\nDirective:\nNo measures.", [], references=["No measures."], measures=[])


@pytest.fixture(scope="module")
def values():
    return audit([BREACH, CLEAN])


def test_only_what_is_wrong_is_marked(values):
    right = dict.fromkeys(MEASURES, 1.0)
    assert values["right"] == pytest.approx(right) and values["right, in Markdown"] == pytest.approx(right)
    wrong = {name: one for name, one in values.items() if name.startswith(("wrong", "everything"))}
    assert len(wrong) == 4
    for one in wrong.values():  # the rules are right, and ROUGE-L hardly sees the difference
        assert one["F1"] == one["exact"] == one["measures"] == 1
        assert one["facts F1"] == 0
        assert one["ROUGE-L"] > 0.85
    assert wrong["wrong cells"]["letter support"] == 1
    assert max(wrong[name]["letter support"] for name in wrong if name != "wrong cells") < 0.9


def test_facts_in_other_words_are_right_and_only_rouge_falls(values):
    other = values["right, other words"]
    assert {name: other[name] for name in MEASURES[:5]} == dict.fromkeys(MEASURES[:5], 1.0)
    assert (
        other["ROUGE-L"] == 0.5
    )  # 1 for the breach, whose other reference it is; 0 for the clean report, which has one
    alone = {key: value for key, value in BREACH.items() if key not in ("references", "measures")}
    single = audit([alone])["right, other words"]
    assert single["facts F1"] == single["letter support"] == 1 and single["ROUGE-L"] < 0.4
    assert single["measures"] is None


def test_garbage_and_silence_cost(values):
    assert values["none for every report"] == {
        **{"F1": 0, "exact": 0.5, "facts F1": 0, "letter support": None, "measures": 0},
        "ROUGE-L": pytest.approx(values["none for every report"]["ROUGE-L"]),
    }
    assert values["garbage for every report"]["exact"] == values["garbage for every report"]["ROUGE-L"] == 0
    partly = values["right, garbage on clean reports"]  # a false positive beside the one violation
    assert partly["F1"] == partly["facts F1"] == pytest.approx(2 / 3) and partly["exact"] == 0.5


def test_the_wrong_answers_are_wrong_as_they_say():
    assert wrong_figures(ANSWER).splitlines()[1] == LINE.replace("93.10%", "793.10%").replace("100%", "7100%")
    assert "31 March 2026" in wrong_figures(ANSWER) and "r0030 c0010" in wrong_figures(ANSWER)
    assert wrong_cells(ANSWER).splitlines()[1] == LINE.replace("c0010", "c0010 other")
    assert "r9030" in wrong_cells(ANSWER).splitlines()[5]
    assert wrong_articles(ANSWER).splitlines()[1].endswith("CRR Art. 999(1)") and "Article 999 CRR" in wrong_articles(
        ANSWER
    )
    assert other_words(ANSWER, [LETTER]).splitlines()[1] == LINE
    assert in_markdown(ANSWER).splitlines()[2:4] == ["**Violations:**", f"1. {LINE}"]
    checks = "Checks:\nLCR 93% < 100%: LCR_MIN, CRR Art. 412(1)\nNSFR 110% >= 100%: met\nDirective:\nx"
    assert wrong_cells(checks).splitlines()[1].startswith("Other LCR 93%")
    assert "LCR 93% < 100%: CRR Art. 412(1); NSFR 110% >= 100%: met." in other_words(checks, ["x"])


def test_the_table_has_a_row_per_answer(values):
    lines = audit_table(values).splitlines()
    assert len(lines) == 2 + len(values) == 12
    assert lines[2] == "| right | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 |"
    assert "| none for every report | 0.000 | 0.500 | 0.000 |  | 0.000 |" in lines[9]
