"""Each measure notices its own kind of mistake. Otherwise it would reward a model for wrong answers."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from xbrl.answers.answer_reader import read_fact
from xbrl.answers.answers import write_fact
from xbrl.answers.scores import score_answers
from xbrl.rules.note_facts import NoteFact

REPORT = (
    "Nordbank | reference date 2026-03-31\nC 76.00.a Liquidity\nr0030 c0010 LCR | 93.10%\nr0010 c0010 Buffer | 1340 thousand"
    "\nnote on C 76.00.a r0030 c0010 | The waiver of the LCR has ended in May."
)
FACT = '"has ended in May" | waiver | does not apply | - | - | -'
LINE = "LCR_MIN | C 76.00.a r0030 c0010 | 93.10% | min 100% | CRR Art. 412(1)"
LETTER = (
    "To the Board of Nordbank\nReport of 31 March 2026\nUnder Article 414 CRR we direct: the LCR of 93.1% "
    "(C 76.00.a r0030 c0010) misses the minimum of 100% (CRR Art. 412(1)) by 6.9 percentage points.\n"
    "- Submit within five working days a plan to restore the liquidity buffer."
)
ANSWER = f"Note:\n{FACT}\nViolations:\n{LINE}\nDirective:\n{LETTER}"
NONE = "Note:\nnone\nViolations:\nnone\nDirective:\nNo measures."
GARBAGE = "The report of the bank is a report of the bank."
FIGURES = ("93.10%", "93.1%", "min 100%", "of 100%", "6.9 ")


def example(name: str, answer: str, violations: list[str], **fields) -> dict:
    messages = [{"role": "user", "content": REPORT}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": messages, "violations": violations, **fields}


TRUE = {"kind": "waiver", "applies": False, "amount": None, "who": [], "since": "", "quote": "has ended in May"}
BREACH = example("a", ANSWER, ["LCR_MIN"], note_facts=[TRUE])
CLEAN = example("b", NONE, [], note_facts=[])


def wrong_figures(answer: str) -> str:
    for figure in FIGURES:
        answer = answer.replace(figure, re.sub(r"\d", r"7\g<0>", figure, count=1))
    return answer


def wrong_cells(answer: str) -> str:
    return answer.replace("r0030", "r9030")


def wrong_articles(answer: str) -> str:
    return re.sub(r"(Art\. |Article )\d+", r"\g<1>999", answer)


def with_facts(answer: str, change: Callable[[NoteFact], NoteFact]) -> str:
    facts = [(line, read_fact(line)) for line in answer.split("\n")]
    return "\n".join(write_fact(change(fact)) if fact else line for line, fact in facts)


def invented_rule(answer: str) -> str:
    line = "INVENTED_RULE | C 01.00 r0010 c0010 | 1% | min 2% | CRR Art. 1"
    return answer.replace("Violations:\nnone", "Violations:").replace("\nDirective:", f"\n{line}\nDirective:")


CHANGES: dict[str, Callable[[str], str]] = {
    "right": lambda own: own,
    "in Markdown": lambda own: f"Here is my answer.\n\n{own}".replace("Violations:", "**Violations:**").replace(
        "LCR_MIN |", "1. LCR_MIN |"
    ),
    "wrong figures": wrong_figures,
    "wrong cells": wrong_cells,
    "wrong articles": wrong_articles,
    "wrong facts": lambda own: wrong_articles(wrong_cells(wrong_figures(own))),
    "notes reversed": lambda own: with_facts(own, lambda fact: replace(fact, applies=not fact.applies)),
    "notes without proof": lambda own: with_facts(
        own, lambda fact: replace(fact, quote="this stands in no note at all")
    ),
    "an invented rule": invented_rule,
    "other words": lambda own: re.sub(
        r"(Violations:\n(.*)\nDirective:)\n(?s:.*)", r"\1\nYour filing shows \2. Put it right.", own
    ),
    "none for every report": lambda own: "Violations:\nnone\nDirective:\nNo measures.",
    "garbage for every report": lambda own: GARBAGE,
    "garbage on clean reports": lambda own: own if own == ANSWER else GARBAGE,
}


def measures(change: Callable[[str], str]) -> dict[str, float | None]:
    """Return the value of each measure for the own answers of BREACH and CLEAN after `change`."""
    result = score_answers([change(ANSWER), change(NONE)], [BREACH, CLEAN], "the examples", None)
    return {
        "F1": result["violations"]["micro"]["f1"],
        "macro F1": result["violations"]["macro_f1"],
        "exact": result["violations"]["exact"],
        "notes F1": result["notes"]["f1"],
        "facts F1": result["facts"]["f1"],
        "ROUGE-L": result["rouge_l"]["f"],
    }


@pytest.fixture(scope="module")
def values() -> dict[str, dict]:
    return {name: measures(change) for name, change in CHANGES.items()}


def lowered(values: dict) -> dict[str, float]:
    """Return the measures that are not 1."""
    return {name: value for name, value in values.items() if value != pytest.approx(1)}


def test_only_wrong_parts_lower_their_measure(values):
    assert lowered(values["right"]) == lowered(values["in Markdown"]) == {}
    for name in ("wrong figures", "wrong cells", "wrong articles", "wrong facts"):
        one = values[name]  # the rules are right, and ROUGE-L hardly notices the difference
        assert one["F1"] == one["macro F1"] == one["exact"] == 1
        assert one["facts F1"] == 0 and one["ROUGE-L"] > 0.85
    assert lowered(values["notes reversed"]) == lowered(values["notes without proof"]) == {"notes F1": 0}


def test_an_invented_rule_lowers_both_means(values):
    one = values["an invented rule"]
    assert (one["F1"], one["macro F1"], one["exact"]) == (pytest.approx(2 / 4), 0.5, 0)  # 1 right, 3 named, 1 true


def test_right_facts_in_other_words_keep_their_scores(values):
    assert set(lowered(values["other words"])) == {"ROUGE-L"} and values["other words"]["ROUGE-L"] < 0.4


def test_garbage_and_silence_lower_the_scores(values):
    silent = {"F1": 0, "macro F1": 0, "exact": 0.5, "notes F1": 0, "facts F1": 0}
    assert silent.items() <= values["none for every report"].items()
    assert values["garbage for every report"]["exact"] == values["garbage for every report"]["ROUGE-L"] == 0
    partly = values["garbage on clean reports"]  # a false positive beside the one violation
    assert partly["F1"] == partly["facts F1"] == pytest.approx(2 / 3) and partly["exact"] == 0.5
