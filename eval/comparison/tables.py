"""The tables of a comparison as rows of cells: Markdown is made of them here, the HTML page in page.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev

from eval.comparison.measures import GENERAL, OWN, measure_of, ordered
from eval.comparison.words import bounds, heading, interval_over, listed, number, p_value, signed

NONE = "\u2013"
FAMILIES = {
    "arms": "Differences between the arms",
    "forgetting": "What was forgotten: the arms less the base model",
    "baselines": "Baselines less {reference}",
}


@dataclass(frozen=True)
class Table:
    """A title, a sentence on how to read it, the headings, and rows of text. `rows` start with the name of the row."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def all_tables(result: dict) -> list[Table]:
    """The tables that the comparison has figures for."""
    known = ordered(name for row in result["rows"] for name in row["metrics"])
    note = "Value, and its 95% interval below. More is better, except for the loss."
    if any(name.startswith(OWN) for name in known):
        note += " Of the scores of --metric nobody says what is better."
    if any(row["kind"] in ("baseline", "engine") for row in result["rows"]):
        note += " A baseline needs no language model."
    of_general = "Value, and its 95% interval below. For perplexity and KL, less is better."
    tables = [
        _values(result, "The task", note, [name for name in known if name not in GENERAL]),
        _values(result, "General language", of_general, [name for name in GENERAL if name in known]),
        _primary(result),
        *(_differences(result, family) for family in FAMILIES),
        _seeds(result),
        _rules(result),
    ]
    return [table for table in tables if table.rows]


def _values(result: dict, title: str, note: str, metrics: Sequence[str]) -> Table:
    """A row for everything that has one of the metrics, a column for each of them."""
    rows = []
    for row in result["rows"]:
        found = [row["metrics"].get(name) for name in metrics]
        if any(found):
            cells = zip(found, metrics, strict=True)
            rows.append([_name(row), *(_cell(one, measure_of(name).digits, "") for one, name in cells)])
    return Table(title, note, ["row", *(heading(result, name) for name in metrics)], rows)


def _primary(result: dict) -> Table:
    """The contrasts that were declared before."""
    rows = []
    for one in result["primary"]:
        metric, margin = one["metric"], one["margin"]
        rows.append(
            [
                f"{one['of']} \u2212 {one['against']}" + (", paired by seed" if one["paired"] else ""),
                heading(result, metric),
                signed(metric, one["value"]),
                bounds(one),
                p_value(one["p_holm"]),
                NONE if margin is None else f"{margin:g}",
                NONE if margin is None else p_value(one["p_margin_holm"]),
            ]
        )
    note = (
        "Seeds and examples are crossed. p is two-sided, of no difference, and corrected (Holm) for the contrasts of this "
        "table; p of the margin is of a difference as large as it or larger (two one-sided tests): below 0.05 the arms are "
        "equivalent."
    )
    head = ["contrast", "metric", "value", "95% interval", "p", "margin", "p of the margin"]
    return Table("Declared before", note, head, rows)


def _differences(result: dict, family: str) -> Table:
    rows = []
    for one in result["differences"]:
        if one["family"] == family:
            metric = one["metric"]
            value, low, high = (
                NONE if one[key] is None else signed(metric, one[key]) for key in ("value", "low", "high")
            )
            names = f"{one['of']} \u2212 {one['against']}", heading(result, metric)
            rows.append([*names, value, f"{low} to {high}", interval_over(result, one)])
    note = "Described and not tested. An interval that is not over seeds is of these runs alone."
    title = FAMILIES[family].format(reference=result["reference"])
    return Table(title, note, ["difference", "metric", "value", "95% interval", "over"], rows)


def _seeds(result: dict) -> Table:
    """The values of single seeds, where an arm has several."""
    rows = [
        [row["name"], heading(result, metric), ", ".join(number(metric, value) for value in found["seeds"])]
        + [number(metric, stdev(found["seeds"]))]
        for row in result["rows"]
        for metric, found in row["metrics"].items()
        if len(found.get("seeds", ())) > 1
    ]
    note = "A seed is another training run of the same recipe. Differences contain this spread, the intervals of values do not."
    return Table("Spread over seeds", note, ["arm", "metric", "each seed", "standard deviation"], rows)


def _rules(result: dict) -> Table:
    """F1 of every rule for each arm and the engine."""
    shown = [row for row in result["rows"] if row["kind"] in ("arm", "engine") and "per_rule" in row]
    rows = []
    for rule in dict.fromkeys(rule for row in shown for rule in row["per_rule"]):
        found = [row["per_rule"].get(rule, {}) for row in shown]
        count = max(one.get("n_true", 0) for one in found)
        rows.append([rule, f"{count:.0f}", *(_cell(one.get("f1"), 2, NONE) for one in found)])
    note = "Value, and its 95% interval below. A dash: no answer and no report has the rule."
    return Table("F1 of each rule", note, ["rule", "in the test", *map(_name, shown)], rows)


def _name(row: dict) -> str:
    seeds = len(row.get("seeds", ()))
    kind = " (baseline)" if row["kind"] in ("baseline", "engine") else ""
    return row["name"] + kind + (f" ({seeds} seeds)" if seeds > 1 else "")


def _cell(found: dict | None, digits: int, none: str) -> str:
    """A value, and its interval on a second line; `none` if there is no value."""
    if not found or found["value"] is None:
        return none
    value = f"{found['value']:.{digits}f}"
    return value if found["low"] is None else f"{value}\n{found['low']:.{digits}f}\u2013{found['high']:.{digits}f}"


def markdown(result: dict) -> str:
    """The whole comparison as Markdown, without the figures and the answers."""
    names = [row["name"] for row in result["rows"] if row["kind"] == "arm"]
    parts = [_plain(f"# {names[0]} compared with {listed(names[1:])}")]
    lists = {**result["verdict"], "Read with care": result["warnings"], "What this does not say": result["limits"]}
    for title, sentences in lists.items():
        if sentences:
            parts.append(f"## {title}\n\n" + "\n".join(f"- {_plain(sentence)}" for sentence in sentences))
    for table in all_tables(result):
        lines = [table.head, ["---"] * len(table.head), *table.rows]
        body = "\n".join(f"| {' | '.join(map(_one_line, line))} |" for line in lines)
        parts.append(f"## {_plain(table.title)}\n\n{_plain(table.note)}\n\n{body}")
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no tags."""
    return text.replace("<", "&lt;")


def _one_line(text: str) -> str:
    value, _, interval = text.partition("\n")
    return _plain(f"{value} ({interval})" if interval else value).replace("|", "\\|")
