"""Tables of the supervisor's task: rules, notes, findings, letters and baselines beside the figures of eval/report.py."""

from collections.abc import Iterator

from eval import report
from eval.asked_examples import UNREADABLE
from eval.report import Figure, aligned, percent

FIELDS = {"where": "cell or client", "value": "value", "limit": "limit", "legal": "article"}


def figures(result: dict) -> list[Figure]:
    """Return all figures of a result of scripts/evaluate.py or scripts/score.py."""
    return [
        *_violation_figures(result),
        *_note_figures(result),
        *_fact_figures(result),
        *report.text_figures(result),
        *report.run_figures(result),
    ]


def rule_lines(result: dict) -> list[str]:
    """Return the lines below the table of figures: the training of the baselines, and a table with a row for each rule."""
    violations = result.get("violations")
    if not violations:  # no example was a chat with an answer
        return []
    lines = ["", f"baselines are fitted on {violations['baselines_fitted_on']}"]
    if violations["per_rule"]:
        rows = [("rule", "precision", "recall", "F1", "true", "predicted")]
        for rule, scores in violations["per_rule"].items():
            precision, recall, f1 = (f"{scores[name]:.3f}" for name in ("precision", "recall", "f1"))
            rows.append((rule, precision, recall, f1, str(scores["n_true"]), str(scores["n_predicted"])))
        lines += ["", *aligned(rows, last=">")]
    return lines


def _score(name: str, value: float, n: str = "", metric: str = "") -> Figure:
    return Figure(name, f"{value:.3f}", n, metric)


def _share(name: str, value: float, n: str, metric: str = "") -> Figure:
    return Figure(name, percent(value), n, metric)


def _violation_figures(result: dict) -> Iterator[Figure]:
    """Yield the scores of predicted rules: all reports, kinds of notes, minimal pairs, with the baselines."""
    violations = result.get("violations")
    if not violations:
        return
    reports, baselines = f"{violations['n_reports']} reports", violations["baselines"]
    n = f"{violations['n_violations']} violations in {reports}"
    micro, rules = violations["micro"], len({*violations["per_rule"]} - {UNREADABLE})
    yield _score("violations F1 (micro)", micro["f1"], n, "f1")
    yield from (_score(f"  baseline: {name}", scores["f1"], n) for name, scores in baselines.items())
    yield from (_score(f"  {name}", micro[name], n) for name in ("precision", "recall"))
    yield _score("  F1, mean over rules (macro)", violations["macro_f1"], f"{rules} rules, true or predicted")
    yield _share("  all violations of a report right", violations["exact"], reports, "exact")
    yield _share("  unparsable answers", violations["unparsable"]["share"], reports)
    yield Figure("  void lines in other answers", str(violations["void_lines"]), reports)
    wrong = violations["contradictions"]
    yield Figure("  verdicts that contradict their own figures", str(wrong["n"]), f"{wrong['lines']} lines")
    if void := violations["void_true_lines"]:
        yield Figure("  true lines that cannot be read", str(void), "left out of the facts")
    for kind, scores in violations["kinds"].items():
        decided = "" if scores["note_f1"] is None else f", of rules decided by notes {scores['note_f1']:.3f}"
        n = f"{scores['n_reports']} reports, {percent(scores['exact'])} right{decided}"
        yield _score(f"  F1, notes: {kind}", scores["f1"], n)
    if violations["note_f1"] is not None:
        yield _score("F1 of rules decided by notes", violations["note_f1"])
        for name, scores in baselines.items():
            if "note_f1" in scores:
                yield _score(f"  baseline: {name}", scores["note_f1"])
    if pairs := violations["pairs"]["n"]:
        yield _share("  minimal pairs right", violations["pairs"]["right"], f"{pairs} pairs", "pairs")


def _note_figures(result: dict) -> Iterator[Figure]:
    """Yield the scores of the notes' facts: kind and applies, whole facts, by kind and language, and of the baselines."""
    notes, violations = result.get("notes"), result.get("violations")
    if notes:
        n, named = f"{notes['n']} facts, {notes['n_said']} stated", f"{notes['n_matched']} facts whose kind is named"
        yield _score("facts of notes, F1: kind and applies", notes["decided_f1"], n)
        yield _score("  and amount", notes["amount_f1"], n)
        yield _score("  all of a fact right", notes["f1"], n)
        yield from (_share(f"  {name} right", share, named) for name, share in notes["right"].items())
        for part, scores in {**notes["kinds"], **notes["languages"]}.items():
            yield _score(f"  {part}", scores["decided_f1"], f"{scores['n']} facts, all right {scores['f1']:.3f}")
        if pairs := notes["pairs"]["n"]:
            yield _share("  notes of minimal pairs right", notes["pairs"]["right"], f"{pairs} pairs")
    for name, scores in violations["baselines"].items() if violations else ():
        if of_notes := scores.get("notes"):
            n = f"{of_notes['n']} facts, with the amount {of_notes['amount_f1']:.3f}"
            title = "  baseline: " if notes else "facts of notes, F1: kind and applies, baseline: "
            yield _score(f"{title}{name}", of_notes["decided_f1"], n)


def _fact_figures(result: dict) -> Iterator[Figure]:
    if facts := result.get("facts"):
        n = f"{facts['n_named']} findings whose rule is named, of {facts['n_true']}"
        yield _score("facts F1: all of a finding right", facts["f1"], f"{facts['n_true']} findings", "fact_f1")
        yield from (_share(f"  {name} right", facts["right"][field], n) for field, name in FIELDS.items())
