"""The answers of the profile `laptop`: one check per line, and a short letter that orders measures with deadlines."""

import random
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

from xbrl.answers.answers import Check
from xbrl.answers.wordings import Wordings
from xbrl.read.render import Addressee, format_limit, short_label
from xbrl.read.report import CellKey, Report
from xbrl.rules.dates import long_date
from xbrl.rules.findings import Finding, parse_cell
from xbrl.rules.rules import RuleResult

# rule -> (subject of the measure, days to the deadline, days if the shortfall is more than a tenth of the limit)
MEASURES: dict[str, tuple[str, int, int]] = {
    **dict.fromkeys(("CET1_MIN", "T1_MIN", "TC_MIN"), ("capital", 30, 10)),
    "LR_MIN": ("leverage", 30, 10),
    **dict.fromkeys(("LCR_MIN", "LCR_PLEDGED"), ("liquidity", 10, 2)),
    "NSFR_MIN": ("funding", 30, 10),
    **dict.fromkeys(("LE_LIMIT", "LE_CONNECTED"), ("exposure", 20, 5)),
}
OPENING = (
    "To {bank}: the report of {date} breaches the law.",
    "{bank}, your figures for {date} do not meet the requirements.",
    "The report of {bank} for {date} shows the breaches above.",
    "We have examined the report of {date} and direct {bank} as follows.",
    "{bank} fell short of its requirements on {date}.",
    "On {date} {bank} did not comply with prudential law.",
    "{bank} is not in compliance as of {date}; we order what follows.",
    "Our review of the {date} figures of {bank} leads to this directive.",
    "To the management of {bank}, on the reference date {date}:",
)
MEASURE = {
    "capital": (
        "Submit a capital plan within {days} days.",
        "A capital plan is due within {days} days.",
        "Send us a plan to raise own funds within {days} days.",
        "Within {days} days present a capital plan.",
        "Own funds must be restored; the plan is due in {days} days.",
        "Raise own funds and report how within {days} days.",
        "We expect your plan for more own funds no later than {days} days from now.",
        "File the steps that rebuild capital in {days} days.",
    ),
    "leverage": (
        "Submit a leverage plan within {days} days.",
        "A leverage plan is due within {days} days.",
        "Send us a plan to reduce leverage within {days} days.",
        "Within {days} days present a leverage plan.",
        "Leverage must come down; the plan is due in {days} days.",
        "Reduce exposure and report how within {days} days.",
        "We expect your plan for less leverage no later than {days} days from now.",
        "File the steps that shrink the balance sheet in {days} days.",
    ),
    "liquidity": (
        "Submit a liquidity plan within {days} days.",
        "A liquidity plan is due within {days} days.",
        "Send us a plan to restore liquidity within {days} days.",
        "Within {days} days present a liquidity plan.",
        "The liquidity buffer must grow; the plan is due in {days} days.",
        "Buy liquid assets and report how within {days} days.",
        "We expect your plan for a larger buffer no later than {days} days from now.",
        "File the steps that refill the buffer in {days} days.",
    ),
    "funding": (
        "Submit a funding plan within {days} days.",
        "A funding plan is due within {days} days.",
        "Send us a plan for stable funding within {days} days.",
        "Within {days} days present a funding plan.",
        "Stable funding must grow; the plan is due in {days} days.",
        "Lengthen your funding and report how within {days} days.",
        "We expect your plan for longer funding no later than {days} days from now.",
        "File the steps that secure stable funding in {days} days.",
    ),
    "exposure": (
        "Reduce the exposure within {days} days.",
        "The exposure must be reduced within {days} days.",
        "Bring the exposure under the limit within {days} days.",
        "Within {days} days cut the exposure to the limit.",
        "The excess must be removed in {days} days.",
        "Sell or cover the excess within {days} days.",
        "We expect the exposure under its limit no later than {days} days from now.",
        "Clear the amount over the limit in {days} days.",
    ),
}
CLOSING = (
    "Report weekly until then.",
    "Report to us every week.",
    "Keep us informed each week.",
    "A weekly report is due until compliance.",
    "Further measures are reserved.",
    "We may order more if this fails.",
    "Tell us each Friday how far you are.",
    "Until it is done, write to us weekly.",
    "More severe steps may follow.",
)
# Below its LCR or NSFR a bank reports by the end of each business day (CRR Art. 414, 428b(3)).
DAILY = ("liquidity", "funding")
DAILY_CLOSING = (
    "Report daily until then.",
    "Report to us every business day.",
    "Keep us informed each day.",
    "A daily report is due until compliance.",
    "Further measures are reserved; report daily.",
    "We may order more if this fails; report each day.",
    "Tell us every evening how far you are.",
    "Until it is done, write to us daily.",
    "Report every day; more severe steps may follow.",
)
CLEAN_OPENING = (
    "To {bank}: the report of {date} meets the requirements.",
    "{bank} met its requirements on {date}.",
    "The report of {bank} for {date} shows no breach.",
    "We examined the report of {date}; {bank} complies.",
    "{bank}, your figures for {date} give no cause for objection.",
    "On {date} {bank} complied with prudential law.",
    "Nothing in the {date} figures of {bank} is to be objected to.",
    "Our review of {bank} as of {date} found no shortfall.",
    "To the management of {bank}: all is in order for {date}.",
)
CLEAN_CLOSING = (
    "No measure is required.",
    "We take no measure.",
    "No action is needed.",
    "There is nothing to do.",
    "No directive is issued.",
    "We order nothing.",
    "You need not act.",
    "This closes our review.",
    "No step is asked of you.",
)


