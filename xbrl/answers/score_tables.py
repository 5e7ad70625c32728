"""Tables of the regulator's task: those of `eval/report.py` with violations, facts, letters and baselines added.

A result of another task has none of these and gives the same table as `eval/report.py`.
"""

from eval import report
from eval.report import Figure, aligned, percent


def figures(result: dict) -> list[Figure]:
    """All figures of a result of scripts/evaluate.py or scripts/score.py."""
    return [
        *_violation_figures(result),
        *_part_figures(result),
        *_fact_figures(result),
        *report.rouge_figures(result),
        *_letter_bounds(result),
        *_letter_figures(result),
        *report.run_figures(result),
    ]


def table(result: dict) -> str:
    """A result as text: each figure with its interval and N, then one row per rule."""
    lines = [report.table(result, figures)]
    violations = result.get("violations")
    if violations:
        lines += ["", f"baselines are fitted on {violations['baselines_fitted_on']}"]
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


def full_report(result: dict, before: dict | None, show: int) -> str:
    """The table, the comparison with an earlier result if there is one, and the first `show` answers."""
    parts = [table(result)] + ([compare(before, result)] if before else [])
    parts += [one_answer(result, index) for index in range(min(show, len(result.get("answers", ()))))]
    return "\n\n".join(parts)


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
    rows = [
        Figure("violations F1 (micro)", f"{micro['f1']:.3f}", n, "f1"),
        *(Figure(f"  baseline: {name}", f"{scores['f1']:.3f}", n) for name, scores in violations["baselines"].items()),
        *(Figure(f"  {name}", f"{micro[name]:.3f}", n) for name in ("precision", "recall")),
    ]
    if "macro_f1" in violations:  # results of earlier versions have none of these
        known = sum(scores["n_true"] > 0 for scores in violations["per_rule"].values())
        rows.append(Figure("  F1, mean over rules (macro)", f"{violations['macro_f1']:.3f}", f"{known} rules"))
        without = violations["without_implied"]["f1"]
        rows.append(Figure("  F1 without implied rules", f"{without:.3f}", "the strictest rule of each ratio"))
    rows.append(Figure("  all violations of a report right", percent(violations["exact"]), reports, "exact"))
    rows.append(Figure("  unparsable answers", percent(violations["unparsable"]["share"]), reports))
    if "void_lines" in violations:
        rows.append(Figure("  void lines in other answers", str(violations["void_lines"]), reports))
    if violations.get("void_true_lines"):
        rows.append(
            Figure("  true lines that cannot be read", str(violations["void_true_lines"]), "left out of the facts")
        )
    return rows


def _part_figures(result: dict) -> list[Figure]:
    """Reports with notes, each kind and with the baselines, and minimal pairs."""
    violations = result.get("violations") or {}
    rows = []
    for kind, scores in violations.get("kinds", {}).items():
        n = f"{scores['n_reports']} reports, {percent(scores['exact'])} right"
        decided = "" if scores["note_f1"] is None else f", of what notes decide {scores['note_f1']:.3f}"
        rows.append(Figure(f"  F1, notes: {kind}", f"{scores['f1']:.3f}", n + decided))
    rows += [
        Figure(f"  of what notes decide, baseline: {name}", f"{scores['note_f1']:.3f}", "")
        for name, scores in violations.get("baselines", {}).items()
        if scores.get("note_f1") is not None
    ]
    pairs = violations.get("pairs", {"n": 0})
    if pairs["n"]:
        rows.append(Figure("  minimal pairs right", percent(pairs["right"]), f"{pairs['n']} pairs", "pairs"))
    return rows


def _fact_figures(result: dict) -> list[Figure]:
    facts = result.get("facts")
    if not facts:
        return []
    names = {"where": "cell or client", "value": "value", "limit": "limit", "legal": "article"}
    n = f"{facts['n_named']} findings whose rule is named, of {facts['n_true']}"
    return [
        Figure("facts F1: all of a finding right", f"{facts['f1']:.3f}", f"{facts['n_true']} findings", "fact_f1"),
        *(Figure(f"  {name} right", percent(facts["right"][field]), n) for field, name in names.items()),
    ]


def _letter_bounds(result: dict) -> list[Figure]:
    """What ROUGE-L is at most and at least, and that of each baseline that sends the same letter to every bank."""
    rouge = result.get("rouge_l")
    if not rouge:
        return []
    n = f"{rouge['n']} {rouge['of']}s"
    rows = []
    if rouge.get("ceiling") is not None:
        rows.append(Figure("  ceiling: right in an unseen wording", f"{rouge['ceiling']:.3f}", n))
    for name, floor in rouge.get("floor", {}).items():
        if floor is not None:
            rows.append(Figure(f"  floor: {'the letter of ' * (name != 'fixed')}{name}", f"{floor:.3f}", n))
    return rows + [Figure(f"  baseline: {name}", f"{f:.3f}", n) for name, f in rouge["baselines"].items()]


def _letter_figures(result: dict) -> list[Figure]:
    letters, measures = result.get("letters"), result.get("measures")
    rows = []
    if letters and letters["n"]:
        n = f"{letters['n']} figures, dates and articles"
        rows.append(Figure("letters: statements with support", percent(letters["supported"]), n))
        for kind, one in letters["by_kind"].items():
            if one["n"]:
                rows.append(Figure(f"  {kind}", percent(one["supported"]), str(one["n"])))
    if measures and measures["n"]:
        rows.append(
            Figure("letters: measures demanded in time", percent(measures["right"]), f"{measures['n']} measures")
        )
        rows.append(
            Figure("  all measures of a letter right", percent(measures["reports"]), f"{measures['n_reports']} reports")
        )
    return rows
