"""The examples on which the arms differ most, with the question, the reference and the answer of each arm."""

import textwrap
from collections.abc import Sequence

from eval.asked_examples import report_of
from eval.comparison.arms import Arm
from eval.comparison.measures import labels
from eval.rouge import mean

SHOWN = 400  # characters of a text in the terminal; the page has all of it


def worst_disagreements(arms: Sequence[Arm], examples: Sequence[dict], number: int = 10) -> list[dict]:
    """The `number` examples with the largest difference between arms, largest first; none on which all answer the same.

    The score of an example is the user's first one, if it has values of single examples, then the share of right rules (Dice:
    2 right / (true + predicted), 1 if both are empty), then that of right facts, then ROUGE-L, each the mean over the seeds of
    an arm. The answer shown is that of the arm's first seed. `examples` are the asked ones, in the order of the answers.
    """
    differences = [_differences(arms, i) for i in range(len(examples))]
    order = sorted(range(len(examples)), key=lambda i: tuple(-value for value in differences[i]))
    return [_shown(arms, examples[i], i) for i in order[:number] if any(value > 1e-9 for value in differences[i])]


def _differences(arms: Sequence[Arm], i: int) -> tuple[float, ...]:
    """By how much the arms differ in each score of the i-th example, and at last whether their answers do."""
    scores = [
        [mean(values) for values in zip(*(_score(seed.task, i) for seed in arm.seeds), strict=True)] for arm in arms
    ]
    texts = {arm.seeds[0].task["answers"][i]["answer"] for arm in arms}
    return *(max(column) - min(column) for column in zip(*scores, strict=True)), float(len(texts) > 1)


def _score(task: dict, i: int) -> tuple[float, ...]:
    answer = task["answers"][i]
    own = next((values[i] for values in (task.get("metric") or {}).get("each", {}).values()), 0.0)
    if "true" not in answer:
        return own, 0.0, 0.0, answer["rouge_l"]
    true, said = labels(answer)
    right, of_true, claimed = answer.get("facts", (0, 0, 0))
    rules, facts = _dice(len(true & said), len(true), len(said)), _dice(right, of_true, claimed)
    return own, rules, facts, answer.get("rouge_l", 0.0)


def beside(one: dict) -> str:
    """A disagreement for the terminal: the reference and the answers, each from its beginning."""
    texts = {"reference": one["reference"], **{name: answer["text"] for name, answer in one["answers"].items()}}
    shown = {name: text[:SHOWN] + " ..." * (len(text) > SHOWN) for name, text in texts.items()}
    lines = [f"{name}:\n{textwrap.indent(text, '    ')}" for name, text in shown.items()]
    return "\n".join([f"example {one['id']}:", *lines])


def _dice(right: int, true: int, said: int) -> float:
    return 2 * right / (true + said) if true + said else 1.0


def _shown(arms: Sequence[Arm], example: dict, i: int) -> dict:
    first = arms[0].seeds[0].task["answers"][i]
    name = example.get("id") if example.get("id") is not None else i + 1
    shown = {
        "id": str(name),
        "cluster": first.get("cluster"),
        "true": first.get("true"),
        "report": report_of(example),
        "reference": example["messages"][-1]["content"],
        "answers": {},
    }
    for arm in arms:
        answer = arm.seeds[0].task["answers"][i]
        shown["answers"][arm.name] = {
            "text": answer["answer"],
            "rouge_l": answer.get("rouge_l"),
            "seeds": len(arm.seeds),
            "judgement": _judgement(answer),
        }
    return shown


def _judgement(answer: dict) -> str:
    """What is wrong with the rules and facts of an answer, in words."""
    if "true" not in answer:
        return ""
    true, said = labels(answer)
    parts = [
        f"{word} {', '.join(sorted(rules))}"
        for word, rules in (("missed", true - said), ("invented", said - true))
        if rules
    ]
    right, of_true, claimed = answer.get("facts", (0, 0, 0))
    if not parts and not right == of_true == claimed:
        parts = [f"rules right, facts of {of_true - right} of {of_true} findings wrong"] if of_true else ["facts wrong"]
    return "; ".join(parts) or "right"
