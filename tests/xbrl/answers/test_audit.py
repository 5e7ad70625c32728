"""What the measures say of answers that are wrong, or right, in a known way."""

import pytest

from common.durable_files import write_json_lines
from eval.asked_examples import choose_examples
from tests.processes import run_python
from xbrl.answers.audit import CHANGES, audit, audit_table

REPORT = (
    "Nordbank | reference date 2026-03-31\nC 76.00.a Liquidity\nr0030 c0010 LCR | 93.10%\nr0010 c0010 Buffer | 1340 thousand"
    "\nnote on C 76.00.a r0030 c0010 | The waiver of the LCR has ended in May."
)
FACT = 'waiver | does not apply | - | - | - | "has ended in May"'
LINE = "LCR_MIN | C 76.00.a r0030 c0010 | 93.10% | min 100% | CRR Art. 412(1)"
LETTER = (
    "To the Board of Nordbank\nReport of 31 March 2026\nUnder Article 414 CRR we direct: the LCR of 93.1% "
    "(C 76.00.a r0030 c0010) misses the minimum of 100% (CRR Art. 412(1)) by 6.9 percentage points.\n"
    "- Submit within five working days a plan to restore the liquidity buffer."
)
ANSWER = f"Note:\n{FACT}\nViolations:\n{LINE}\nDirective:\n{LETTER}"


def example(name, answer, violations, **fields):
    messages = [{"role": "user", "content": REPORT}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": messages, "violations": violations, **fields}


TRUE = {"kind": "waiver", "applies": False, "amount": None, "who": [], "since": "", "quote": "has ended in May"}
MEASURE = {"subject": "liquidity", "deadline_days": 5}
BREACH = example("a", ANSWER, ["LCR_MIN"], note_facts=[TRUE], measures=[MEASURE])
CLEAN = example("b", "Note:\nnone\nViolations:\nnone\nDirective:\nNo measures.", [], note_facts=[], measures=[])


@pytest.fixture(scope="module")
def values():
    return audit([BREACH, CLEAN])


def changed(one) -> dict[str, float]:
    """The measures that are not 1."""
    return {name: value for name, value in one.items() if value != pytest.approx(1)}


def test_only_what_is_wrong_is_marked(values):
    assert changed(values["right"]) == changed(values["right, in Markdown"]) == {}
    wrong = {name: one for name, one in values.items() if name.startswith(("wrong", "everything"))}
    assert len(wrong) == 4
    for one in wrong.values():  # the rules are right, and ROUGE-L hardly sees the difference
        assert one["F1"] == one["macro F1"] == one["exact"] == one["measures"] == 1
        assert one["facts F1"] == 0
        assert one["ROUGE-L"] > 0.85
    assert wrong["wrong cells"]["letter support"] == 1
    assert max(wrong[name]["letter support"] for name in wrong if name != "wrong cells") < 0.9
    assert changed(values["notes turned round"]) == changed(values["notes without proof"]) == {"notes F1": 0}


def test_what_takes_measures_back_costs_measures(values):
    for name in ("measures negated", "measures deferred", "measures recommended"):
        assert {**values[name], "ROUGE-L": 1} == {**values["right"], "measures": 0} and values[name]["ROUGE-L"] > 0.5


def test_an_invented_rule_costs_both_means(values):
    one = values["an invented rule"]
    assert (one["F1"], one["macro F1"], one["exact"]) == (pytest.approx(2 / 4), 0.5, 0)  # 1 right, 3 named, 1 true


def test_facts_in_other_words_are_right_and_only_rouge_and_measures_fall(values):
    other = values["right, other words"]
    assert set(changed(other)) == {"measures", "ROUGE-L"} and other["letter support"] == 1 and other["ROUGE-L"] < 0.4
    alone = {key: value for key, value in BREACH.items() if key not in ("measures", "note_facts")}
    assert audit([alone])["right"]["measures"] is None and audit([alone])["right"]["notes F1"] is None


def test_garbage_and_silence_cost(values):
    silent = {"F1": 0, "macro F1": 0, "exact": 0.5, "notes F1": 0, "facts F1": 0, "letter support": None, "measures": 0}
    assert silent.items() <= values["none for every report"].items()
    assert values["garbage for every report"]["exact"] == values["garbage for every report"]["ROUGE-L"] == 0
    partly = values["right, garbage on clean reports"]  # a false positive beside the one violation
    assert partly["F1"] == partly["facts F1"] == pytest.approx(2 / 3) and partly["exact"] == 0.5


def test_answers_made_of_checks_are_changed_likewise():
    checks = "Checks:\nLCR 93% < 100%: LCR_MIN, CRR Art. 412(1)\nNSFR 110% >= 100%: met\nDirective:\nx"
    assert CHANGES["wrong cells"](checks).splitlines()[1].startswith("Other LCR 93%")
    assert CHANGES["an invented rule"](checks).splitlines()[3] == "An oddity 1% min 2%: INVENTED_RULE, CRR Art. 1"
    assert "LCR 93% < 100%: CRR Art. 412(1); NSFR 110% >= 100%: met." in CHANGES["right, other words"](checks)


def test_the_table_has_a_row_per_answer(values):
    lines = audit_table(values).splitlines()
    assert len(lines) == 2 + len(values) == 18
    assert lines[2] == "| right | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 |"
    assert "| none for every report | 0.000 | 0.000 | 0.500 | 0.000 | 0.000 |  | 0.000 |" in lines[15]


def test_a_limit_chooses_what_it_chooses_for_an_evaluation(tmp_path) -> None:
    rows = [BREACH, BREACH]
    rows[choose_examples([0, 1], 1)[0]] = BREACH | {"messages": BREACH["messages"][:1]}  # asked, and not answered
    write_json_lines(tmp_path / "test.jsonl", rows)
    done = [
        run_python("scripts/score.py", "--data", tmp_path / "test.jsonl", "--audit", *more)
        for more in ((), ("--limit", 1))
    ]
    assert [one.returncode for one in done] == [0, 2] and "the audit needs examples of bank reports" in done[1].stderr
