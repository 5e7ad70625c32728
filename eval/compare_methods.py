"""Several ways to train one task side by side: what each learned, against plain training, and what it forgot, against the base.

Figures come from the JSON of scripts/evaluate.py (the task) and of scripts/evaluate_forgetting.py (general language).
Intervals are 95%, paired by example, by text or by question.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from eval.bootstrap import Interval
from eval.paired import paired_change

FORGOTTEN_AT_MOST = 0.02  # of the base's perplexity on general text
LOST_AT_MOST = 0.01  # of plain training's F1


@dataclass(frozen=True)
class Method:
    """One trained model. task, general: the two results; learned: the change of each task figure from plain training."""

    name: str
    task: dict
    general: dict
    learned: dict[str, Interval]


def compare_methods(names: Sequence[str], tasks: Sequence[dict], generals: Sequence[dict]) -> list[Method]:
    """In the order given; the first is what the others are compared with (plain training)."""
    return [
        Method(name, task, general, paired_change(tasks[0], task))
        for name, task, general in zip(names, tasks, generals, strict=True)
    ]


def figures(method: Method) -> dict[str, Interval]:
    """What there is of `f1`, `rouge_l`, `loss`, `perplexity` (per byte), `kl`, `questions`, each with an interval.

    KL's is its own. The others' are those of the change, from plain training or from the base, put around the value.
    """
    perplexity, questions = method.general["perplexity_per_byte"], method.general["questions"]["all"]
    found = {
        name: _around(value, method.learned[name])
        for name, value in _task_values(method.task).items()
        if name in method.learned
    }
    found["perplexity"] = _around(perplexity["tuned"]["value"], Interval(**perplexity["change"]))
    if "kl" in method.general:
        found["kl"] = Interval(**method.general["kl"])
    return found | {"questions": _around(questions["tuned"]["value"], Interval(**questions["change"]))}


def verdict(method: Method) -> dict[str, str]:
    """`yes`, `no` or `undecided` (the interval holds both) for: `remembers` (perplexity a byte at most 2% above the base's),
    and `learns` (F1 at most 1 point below plain training's), where there is an F1."""
    of = method.general["perplexity_per_byte"]
    rise = Interval(*(of["change"][key] / of["base"]["value"] for key in ("value", "low", "high")))
    found = {"remembers": _decide(rise.low <= FORGOTTEN_AT_MOST, rise.high <= FORGOTTEN_AT_MOST)}
    if "f1" in method.learned:
        change = method.learned["f1"]
        found["learns"] = _decide(change.high >= -LOST_AT_MOST, change.low >= -LOST_AT_MOST)
    return found


COLUMNS = {  # heading, digits, factor
    "f1": ("F1", 3, 1),
    "rouge_l": ("ROUGE-L", 3, 1),
    "loss": ("answer loss, nats/token", 4, 1),
    "perplexity": ("general perplexity/byte", 3, 1),
    "kl": ("KL, nats/token", 3, 1),
    "questions": ("questions, %", 1, 100),
}


def markdown(methods: Sequence[Method], base: dict) -> str:
    """The table of docs/results.md: values, in brackets their changes with intervals, and the verdicts. base: its task result.

    F1, ROUGE-L and loss change from the first method, perplexity and questions from the base; KL stands with its interval.
    """
    rows = [["", *(heading for heading, _, _ in COLUMNS.values()), "learns", "remembers"]]
    rows.append(["---"] * len(rows[0]))
    general = methods[0].general
    values = _task_values(base) | {"perplexity": general["perplexity_per_byte"]["base"]["value"], "kl": 0.0}
    values["questions"] = general["questions"]["all"]["base"]["value"]
    rows.append(["base", *(_cell(name, values.get(name)) for name in COLUMNS), "", ""])
    for method in methods:
        general, found = method.general, figures(method)
        changes = {} if method is methods[0] else dict(method.learned)
        changes["perplexity"] = Interval(**general["perplexity_per_byte"]["change"])
        changes["questions"] = Interval(**general["questions"]["all"]["change"])
        cells = [
            _cell(name, found[name].value if name in found else None, changes.get(name), found.get(name))
            for name in COLUMNS
        ]
        said = verdict(method)
        rows.append([method.name, *cells, said.get("learns", ""), said["remembers"]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _task_values(task: dict) -> dict[str, float]:
    found = {"f1": task["violations"]["micro"]["f1"]} if "violations" in task else {}
    found |= {"rouge_l": task["rouge_l"]["f"]} if "rouge_l" in task else {}
    return found | {"loss": task["loss"]["mean"]}


def _cell(name: str, value: float | None, change: Interval | None = None, own: Interval | None = None) -> str:
    _, digits, factor = COLUMNS[name]
    if value is None:
        return ""
    text = f"{factor * value:.{digits}f}"
    if change:
        value, low, high = (f"{factor * x:+z.{digits}f}" for x in (change.value, change.low, change.high))
        text += f" ({value}; {low} to {high})"
    elif name == "kl" and own:
        text += f" ({own.low:.{digits}f} to {own.high:.{digits}f})"
    return text


def _around(value: float, change: Interval) -> Interval:
    return Interval(value, value + change.low - change.value, value + change.high - change.value)


def _decide(possible: bool, certain: bool) -> str:
    return "yes" if certain else "undecided" if possible else "no"
