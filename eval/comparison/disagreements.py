"""The reports on which the arms differ most, with the report, the reference and the answer of each arm."""

from collections.abc import Sequence

from eval.asked_examples import report_of
from eval.comparison.arms import Arm
from eval.comparison.measures import labels
from eval.rouge import mean


def worst_disagreements(arms: Sequence[Arm], examples: Sequence[dict], number: int = 10) -> list[dict]:
    """The `number` reports with the largest difference between arms, largest first; none on which all arms are alike.

    A report's score is the share of right rules (Dice: 2 right / (true + predicted), 1 if both are empty), then that of
    right facts, then ROUGE-L, each the mean over the seeds of an arm. The answer shown is that of the arm's first seed.
    `examples` are the asked ones, in the order of the answers.
    """
    scores = [[_scores(arm, i) for arm in arms] for i in range(len(examples))]
    differences = [tuple(max(column) - min(column) for column in zip(*of_arms, strict=True)) for of_arms in scores]
    order = sorted(range(len(examples)), key=lambda i: tuple(-value for value in differences[i]))
    return [_shown(arms, examples[i], i) for i in order[:number] if any(value > 1e-9 for value in differences[i])]


def _scores(arm: Arm, i: int) -> tuple[float, ...]:
    return tuple(mean(values) for values in zip(*(_score(seed.task["answers"][i]) for seed in arm.seeds), strict=True))


def _score(answer: dict) -> tuple[float, float, float]:
    if "true" not in answer:
        return 0.0, 0.0, answer["rouge_l"]
    true, said = labels(answer)
    right, of_true, claimed = answer.get("facts", (0, 0, 0))
    return _dice(len(true & said), len(true), len(said)), _dice(right, of_true, claimed), answer.get("rouge_l", 0.0)


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
