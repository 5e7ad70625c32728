"""The tables of a comparison as rows of cells: Markdown is made of them here, the HTML page in page.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev

from eval.comparison.measures import MEASURES
from eval.comparison.words import ALPHA, heading, limits, listed, verdict, warnings

GENERAL = ("perplexity", "kl", "questions")
DIFFERENCE = ("value", "95% interval", "p, corrected", "shown", "p alone")


@dataclass(frozen=True)
class Table:
    """A title, a sentence on how to read it, the headings, and rows of text. `rows` start with the name of the row."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def all_tables(result: dict) -> list[Table]:
    """The tables that the comparison has figures for."""
    tables = [task_table(result), general_table(result), difference_table(result), forgetting_table(result)]
    tables += [baseline_table(result), seed_table(result), *rule_tables(result)]
    return [table for table in tables if table.rows]


def task_table(result: dict) -> Table:
    """A row for every arm and every baseline: value and 95% interval of each metric of the task."""
    note = "Value, and its 95% interval below. More is better, except for the loss. A baseline needs no language model."
    return _values(result, "The task", note, [name for name in MEASURES if name not in GENERAL])


def general_table(result: dict) -> Table:
    """A row for every arm and the base model: value and 95% interval of each metric of general language."""
    note = "Value, and its 95% interval below. For perplexity and KL, less is better."
    return _values(result, "General language", note, GENERAL)


def _values(result: dict, title: str, note: str, metrics: Sequence[str]) -> Table:
    metrics = [name for name in metrics if any(name in row["metrics"] for row in result["rows"])]
    known = [row for row in result["rows"] if any(name in row["metrics"] for name in metrics)]
    rows = [[_name(row), *(_value(row, name) for name in metrics)] for row in known]
    return Table(title, note, ["row", *(heading(result, name) for name in metrics)], rows)


def difference_table(result: dict) -> Table:
    """The differences between the arms."""
    note = (
        "The first arm minus the one that it is compared with, on the same reports. p is two-sided, and corrected (Holm) for "
        "all tests of this table; a difference is shown if it is below 0.05. Between arms with several seeds, interval and p "
        "contain the spread over seeds."
    )
    return _differences(result, "arms", "Differences between the arms", note)


def forgetting_table(result: dict) -> Table:
    """The arms against the base model on general text."""
    note = "Each arm minus the base model, on the same texts and questions. p as above, for the tests of this table."
    return _differences(result, "forgetting", "What was forgotten: the arms against the base model", note)


def baseline_table(result: dict) -> Table:
    """The baselines against the reference."""
    note = f"Each baseline minus {result['reference']}, on the same reports. p as above, for the tests of this table."
    return _differences(result, "baselines", f"Baselines against {result['reference']}", note)


def _differences(result: dict, family: str, title: str, note: str) -> Table:
    rows = [
        [
            f"{one['of']} \u2212 {one['against']}",
            heading(result, one["metric"]),
            *difference_cells(one, MEASURES[one["metric"]].digits),
        ]
        for one in result["differences"]
        if one["family"] == family and MEASURES[one["metric"]].tested
    ]
    return Table(title, note, ["difference", "metric", *DIFFERENCE], rows)


def difference_cells(one: dict, digits: int = 3) -> list[str]:
    """The cells below `DIFFERENCE`."""
    value, low, high = (
        "\u2013" if one[key] is None else f"{one[key]:+z.{digits}f}" for key in ("value", "low", "high")
    )
    shown = "yes" if one["p_holm"] < ALPHA else "no"
    return [value, f"{low} to {high}", p_value(one["p_holm"]), shown, p_value(one["p"])]


def p_value(p: float) -> str:
    """A p-value with as many digits as mean something."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def seed_table(result: dict) -> Table:
    """The values of single seeds, where an arm has several."""
    rows = []
    for row in result["rows"]:
        for metric, found in row["metrics"].items():
            values = found.get("seeds", ())
            if len(values) > 1 and MEASURES[metric].tested:
                digits = MEASURES[metric].digits
                each = ", ".join(f"{value:.{digits}f}" for value in values)
                rows.append([row["name"], heading(result, metric), each, f"{stdev(values):.{digits}f}"])
    note = "A seed is another training run of the same recipe. Differences contain this spread, the intervals of values do not."
    return Table("Spread over seeds", note, ["arm", "metric", "each seed", "standard deviation"], rows)


def rule_tables(result: dict) -> list[Table]:
    """F1, precision and recall of every rule for each arm and the engine, and the differences of F1."""
    shown = [row for row in result["rows"] if row["kind"] in ("arm", "engine") and "per_rule" in row]
    names = list(dict.fromkeys(rule for row in shown for rule in row["per_rule"]))
    tables = []
    for key, title in (
        ("f1", "F1 of each rule"),
        ("precision", "Precision of each rule"),
        ("recall", "Recall of each rule"),
    ):
        rows = [[rule, _true_count(shown, rule), *(_rule_value(row, rule, key) for row in shown)] for rule in names]
        note = "Value, and its 95% interval below. A dash: no answer, or no report, has the rule."
        tables.append(Table(title, note, ["rule", "in the test", *(_name(row) for row in shown)], rows))
    rows = [
        [f"{one['of']} \u2212 {one['against']}", one["rule"], *difference_cells(one)]
        for one in result["rule_differences"]
    ]
    note = "p is two-sided, after Holm's correction for all tests of this table."
    return [*tables, Table("Differences of F1 of each rule", note, ["difference", "rule", *DIFFERENCE], rows)]


def _true_count(shown: Sequence[dict], rule: str) -> str:
    return f"{max(row['per_rule'].get(rule, {}).get('n_true', 0) for row in shown):.0f}"


def _rule_value(row: dict, rule: str, key: str) -> str:
    found = row["per_rule"].get(rule, {}).get(key)
    return "\u2013" if not found or found["value"] is None else _with_interval(found, 2)


def _name(row: dict) -> str:
    kinds = {"baseline": " (baseline)", "engine": " (baseline)"}
    seeds = len(row.get("seeds", ()))
    return row["name"] + kinds.get(row["kind"], "") + (f" ({seeds} seeds)" if seeds > 1 else "")


def _value(row: dict, metric: str) -> str:
    found = row["metrics"].get(metric)
    return _with_interval(found, MEASURES[metric].digits) if found and found["value"] is not None else ""


def _with_interval(found: dict, digits: int) -> str:
    value = f"{found['value']:.{digits}f}"
    return value if found["low"] is None else f"{value}\n{found['low']:.{digits}f}\u2013{found['high']:.{digits}f}"


def markdown(result: dict) -> str:
    """The whole comparison as Markdown, without the figures and the answers."""
    names = [row["name"] for row in result["rows"] if row["kind"] == "arm"]
    parts = [_plain(f"# {names[0]} compared with {listed(names[1:])}")]
    lists = {**verdict(result), "Read with care": warnings(result), "What this does not say": limits(result)}
    for title, sentences in lists.items():
        if sentences:
            parts.append(f"## {title}\n\n" + "\n".join(f"- {_plain(sentence)}" for sentence in sentences))
    for table in all_tables(result):
        lines = [table.head, ["---"] * len(table.head), *table.rows]
        body = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        parts.append(f"## {_plain(table.title)}\n\n{_plain(table.note)}\n\n{body}")
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no tags."""
    return text.replace("<", "&lt;")


def _cell(text: str) -> str:
    value, _, bounds = text.partition("\n")
    return _plain(f"{value} ({bounds})" if bounds else value).replace("|", "\\|")
