"""The examples on which the arms differ most, with the question, the reference and the answer of each arm."""

import textwrap
from collections.abc import Sequence

import numpy as np

from eval.asked_examples import report_of
from eval.comparison.arms import Arm
from eval.comparison.measures import averaged, ordered
from eval.intervals import labels, terms_of

SHOWN = 400  # characters of a text in the terminal; the page has all of it


def worst_disagreements(arms: Sequence[Arm], examples: Sequence[dict], number: int = 10) -> list[dict]:
    """The `number` examples with the largest difference between arms, largest first; none on which all answer the same.

    They differ in the first of their scores (`ordered`), where that is alike in the next, and at last in their texts. A score
    is that of all seeds of an arm; where nothing is true and nothing is said, it is 1. The answer shown is that of the
    arm's first seed. `examples` are the asked ones, in the order of the answers.
    """
    of_arms = [[terms_of(seed.task) for seed in arm.seeds] for arm in arms]
    known = set.intersection(*(set(terms) for seeds in of_arms for terms in seeds)) - {"loss"}
    spreads = []
    for name in ordered(name for name in of_arms[0][0] if name in known):
        if len(of_arms[0][0][name].rows) == len(examples):
            rows = [averaged([terms[name] for terms in seeds]).rows.T for seeds in of_arms]
            scores = [np.divide(part, whole, out=np.ones_like(part), where=whole > 0) for part, whole in rows]
            spreads.append(np.ptp(scores, axis=0))
    texts = zip(*([answer["answer"] for answer in arm.seeds[0].task["answers"]] for arm in arms), strict=True)
    differences = np.array([*spreads, [len({*of_example}) > 1 for of_example in texts]]).T
    order = sorted(range(len(examples)), key=lambda i: tuple(-differences[i]))
    return [_shown(arms, examples[i], i) for i in order[:number] if differences[i].max() > 1e-9]


def beside(one: dict) -> str:
    """A disagreement for the terminal: the reference and the answers, each from its beginning."""
    texts = {"reference": one["reference"], **{name: answer["text"] for name, answer in one["answers"].items()}}
    shown = {name: text[:SHOWN] + " ..." * (len(text) > SHOWN) for name, text in texts.items()}
    lines = [f"{name}:\n{textwrap.indent(text, '    ')}" for name, text in shown.items()]
    return "\n".join([f"example {one['id']}:", *lines])


def _shown(arms: Sequence[Arm], example: dict, i: int) -> dict:
    answers = {arm.name: arm.seeds[0].task["answers"][i] for arm in arms}
    return {
        "id": str(i + 1 if example.get("id") is None else example["id"]),
        "true": answers[arms[0].name].get("true"),
        "report": report_of(example),
        "reference": example["messages"][-1]["content"],
        "answers": {name: {"text": one["answer"], "judgement": _judgement(one)} for name, one in answers.items()},
    }


def _judgement(answer: dict) -> str:
    """What is wrong with the rules and facts of an answer, in words."""
    if "true" not in answer:
        return ""
    true, said = labels(answer)
    wrong = {"missed": true - said, "invented": said - true}
    parts = [f"{word} {', '.join(sorted(rules))}" for word, rules in wrong.items() if rules]
    right, of_true, claimed = answer.get("facts", (0, 0, 0))
    if not parts and not right == of_true == claimed:
        parts = [f"rules right, facts of {of_true - right} of {of_true} findings wrong"] if of_true else ["facts wrong"]
    return "; ".join(parts) or "right"
