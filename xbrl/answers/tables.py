"""Tables of the supervisor's task: those of `eval/report.py` with rules, notes, findings, letters and baselines added.

A result of another task has none of these and gives the same table as `eval/report.py`.
"""

from eval import report
from eval.asked_examples import UNREADABLE
from eval.report import Figure, aligned, percent

FIELDS = {"where": "cell or client", "value": "value", "limit": "limit", "legal": "article"}


def figures(result: dict) -> list[Figure]:
    """All figures of a result of scripts/evaluate.py or scripts/score.py."""
    return [
        *_violation_figures(result),
        *_part_figures(result),
        *_note_figures(result),
        *_fact_figures(result),
        *report.text_figures(result),
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
            precision, recall, f1 = (f"{scores[name]:.3f}" for name in ("precision", "recall", "f1"))
            rows.append((rule, precision, recall, f1, str(scores["n_true"]), str(scores["n_predicted"])))
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
    micro, rules = violations["micro"], len({*violations["per_rule"]} - {UNREADABLE})
    rows = [
        Figure("violations F1 (micro)", f"{micro['f1']:.3f}", n, "f1"),
        *(Figure(f"  baseline: {name}", f"{scores['f1']:.3f}", n) for name, scores in violations["baselines"].items()),
        *(Figure(f"  {name}", f"{micro[name]:.3f}", n) for name in ("precision", "recall")),
        Figure("  F1, mean over rules (macro)", f"{violations['macro_f1']:.3f}", f"{rules} rules, true or predicted"),
        Figure("  all violations of a report right", percent(violations["exact"]), reports, "exact"),
        Figure("  unparsable answers", percent(violations["unparsable"]["share"]), reports),
        Figure("  void lines in other answers", str(violations["void_lines"]), reports),
    ]
    if violations["void_true_lines"]:
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
    if violations.get("note_f1") is not None:
        rows.append(Figure("what notes decide: F1 of these rules", f"{violations['note_f1']:.3f}", ""))
        rows += [
            Figure(f"  baseline: {name}", f"{scores['note_f1']:.3f}", "")
            for name, scores in violations["baselines"].items()
            if scores.get("note_f1") is not None
        ]
    pairs = violations.get("pairs", {"n": 0})
    if pairs["n"]:
        rows.append(Figure("  minimal pairs right", percent(pairs["right"]), f"{pairs['n']} pairs", "pairs"))
    return rows


def _note_figures(result: dict) -> list[Figure]:
    """What is said of notes: kind and applies, then all of a fact; by kind, by language, and by the baselines that read notes."""
    notes, baselines = result.get("notes"), (result.get("violations") or {}).get("baselines", {})
    rows = []
    if notes:
        n = f"{notes['n']} facts, {notes['n_said']} stated"
        rows = [
            Figure("facts of notes, F1: kind and applies", f"{notes['decided_f1']:.3f}", n),
            Figure("  and amount", f"{notes['amount_f1']:.3f}", n),
            Figure("  all of a fact right", f"{notes['f1']:.3f}", n),
        ]
        rows += [
            Figure(f"  {name} right", percent(share), f"{notes['n_matched']} facts whose kind is named")
            for name, share in notes["right"].items()
        ]
        rows += [
            Figure(f"  {part}", f"{scores['decided_f1']:.3f}", f"{scores['n']} facts, all right {scores['f1']:.3f}")
            for part, scores in {**notes["kinds"], **notes["languages"]}.items()
        ]
        if notes["pairs"]["n"]:
            rows.append(
                Figure(
                    "  notes of minimal pairs right", percent(notes["pairs"]["right"]), f"{notes['pairs']['n']} pairs"
                )
            )
    for name, scores in baselines.items():
        if one := scores.get("notes"):
            n = f"{one['n']} facts, with the amount {one['amount_f1']:.3f}"
            title = "  baseline: " if notes else "facts of notes, F1: kind and applies, baseline: "
            rows.append(Figure(f"{title}{name}", f"{one['decided_f1']:.3f}", n))
    return rows


def _fact_figures(result: dict) -> list[Figure]:
    facts = result.get("facts")
    if not facts:
        return []
    n = f"{facts['n_named']} findings whose rule is named, of {facts['n_true']}"
    return [
        Figure("facts F1: all of a finding right", f"{facts['f1']:.3f}", f"{facts['n_true']} findings", "fact_f1"),
        *(Figure(f"  {name} right", percent(facts["right"][field]), n) for field, name in FIELDS.items()),
    ]


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
        n = f"{measures['n']} measures"
        rows.append(Figure("letters: measures demanded in time", percent(measures["right"]), n))
        n = f"{measures['n_reports']} reports"
        rows.append(Figure("  all measures of a letter right", percent(measures["reports"]), n))
    return rows
