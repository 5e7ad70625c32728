"""Training methods compared on one task: what each learned (vs. plain training) and what it forgot (vs. the base).

The metrics come from the JSON of scripts/evaluate.py (the task) and of `scripts/measure.py forgetting` (general
language). Intervals are 95% confidence intervals, paired by example, by text or by question.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from eval.bootstrap import Interval
from eval.intervals import paired_change

MAX_PERPLEXITY_RISE = 0.02  # relative to the base's perplexity on general text
MAX_F1_LOSS = 0.01  # absolute, relative to plain training


@dataclass(frozen=True)
class Method:
    """One trained model.

    task, general: the results of the two evaluations. task_change: the change of each task metric from plain training.
    """

    name: str
    task: dict
    general: dict
    task_change: dict[str, Interval]


def compare_methods(names: Sequence[str], tasks: Sequence[dict], generals: Sequence[dict]) -> list[Method]:
    """The methods in the given order. The first one is plain training, the reference of the others."""
    return [
        Method(name, task, general, paired_change(tasks[0], task))
        for name, task, general in zip(names, tasks, generals, strict=True)
    ]


def metrics_with_intervals(method: Method) -> dict[str, Interval]:
    """Those of `f1`, `rouge_l`, `loss`, `perplexity` (per byte), `kl` and `questions` that the method has.

    KL has an interval of its own. The interval of any other metric is that of its change (from plain training or from
    the base), shifted to the metric's value.
    """
    perplexity, questions = method.general["perplexity_per_byte"], method.general["questions"]["all"]
    metrics = {
        name: _shifted(method.task_change[name], value)
        for name, value in _task_metrics(method.task).items()
        if name in method.task_change
    }
    metrics["perplexity"] = _shifted(Interval(**perplexity["change"]), perplexity["tuned"]["value"])
    if "kl" in method.general:
        metrics["kl"] = Interval(**method.general["kl"])
    return metrics | {"questions": _shifted(Interval(**questions["change"]), questions["tuned"]["value"])}


def verdict(method: Method) -> dict[str, str]:
    """`yes`, `no`, or `undecided` if the limit lies inside the interval, for each of the two criteria.

    `remembers`: perplexity per byte on general text is at most 2% above the base's. `learns`: F1 is at most 1 point
    below that of plain training; absent if the task has no F1.
    """
    perplexity = method.general["perplexity_per_byte"]
    rise = Interval(*(perplexity["change"][key] / perplexity["base"]["value"] for key in ("value", "low", "high")))
    verdicts = {"remembers": _decide(rise.low <= MAX_PERPLEXITY_RISE, rise.high <= MAX_PERPLEXITY_RISE)}
    if "f1" in method.task_change:
        change = method.task_change["f1"]
        verdicts["learns"] = _decide(change.high >= -MAX_F1_LOSS, change.low >= -MAX_F1_LOSS)
    return verdicts


COLUMNS = {  # heading, digits, factor
    "f1": ("F1", 3, 1),
    "rouge_l": ("ROUGE-L", 3, 1),
    "loss": ("answer loss, nats/token", 4, 1),
    "perplexity": ("general perplexity/byte", 3, 1),
    "kl": ("KL, nats/token", 3, 1),
    "questions": ("questions, %", 1, 100),
}


def markdown(methods: Sequence[Method], base: dict) -> str:
    """The comparison as a Markdown table (docs/results.md): values, changes with their intervals, and verdicts.

    base: the base model's result on the task. The changes of F1, ROUGE-L and loss are relative to the first method,
    those of perplexity and questions to the base. KL has its own interval and no change.
    """
    rows = [["", *(heading for heading, _, _ in COLUMNS.values()), "learns", "remembers"]]
    rows.append(["---"] * len(rows[0]))
    general = methods[0].general
    values = _task_metrics(base) | {"perplexity": general["perplexity_per_byte"]["base"]["value"], "kl": 0.0}
    values["questions"] = general["questions"]["all"]["base"]["value"]
    rows.append(["base", *(_cell(name, values.get(name)) for name in COLUMNS), "", ""])
    for method in methods:
        general, metrics = method.general, metrics_with_intervals(method)
        changes = {} if method is methods[0] else dict(method.task_change)
        changes["perplexity"] = Interval(**general["perplexity_per_byte"]["change"])
        changes["questions"] = Interval(**general["questions"]["all"]["change"])
        cells = [
            _cell(name, metrics[name].value if name in metrics else None, changes.get(name), metrics.get(name))
            for name in COLUMNS
        ]
        verdicts = verdict(method)
        rows.append([method.name, *cells, verdicts.get("learns", ""), verdicts["remembers"]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _task_metrics(task: dict) -> dict[str, float]:
    metrics = {"f1": task["violations"]["micro"]["f1"]} if "violations" in task else {}
    metrics |= {"rouge_l": task["rouge_l"]["f"]} if "rouge_l" in task else {}
    return metrics | {"loss": task["loss"]["mean"]}


def _cell(name: str, value: float | None, change: Interval | None = None, own_interval: Interval | None = None) -> str:
    _, digits, factor = COLUMNS[name]
    if value is None:
        return ""
    text = f"{factor * value:.{digits}f}"
    if change:
        value, low, high = (f"{factor * x:+z.{digits}f}" for x in (change.value, change.low, change.high))
        text += f" ({value}; {low} to {high})"
    elif name == "kl" and own_interval:
        text += f" ({own_interval.low:.{digits}f} to {own_interval.high:.{digits}f})"
    return text


def _shifted(change: Interval, value: float) -> Interval:
    """The interval of a change, moved so that it belongs to `value`."""
    return Interval(value, value + change.low - change.value, value + change.high - change.value)


def _decide(possible: bool, certain: bool) -> str:
    return "yes" if certain else "undecided" if possible else "no"
