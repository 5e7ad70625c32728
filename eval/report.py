"""Readable tables of evaluation results: one model, or the same data before and after training."""

import math
from collections.abc import Sequence

from common.errors import UserError
from eval.paired import paired_change

Row = tuple[str, ...]

# The rows whose change has an interval, and what eval/paired.py calls it.
PAIRED = {
    "violations F1 (micro)": "f1",
    "directive ROUGE-L (F)": "rouge_l",
    "answer ROUGE-L (F)": "rouge_l",
    "validation loss (nats/token)": "loss",
}


def table(result: dict) -> str:
    """The result of scripts/evaluate.py as text: every figure with its N, then the rules one by one."""
    lines = [f"{result['model']} on {result['data']} ({result['dtype']}, {result['seconds']:.0f} s)", ""]
    lines += _aligned([("", "", "N"), *_figures(result)])
    violations = result.get("violations")
    if violations:
        lines += ["", f"trivial baselines are fitted on {violations['baselines_fitted_on']}"]
    if violations and violations["per_rule"]:
        lines.append("")
        rows = [("rule", "precision", "recall", "F1", "true", "said")]
        for rule, scores in violations["per_rule"].items():
            figures = tuple(f"{scores[name]:.3f}" for name in ("precision", "recall", "f1"))
            rows.append((rule, *figures, str(scores["n_true"]), str(scores["n_predicted"])))
        lines += _aligned(rows, last=">")
    return "\n".join(lines)


def check_comparable(before: dict, after: dict) -> None:
    """Raise `UserError` unless both results are of the same examples and the same general text."""
    for key in ("data_sha256", "n_examples", "general_source"):
        if before.get(key) != after.get(key):
            raise UserError(
                f"the evaluations of {before['model']} and {after['model']} are not of the same data ({key} differs): "
                f"evaluate both with the same --data, --limit and --general."
            )


def compare(before: dict, after: dict) -> str:
    """Two results on the same data as a table `before | after | change`, with the change's 95% interval where examples tell.

    Raises `UserError` if they are not comparable.
    """
    check_comparable(before, after)
    then = {name: value for name, value, _ in _figures(before)}
    changes = paired_change(before, after)
    rows = [("", "before", "after", "change", "95% interval", "N")]
    for name, value, n in _figures(after):
        change = changes.get(PAIRED.get(name))
        interval = (f"{change.value:+.4f}", f"{change.low:+.4f} to {change.high:+.4f}") if change else ("", "")
        rows.append((name, then.get(name, "-"), value, *interval, n))
    return "\n".join(_aligned(rows))


def one_answer(result: dict, index: int = 0) -> str:
    """What the model wrote for one example: the `index`-th of those with violations, else of all."""
    answers = [answer for answer in result["answers"] if answer.get("true")] or result["answers"]
    answer = answers[index % len(answers)]
    head = f"answer to example {answer['id']}"
    if "true" in answer:
        head += f" (violations in truth: {', '.join(answer['true']) or 'none'})"
    return f"{head}:\n{answer['answer']}"


def _figures(result: dict) -> list[Row]:
    """(name, value, N) of every figure that the result has."""
    rows = []
    violations, rouge, loss, general = (result.get(k) for k in ("violations", "rouge_l", "loss", "general"))
    if violations:
        n = f"{violations['n_violations']} violations in {violations['n_reports']} reports"
        rows.append(("violations F1 (micro)", f"{violations['micro']['f1']:.3f}", n))
        rows += [(f"  trivial: {name}", f"{b['f1']:.3f}", n) for name, b in violations["baselines"].items()]
        rows += [(f"  {name}", f"{violations['micro'][name]:.3f}", n) for name in ("precision", "recall")]
        reports = f"{violations['n_reports']} reports"
        rows.append(("  all violations of a report right", _percent(violations["exact"]), reports))
        rows.append(("  unparsable answers", _percent(violations["unparsable"]["share"]), reports))
    if rouge:
        n = f"{rouge['n']} {rouge['of']}s"
        rows.append((f"{rouge['of']} ROUGE-L (F)", f"{rouge['f']:.3f}", n))
        rows += [(f"  trivial: the letter of {name}", f"{f:.3f}", n) for name, f in rouge["baselines"].items()]
    if result.get("answers"):
        rows.append(("answers cut short", str(result["cut_short"]), f"at {result['max_new_tokens']} tokens"))
    if loss:
        rows.append(("validation loss (nats/token)", _number(loss["mean"]), f"{loss['targets']:,} response tokens"))
    if general:
        n = f"{general['tokens']:,} tokens of general text"
        rows.append(("general text: perplexity per token", _number(general["perplexity"]), n))
        rows.append(("general text: perplexity per byte", _number(general["perplexity_per_byte"]), n))
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def _aligned(rows: Sequence[Row], last: str = "<") -> list[str]:
    """Columns of one width: the first to the left, figures to the right, the last one as `last` says ("<" or ">")."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    sides = ["<", *[">"] * (len(widths) - 2), last]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