def laptop_checks(report: Report, results: Iterable[RuleResult], findings: Sequence[Finding]) -> list[Check]:
    """One check per ratio that is reported, one for the clients, and one for the note."""
    checks = [_ratio_check(report, result) for result in results if result.state in ("ok", "violated")]
    return checks + [_note_check(report, finding) for finding in findings]


def printed_checks(checks: Iterable[Check]) -> list[dict[str, str]]:
    """Rule, subject, value, limit and article of each violation, as the checks print them."""
    checks, found = list(checks), []
    lifted = {check.verdict.removeprefix("lifts ") for check in checks if check.verdict.startswith("lifts ")}
    for check in checks:
        if check.legal and check.comparison and check.verdict not in lifted:
            value, sign, limit = check.comparison.rpartition(" = ")[2].split()
            limit = f"{'min' if sign == '<' else 'max'} {limit}"
            found.append(
                {"rule": check.verdict, "cell": check.what, "value": value, "limit": limit, "legal": check.legal}
            )
    return found


def _ratio_check(report: Report, result: RuleResult) -> Check:
    """`LCR 93% < 100%: LCR_MIN, CRR Art. 412(1)`. For clients the largest share is compared."""
    what, value = short_label(result.cell), result.known_value
    is_violated = result.state == "violated"
    if is_violated and result.row:
        what = f"Client {result.row}"
    elif result.cell[1] == "*":
        what, value = "Largest client", max(_values(report, result.cell))
    comparison = _comparison(value, result.relation, result.known_limit)
    return Check(
        what, comparison, result.rule_id if is_violated else "met", first_article(result) if is_violated else ""
    )


def _note_check(report: Report, finding: Finding) -> Check:
    """The check of a note: its working, if the figures have to be put together, or that it says nothing of the kind."""
    article = re.split(r"[,;]", finding.legal)[0]
    if finding.kind == "waiver":
        is_lifted = finding.state == "lifted"
        return Check("Waiver" if is_lifted else "Waiver not in force", "", *_lifting(finding, article))
    what = {"pledged": "Pledged assets", "connected": "Connected clients"}[finding.kind]
    if finding.value is None or finding.limit is None:
        return Check(what, "none")
    cell, row = parse_cell(finding.cell)
    known = next(fact.value for fact in report.facts if fact.cell == cell and (not row or row in fact.keys.values()))
    assert isinstance(known, Decimal)
    sign, relation = ("-", "min") if finding.kind == "pledged" else ("+", "max")
    other = _percent(abs(known - finding.value))
    working = f"{_percent(known)} {sign} {other} = {_comparison(finding.value, relation, finding.limit)}"
    is_violated = finding.state == "violated"
    return Check(what, working, finding.rule if is_violated else "met", article if is_violated else "")


def _lifting(finding: Finding, article: str) -> tuple[str, str]:
    return (f"lifts {finding.rule}", article) if finding.state == "lifted" else ("met", "")


def _values(report: Report, cell: CellKey) -> list[Decimal]:
    return [fact.value for fact in report.facts if fact.cell == cell and isinstance(fact.value, Decimal)]


def _comparison(value: Decimal, relation: str, limit: Decimal) -> str:
    """`93% < 100%`, `104% >= 100%`, `26% > 25%` or `25% <= 25%`."""
    sign = (">=" if value >= limit else "<") if relation == "min" else ("<=" if value <= limit else ">")
    return f"{_percent(value)} {sign} {_percent(limit)}"


def _percent(value: Decimal) -> str:
    return format_limit(value, None)


def first_article(result: RuleResult) -> str:
    """The first of the articles that a finding cites, as compact answers print it."""
    return re.split(r"[,;]", result.legal)[0]


def laptop_measures(violated: Sequence[RuleResult]) -> list[dict]:
    """What the letter demands, by subject: the shortest deadline of its findings, in days."""
    days: dict[str, int] = {}
    for result in violated:
        subject, usual, short = MEASURES[result.rule_id]
        gap = abs(result.known_value - result.known_limit) / result.known_limit
        days[subject] = min(days.get(subject, usual), short if gap > Decimal("0.1") else usual)
    return [{"subject": subject, "deadline_days": deadline} for subject, deadline in days.items()]


def laptop_letter(
    violated: Sequence[RuleResult], bank: Addressee, date: str, variant: int = 0, held_out: bool = False
) -> str:
    """The letter on a report with reference date `date`, in wording `variant`."""
    choose = Wordings(random.Random(f"letter {bank.entity} {date} {variant}"), held_out)
    names = {"bank": bank.name, "date": long_date(date)}
    if not violated:
        return f"{choose(CLEAN_OPENING)} {choose(CLEAN_CLOSING)}".format(**names)
    demanded = laptop_measures(violated)
    measures = [choose(MEASURE[one["subject"]]).format(days=one["deadline_days"]) for one in demanded]
    closing = DAILY_CLOSING if any(one["subject"] in DAILY for one in demanded) else CLOSING
    return " ".join([choose(OPENING).format(**names), *measures, choose(closing)])
