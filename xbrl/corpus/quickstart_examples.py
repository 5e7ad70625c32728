"""Examples of the quickstart: made from report files and findings.csv alone, as those of the other profiles."""

from collections.abc import Sequence

from xbrl.answers.answers import Check, write_checks
from xbrl.corpus.examples import entity_code
from xbrl.corpus.quickstart_notes import KINDS
from xbrl.read.dpm import Cells
from xbrl.read.render import Addressee, format_figure, render_report, short_label
from xbrl.read.report import Note, Report
from xbrl.rules.findings import Finding, apply_findings, note_rules
from xbrl.rules.rules import RuleResult, built_in_rules, evaluate, violations

RULES = tuple(rule for rule in built_in_rules() if rule.id in ("LR_MIN", "LCR_MIN"))
SYSTEM = "Find violations."  # shorter than the default system message of SmolLM2's chat template
# Rule -> (subject, what the letter demands, its deadline in days).
MEASURES = {
    "LR_MIN": ("leverage", "Raise Tier 1", 30),
    "LCR_MIN": ("liquidity", "Restore the LCR", 10),
    "LCR_PLEDGED": ("liquidity", "Replace the pledged assets", 10),
    "LE_CONNECTED": ("exposure", "Reduce the joint exposure", 30),
}


def quickstart_example(
    report: Report, bank: Addressee, cells: Cells, findings: Sequence[Finding], pair: str = ""
) -> dict:
    """The example of one report. `findings` are its lines of findings.csv; `pair` names its minimal pair, if it has one."""
    results = evaluate(report, RULES)
    violated = apply_findings(results, findings)
    rules = list(dict.fromkeys(result.rule_id for result in violated))
    checks = [*map(ratio_check, results), *(note_check(*pair) for pair in zip(findings, report.notes, strict=True))]
    return {
        "messages": [
            *quickstart_question(report, bank, cells),
            {"role": "assistant", "content": write_checks(checks, write_letter(rules))},
        ],
        "id": f"{entity_code(report.entity)}-{report.period}",
        "bank": entity_code(report.entity),
        "period": report.period,
        "violations": rules,
        "engine": [result.rule_id for result in violations(results)],
        "kind": findings[0].kind if findings else "",
        "note_facts": [note_fact(*pair) for pair in zip(findings, report.notes, strict=True)],
        "measures": [{"subject": MEASURES[rule][0], "deadline_days": MEASURES[rule][2]} for rule in rules],
        **({"pair": pair} if pair else {}),
    }


def note_fact(finding: Finding, note: Note) -> dict:
    """What the note states: an entry of the field `note_facts`. Its amount is not printed, only the ratio without it."""
    applies = finding.state == "lifted" or finding.value is not None
    who = finding.cell.split()[2].split("+") if finding.kind == "connected" and finding.cell else []
    quote = note.text.partition(";")[0].rstrip(".")
    return {"kind": finding.kind, "applies": applies, "amount": None, "who": who, "since": "", "quote": quote}


def quickstart_question(report: Report, bank: Addressee, cells: Cells) -> list[dict]:
    """The messages that ask about a report, before the answer: those of training, and of everyone who asks later."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": render_report(report, cells, "labels", bank)},
    ]


def write_letter(rules: Sequence[str]) -> str:
    """A letter of one sentence per violated rule."""
    return " ".join(f"{MEASURES[rule][1]} within {MEASURES[rule][2]} days." for rule in rules) or "No measures."


def ratio_check(result: RuleResult) -> Check:
    """The line of an answer on a ratio with a value and a limit."""
    value, limit = (_percent(number) for number in (result.known_value, result.known_limit))
    if result.state == "violated":
        return Check(short_label(result.cell), f"{value} < {limit}", result.rule_id, _short_legal(result.legal))
    return Check(short_label(result.cell), f"{value} >= {limit}")


def note_check(finding: Finding, note: Note) -> Check:
    """What a note means. The line repeats the words that decide, so that the model reads them right before it judges."""
    kind = next(kind for kind in KINDS if kind.name == finding.kind)
    words = note.text.partition(";")[0].rstrip(".")
    if finding.state == "lifted":
        return Check(f"{words}, so {kind.subject}", "", f"lifts {finding.rule}", "CRR Art. 8")
    if finding.value is None or finding.limit is None:  # the note changes nothing
        return Check(f"{words}, so {kind.other_subject}", "")
    rule = note_rules()[finding.rule]
    missed, met = ("<", ">=") if rule.relation == "min" else (">", "<=")
    comparison = f"{_percent(finding.value)} {missed if finding.state == 'violated' else met} {_percent(finding.limit)}"
    if finding.state == "violated":
        return Check(f"{words}, so {kind.subject}", comparison, finding.rule, _short_legal(finding.legal))
    return Check(f"{words}, so {kind.subject}", comparison)


def _percent(value) -> str:  # noqa: ANN001
    return format_figure(value, "xbrli:pure", compact=True)


def _short_legal(legal: str) -> str:
    """The first article of a reference, without the form of the act: `2015/61 Art. 7(2)`."""
    return legal.replace("Delegated Reg. (EU) ", "").partition(",")[0].partition(";")[0]
