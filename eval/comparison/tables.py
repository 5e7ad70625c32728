"""The tables of a comparison as rows of cells. `markdown` formats them; page.py puts them on the HTML page."""

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
    """A table of text: its title, a note on how to read it, the headings, and the rows, each of which begins with its name."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def all_tables(result: dict) -> list[Table]:
    """Return the tables for which the comparison has figures."""
    metrics = ordered(name for row in result["rows"] for name in row["metrics"])
    note = "Value, and its 95% interval below. More is better, except for the loss."
    if any(name.startswith(OWN) for name in metrics):
        note += " Which value of a score of --metric is better is not known."
    if any(row["kind"] == "baseline" for row in result["rows"]):
        note += " A baseline needs no language model."
    of_general = "Value, and its 95% interval below. For perplexity and KL, less is better."
    tables = [
        _values(result, "The task", note, [name for name in metrics if name not in GENERAL]),
        _values(result, "General language", of_general, [name for name in GENERAL if name in metrics]),
        _primary(result),
        *(_differences(result, family) for family in FAMILIES),
        _seeds(result),
        _labels(result),
    ]
    return [table for table in tables if table.rows]


def _values(result: dict, title: str, note: str, metrics: Sequence[str]) -> Table:
    """Return a table with a column for each metric, and a row for everything that has one of them."""
    rows = []
    for row in result["rows"]:
        values = [row["metrics"].get(name) for name in metrics]
        if any(values):
            cells = zip(values, metrics, strict=True)
            rows.append([_name(row), *(_cell(value, measure_of(name).digits, "") for value, name in cells)])
    return Table(title, note, ["row", *(heading(result, name) for name in metrics)], rows)


def _primary(result: dict) -> Table:
    """Return the table of the primary contrasts."""
    rows = []
    for contrast in result["primary"]:
        metric, margin = contrast["metric"], contrast["margin"]
        rows.append(
            [
                f"{contrast['of']} \u2212 {contrast['against']}" + (", paired by seed" if contrast["paired"] else ""),
                heading(result, metric),
                signed(metric, contrast["value"]),
                bounds(contrast),
                p_value(contrast["p_holm"]),
                NONE if margin is None else f"{margin:g}",
                NONE if margin is None else p_value(contrast["p_margin_holm"]),
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
    for entry in result["differences"]:
        if entry["family"] == family:
            metric = entry["metric"]
            value, low, high = (
                NONE if entry[key] is None else signed(metric, entry[key]) for key in ("value", "low", "high")
            )
            names = f"{entry['of']} \u2212 {entry['against']}", heading(result, metric)
            rows.append([*names, value, f"{low} to {high}", interval_over(result, entry)])
    note = "Described and not tested. An interval that is not over seeds is of these runs alone."
    title = FAMILIES[family].format(reference=result["reference"])
    return Table(title, note, ["difference", "metric", "value", "95% interval", "over"], rows)


def _seeds(result: dict) -> Table:
    """Return the table with the values of single seeds, for arms that have several."""
    rows = [
        [row["name"], heading(result, metric), ", ".join(number(metric, seed) for seed in value["seeds"])]
        + [number(metric, stdev(value["seeds"]))]
        for row in result["rows"]
        for metric, value in row["metrics"].items()
        if len(value.get("seeds", ())) > 1
    ]
    note = "A seed is another training run of the same recipe. Differences contain this spread, the intervals of values do not."
    return Table("Spread over seeds", note, ["arm", "metric", "each seed", "standard deviation"], rows)


def _labels(result: dict) -> Table:
    """Return the table with the F1 of every label, for each arm and for the baseline that is always shown."""
    shown = [row for row in result["rows"] if "per_label" in row]
    rows = []
    for label in dict.fromkeys(label for row in shown for label in row["per_label"]):
        values = [row["per_label"].get(label, {}) for row in shown]
        count = max(value.get("n_true", 0) for value in values)
        rows.append([label, f"{count:.0f}", *(_cell(value.get("f1"), 2, NONE) for value in values)])
    name, example = result["label"], result["unit"].removesuffix("s")
    note = f"Value, and its 95% interval below. A dash: no answer and no {example} has the {name}."
    return Table(f"F1 of each {name}", note, [name, "in the test", *map(_name, shown)], rows)


def _name(row: dict) -> str:
    seeds = len(row.get("seeds", ()))
    kind = " (baseline)" if row["kind"] == "baseline" else ""
    return row["name"] + kind + (f" ({seeds} seeds)" if seeds > 1 else "")


def _cell(interval: dict | None, digits: int, none: str) -> str:
    """Format a value, and its interval on a second line; `none` if there is no value."""
    if not interval or interval["value"] is None:
        return none
    value, low, high = (
        "" if interval[key] is None else f"{interval[key]:.{digits}f}" for key in ("value", "low", "high")
    )
    return f"{value}\n{low}\u2013{high}" if low else value


def markdown(result: dict) -> str:
    """Format the whole comparison as Markdown, without the figures and the answers."""
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
    """Escape tags, so that Markdown shows the text as it is."""
    return text.replace("<", "&lt;")


def _one_line(text: str) -> str:
    value, _, interval = text.partition("\n")
    return _plain(f"{value} ({interval})" if interval else value).replace("|", "\\|")
