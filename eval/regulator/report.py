"""Tables of the regulator's task: those of `eval/report.py` with violations, letters and trivial baselines added.

A result of another task has none of these and gives the same table as `eval/report.py`.
"""

from eval import report
from eval.report import Figure, aligned, percent


def figures(result: dict) -> list[Figure]:
    """All figures of a result of scripts/evaluate.py."""
    return [
        *_violation_figures(result),
        *report.rouge_figures(result),
        *_letter_baselines(result),
        *report.run_figures(result),
    ]


def table(result: dict) -> str:
    """A result as text: each figure with its N, then one row per rule."""
    lines = [report.table(result, figures)]
    violations = result.get("violations")
    if violations:
        lines += ["", f"trivial baselines are fitted on {violations['baselines_fitted_on']}"]
    if violations and violations["per_rule"]:
        rows = [("rule", "precision", "recall", "F1", "true", "predicted")]
        for rule, scores in violations["per_rule"].items():
            values = tuple(f"{scores[name]:.3f}" for name in ("precision", "recall", "f1"))
            rows.append((rule, *values, str(scores["n_true"]), str(scores["n_predicted"])))
        lines += ["", *aligned(rows, last=">")]
    return "\n".join(lines)


def compare(before: dict, after: dict) -> str:
    """`eval.report.compare` with all figures of this task."""
    return report.compare(before, after, figures)


def one_answer(result: dict, index: int = 0) -> str:
    """The answer to the `index`-th report with violations (or of all, if there is none), with the true violations."""
    answers = [answer for answer in result["answers"] if answer.get("true")] or result["answers"]
    answer = answers[index % len(answers)]
    if "true" not in answer:
        return report.one_answer(result, index)
    true = ", ".join(answer["true"]) or "none"
    return f"answer to example {answer['id']} (true violations: {true}):\n{answer['answer']}"


def _violation_figures(result: dict) -> list[Figure]:
    violations = result.get("violations")
    if not violations:
        return []
    n = f"{violations['n_violations']} violations in {violations['n_reports']} reports"
    reports = f"{violations['n_reports']} reports"
    micro = violations["micro"]
    return [
        Figure("violations F1 (micro)", f"{micro['f1']:.3f}", n, "f1"),
        *(Figure(f"  trivial: {name}", f"{scores['f1']:.3f}", n) for name, scores in violations["baselines"].items()),
        *(Figure(f"  {name}", f"{micro[name]:.3f}", n) for name in ("precision", "recall")),
        Figure("  all violations of a report right", percent(violations["exact"]), reports),
        Figure("  unparsable answers", percent(violations["unparsable"]["share"]), reports),
    ]


def _letter_baselines(result: dict) -> list[Figure]:
    """ROUGE-L of each trivial baseline that sends the same letter to every bank."""
    rouge = result.get("rouge_l")
    if not rouge:
        return []
    n = f"{rouge['n']} {rouge['of']}s"
    return [Figure(f"  trivial: the letter of {name}", f"{f:.3f}", n) for name, f in rouge["baselines"].items()]
