"""The tables of a comparison as rows of cells: Markdown is made of them here, the HTML page in page.py."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev

from eval.comparison.measures import GENERAL, OWN, measure_of, ordered
from eval.comparison.words import bounds, heading, interval_over, listed, p_value


@dataclass(frozen=True)
class Table:
    """A title, a sentence on how to read it, the headings, and rows of text. `rows` start with the name of the row."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def all_tables(result: dict) -> list[Table]:
    """The tables that the comparison has figures for."""
    tables = [task_table(result), general_table(result), primary_table(result)]
    for family, title in (
        ("arms", "Differences between the arms"),
        ("forgetting", "What was forgotten: the arms less the base model"),
        ("baselines", f"Baselines less {result['reference']}"),
    ):
        tables.append(_differences(result, family, title))
    tables += [seed_table(result), *rule_tables(result)]
    return [table for table in tables if table.rows]


def task_table(result: dict) -> Table:
    """A row for every arm and every baseline: value and 95% interval of each metric of the task."""
    note = "Value, and its 95% interval below. More is better, except for the loss."
    known = ordered(name for row in result["rows"] for name in row["metrics"])
    if any(name.startswith(OWN) for name in known):
        note += " Of the scores of --metric nobody says what is better."
    if any(row["kind"] in ("baseline", "engine") for row in result["rows"]):
        note += " A baseline needs no language model."
    return _values(result, "The task", note, [name for name in known if name not in GENERAL])


def general_table(result: dict) -> Table:
    """A row for every arm and the base model: value and 95% interval of each metric of general language."""
    note = "Value, and its 95% interval below. For perplexity and KL, less is better."
    return _values(result, "General language", note, GENERAL)


def _values(result: dict, title: str, note: str, metrics: Sequence[str]) -> Table:
    metrics = [name for name in metrics if any(name in row["metrics"] for row in result["rows"])]
    known = [row for row in result["rows"] if any(name in row["metrics"] for name in metrics)]
    rows = [[_name(row), *(_value(row, name) for name in metrics)] for row in known]
    return Table(title, note, ["row", *(heading(result, name) for name in metrics)], rows)


def primary_table(result: dict) -> Table:
    """The contrasts that were declared before."""
    rows = []
    for one in result["primary"]:
        digits, margin = measure_of(one["metric"]).digits, one["margin"]
        rows.append(
            [
                f"{one['of']} \u2212 {one['against']}" + (", paired by seed" if one["paired"] else ""),
                heading(result, one["metric"]),
                f"{one['value']:+z.{digits}f}",
                bounds(one),
                p_value(one["p_holm"]),
                f"{margin:g}" if margin is not None else "\u2013",
                p_value(one["p_margin_holm"]) if margin is not None else "\u2013",
            ]
        )
    note = (
        "Seeds and examples are crossed. p is two-sided, of no difference, and corrected (Holm) for the contrasts of this "
        "table; p of the margin is of a difference as large as it or larger (two one-sided tests): below 0.05 the arms are "
        "equivalent."
    )
    head = ["contrast", "metric", "value", "95% interval", "p", "margin", "p of the margin"]
    return Table("Declared before", note, head, rows)


def _differences(result: dict, family: str, title: str) -> Table:
    rows = []
    for one in result["differences"]:
        if one["family"] == family:
            digits = measure_of(one["metric"]).digits
            value, low, high = (
                "\u2013" if one[key] is None else f"{one[key]:+z.{digits}f}" for key in ("value", "low", "high")
            )
            names = f"{one['of']} \u2212 {one['against']}", heading(result, one["metric"])
            rows.append([*names, value, f"{low} to {high}", interval_over(result, one)])
    note = "Described and not tested. An interval that is not over seeds is of these runs alone."
    return Table(title, note, ["difference", "metric", "value", "95% interval", "over"], rows)


def seed_table(result: dict) -> Table:
    """The values of single seeds, where an arm has several."""
    rows = []
    for row in result["rows"]:
        for metric, found in row["metrics"].items():
            values = found.get("seeds", ())
            if len(values) > 1:
                digits = measure_of(metric).digits
                each = ", ".join(f"{value:.{digits}f}" for value in values)
                rows.append([row["name"], heading(result, metric), each, f"{stdev(values):.{digits}f}"])
    note = "A seed is another training run of the same recipe. Differences contain this spread, the intervals of values do not."
    return Table("Spread over seeds", note, ["arm", "metric", "each seed", "standard deviation"], rows)


def rule_tables(result: dict) -> list[Table]:
    """F1, precision and recall of every rule for each arm and the engine."""
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
    return tables


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
    return _with_interval(found, measure_of(metric).digits) if found and found["value"] is not None else ""


def _with_interval(found: dict, digits: int) -> str:
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
        body = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        parts.append(f"## {_plain(table.title)}\n\n{_plain(table.note)}\n\n{body}")
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no tags."""
    return text.replace("<", "&lt;")


def _cell(text: str) -> str:
    value, _, bounds = text.partition("\n")
    return _plain(f"{value} ({bounds})" if bounds else value).replace("|", "\\|")
