"""Readable tables of evaluation results: one model, or the same data before and after training.

These functions work for any task. The tables of the regulator's task have further rows: `xbrl/answers/tables.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.errors import UserError
from eval.intervals import intervals, paired_change


@dataclass(frozen=True)
class Figure:
    """One row of a table.

    `metric` is the key of this figure in the result of `eval.intervals`; empty if it has no confidence interval.
    """

    name: str
    value: str
    n: str
    metric: str = ""


Figures = Callable[[dict], list[Figure]]


def figures(result: dict) -> list[Figure]:
    """All figures of a result of scripts/evaluate.py that do not depend on the task."""
    return [*text_figures(result), *run_figures(result)]


def text_figures(result: dict) -> list[Figure]:
    """The scores of --metric, exact match and ROUGE-L, as far as the result has them."""
    metric, match, rouge = result.get("metric"), result.get("exact_match"), result.get("rouge_l")
    rows = []
    if metric:
        by = f"by {metric['by']}"
        rows += [Figure(name, f"{value:.4g}", by, f"own/{name}") for name, value in metric["scores"].items()]
    if match:
        rows.append(Figure("exact match", percent(match["share"]), f"{match['n']} answers", "exact_match"))
    if rouge:
        n = f"{rouge['n']} {rouge['of']}s, words of a-z and 0-9"  # it is 0 for an answer in another script
        rows.append(Figure(f"{rouge['of']} ROUGE-L (F)", f"{rouge['f']:.3f}", n, "rouge_l"))
    return rows


def run_figures(result: dict) -> list[Figure]:
    """Truncated answers and validation loss, as far as the result has them."""
    rows = []
    loss = result.get("loss")
    if "shots" in result:  # "before" may be asked in another way than "after"
        value = f"{result['shots']} shots"
        short = result["fewest_shots"] < result["shots"]
        rows.append(
            Figure("asked with", value, f"at least {result['fewest_shots']} where the context is short" * short)
        )
    if "cut_short" in result and result.get("answers"):
        limit = f"at {result['max_new_tokens']} tokens ({result.get('max_new_tokens_from', 'as given')})"
        rows.append(Figure("answers cut short", str(result["cut_short"]), limit))
    if loss:
        n = f"{loss['targets']:,} response tokens"
        rows.append(Figure("validation loss (nats/token)", _number(loss["mean"]), n, "loss"))
    return rows


def table(result: dict, figures: Figures = figures) -> str:
    """A result as text: each figure with its 95% interval, if it has one, and its N."""
    chosen, everything = result["n_examples"], result.get("n_in_file")  # results of earlier versions lack the second
    part = f"{chosen} of {everything} examples" if chosen != (everything or chosen) else ""
    how = ", ".join([*filter(None, [part, result.get("dtype")]), f"{result['seconds']:.0f} s"])
    known = intervals(result)
    rows = [("", "", "95% interval", "N")]
    for row in figures(result):
        bounds = known.get(row.metric)
        rows.append((row.name, row.value, f"{bounds.low:.3f} to {bounds.high:.3f}" if bounds else "", row.n))
    return "\n".join([f"{result['model']} on {result['data']} ({how})", "", *aligned(rows)])


def check_comparable(before: dict, after: dict) -> None:
    """Raise `UserError` unless both results are of the same examples."""
    for key in ("data_sha256", "n_examples"):
        if before.get(key) != after.get(key):
            raise UserError(
                f"the evaluations of {before['model']} and {after['model']} used different data ({key} differs): "
                f"evaluate both with the same --data and --limit."
            )


def compare(before: dict, after: dict, figures: Figures = figures) -> str:
    """Two results on the same data as a table: before, after, change, 95% confidence interval of the change, N.

    Only figures that are known for each example have a change, and with two banks or examples an interval. Raises
    `UserError` if the results are not comparable.
    """
    check_comparable(before, after)
    if (before.get("metric") or {}).get("by") != (after.get("metric") or {}).get("by"):
        before = before | {"metric": None}  # another function may give a score of the same name
    values_before = {row.name: row.value for row in figures(before)}
    changes = paired_change(before, after)
    rows: list[tuple[str, ...]] = [("", "before", "after", "change", "95% interval", "N")]
    for row in figures(after):
        change = changes.get(row.metric)
        value, bounds = (f"{change.value:+.4f}", f"{change.low:+.4f} to {change.high:+.4f}") if change else ("", "")
        bounds = bounds if change and math.isfinite(change.low) else ""
        rows.append((row.name, values_before.get(row.name, "-"), row.value, value, bounds, row.n))
    return "\n".join(aligned(rows))


def one_answer(result: dict, index: int = 0) -> str:
    """The model's answer to the `index`-th example (modulo their number), with a heading and the reference."""
    answers = result["answers"]
    answer = answers[index % len(answers)]
    name = f"{index % len(answers) + 1} of {len(answers)}" if answer["id"] is None else answer["id"]
    reference = f"\nreference:\n{answer['reference']}" if "reference" in answer else ""
    return f"answer to example {name}:\n{answer['answer']}{reference}"


def aligned(rows: Sequence[tuple[str, ...]], last: str = "<") -> list[str]:
    """Format rows as lines with aligned columns.

    The first column is left-aligned, the last one as `last` says ("<" or ">"), the others are right-aligned.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    sides = ["<", *[">"] * (len(widths) - 2), last]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def percent(share: float) -> str:
    """A fraction as a percentage with one decimal place."""
    return f"{100 * share:.1f}%"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)
