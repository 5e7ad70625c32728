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
    """Return the `number` examples with the largest difference between arms, largest first. Equal answers are no difference.

    Examples are sorted by the difference in the first score (`ordered`), then in the next score, and finally by whether the
    texts differ. The score of an arm is averaged over its seeds; it is 1 if nothing is true and nothing predicted. The answer
    shown is by the arm's first seed. `examples` are the asked ones, in the order of the answers.
    """
    terms_by_arm = [[terms_of(seed.task) for seed in arm.seeds] for arm in arms]
    shared = set.intersection(*(set(terms) for seeds in terms_by_arm for terms in seeds)) - {"loss"}
    spreads = []
    for name in ordered(name for name in terms_by_arm[0][0] if name in shared):
        if len(terms_by_arm[0][0][name].rows) == len(examples):
            rows = [averaged([terms[name] for terms in seeds]).rows.T for seeds in terms_by_arm]
            scores = [np.divide(part, whole, out=np.ones_like(part), where=whole > 0) for part, whole in rows]
            spreads.append(np.ptp(scores, axis=0))
    texts = zip(*([answer["answer"] for answer in arm.seeds[0].task["answers"]] for arm in arms), strict=True)
    differences = np.array([*spreads, [len({*texts_of_example}) > 1 for texts_of_example in texts]]).T
    order = sorted(range(len(examples)), key=lambda i: tuple(-differences[i]))
    return [_shown(arms, examples[i], i) for i in order[:number] if differences[i].max() > 1e-9]


def beside(disagreement: dict) -> str:
    """Format a disagreement for the terminal: the first `SHOWN` characters of the reference and of each answer."""
    answers = {name: answer["text"] for name, answer in disagreement["answers"].items()}
    lines = [f"example {disagreement['id']}:"]
    for name, text in {"reference": disagreement["reference"], **answers}.items():
        shown = text[:SHOWN] + " ..." * (len(text) > SHOWN)
        lines.append(f"{name}:\n{textwrap.indent(shown, '    ')}")
    return "\n".join(lines)


def _shown(arms: Sequence[Arm], example: dict, i: int) -> dict:
    answers = {arm.name: arm.seeds[0].task["answers"][i] for arm in arms}
    return {
        "id": str(i + 1 if example.get("id") is None else example["id"]),
        "true": answers[arms[0].name].get("true"),
        "question": report_of(example),
        "reference": example["messages"][-1]["content"],
        "answers": {
            name: {"text": answer["answer"], "judgement": _judgement(answer)} for name, answer in answers.items()
        },
    }


def _judgement(answer: dict) -> str:
    """Return the errors in an answer's labels and facts, in words; "right" if there are none; "" for an answer without labels."""
    if "true" not in answer:
        return ""
    true, predicted = labels(answer)
    wrong = {"missed": true - predicted, "invented": predicted - true}
    parts = [f"{word} {', '.join(sorted(names))}" for word, names in wrong.items() if names]
    right, num_true, claimed = answer.get("facts", (0, 0, 0))
    if not parts and not right == num_true == claimed:
        parts = [f"labels right, facts of {num_true - right} of {num_true} wrong"] if num_true else ["facts wrong"]
    return "; ".join(parts) or "right"
