"""Derive findings from the facts of a bank's note, by arithmetic and law.

The model or a person reads the facts from the note; this module reads no words. A fact that applies on the reference date
has these consequences:

- `pledged`, `own_shares`, `profit`: the reported figure is wrong by the amount and must be filed again, whether or not a
  limit is missed: PLEDGED_COUNTED (Delegated Reg. (EU) 2015/61 Art. 7(2)), OWN_SHARES_COUNTED (CRR Art. 36(1)(f), 28(1)(b)),
  PROFIT_COUNTED (CRR Art. 26(2)). A requirement that is missed without the amount is a second finding: LCR_PLEDGED for
  liquidity, and for capital the most severe requirement that is missed: the minimum (`..._MIN`), TSCR (`..._TSCR`) or the
  overall requirement (OWN_SHARES, INTERIM_PROFIT).
- `connected`: LE_CONNECTED if the exposures to the clients together are above the limit (CRR Art. 395(1)).
- `waiver`: LCR_MIN is lifted (CRR Art. 8), and so is LCR_PLEDGED.

A fact that does not apply changes nothing. The effect of lower Tier 1 capital on the leverage ratio and on large exposures
is not computed; it shows in the report that the bank files again.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

from xbrl.read.filed_report import CellKey, Report
from xbrl.read.render import cell_name, round_beside
from xbrl.rules.findings import Finding
from xbrl.rules.reported_figures import Figures, Key, index_facts, read_figure, recompute, row_keys
from xbrl.rules.rules import RuleResult

KINDS = ("pledged", "own_shares", "profit", "connected", "waiver")
COUNTED = {"pledged": "PLEDGED_COUNTED", "own_shares": "OWN_SHARES_COUNTED", "profit": "PROFIT_COUNTED"}
CAPITAL = {"own_shares": "OWN_SHARES", "profit": "INTERIM_PROFIT"}
BUFFER, OUTFLOW, LCR = (("C_76.00.a", row, "c0010") for row in ("r0010", "r0020", "r0030"))
CET1, TREA = ("C_01.00", "r0020", "c0010"), ("C_02.00.a", "r0010", "c0010")
COMBINED_BUFFER = ("C_04.00", "r0740", "c0010")
# Ratio -> numerator, minimum (CRR Art. 92(1)), rows of TSCR and of the overall requirement in C 03.00, name in rules
LEGS = {
    "r0010": (CET1, Decimal("0.045"), "r0140", "r0170", "CET1"),
    "r0030": (("C_01.00", "r0015", "c0010"), Decimal("0.06"), "r0150", "r0180", "T1"),
    "r0050": (("C_01.00", "r0010", "c0010"), Decimal("0.08"), "r0130", "r0160", "TC"),
}
# End of a note rule's id -> template for the rule on the same limit
LIMIT_RULES = {"_MIN": "{}_MIN", "_TSCR": "TSCR_{}", "": "OCR_{}"}
SHARE, NAME, TYPE = ("C_28.00", "*", "c350"), ("C_27.00", "*", "c021"), ("C_27.00", "*", "c070")
INSTITUTION, LIMIT_FOR_INSTITUTIONS = "qx2056", ("C_26.00", "r030", "c010")
LARGEST_SHARE = Decimal("0.25")  # of Tier 1, CRR Art. 395(1)
# Amounts and percentages as people write them: EUR 85 million, 85,000,000, 85 Mio. EUR, TEUR 85.000, 39,5 Millionen Euro.
POWERS = {
    **dict.fromkeys(("t", "k", "thousand", "tsd", "tausend"), 3),
    **dict.fromkeys(("m", "mn", "mio", "million", "millions", "millionen"), 6),
    **dict.fromkeys(("bn", "mrd", "billion", "milliarde", "milliarden"), 9),
}
NUMBER = r"\d{1,3}(?:[.,'’ \u00a0\u202f]\d{3})+(?:[.,]\d+)?|\d+(?:[.,]\d+)?"
SCALE = "|".join(sorted(POWERS, key=len, reverse=True))
AMOUNT = re.compile(
    rf"(?<![\w.,])(?:(?P<before>{SCALE})?(?:EUR|€|euros?) ?)?(?P<number>{NUMBER})(?:[ \u00a0-]?(?P<after>{SCALE})\b)?",
    re.IGNORECASE,
)
ONES = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
EINER = "ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn neunzehn"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
ZEHNER = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig"
WORDS = {"eine": 1} | {word: number for words in (ONES, EINER) for number, word in enumerate(words.split(), start=1)}
for ten, (english, german) in enumerate(zip(TENS.split(), ZEHNER.split(), strict=True), start=2):
    WORDS |= {english: 10 * ten, german: 10 * ten}
    WORDS |= {f"{english}-{word}": 10 * ten + number for number, word in enumerate(ONES.split()[:9], start=1)}
    WORDS |= {f"{word}und{german}": 10 * ten + number for number, word in enumerate(EINER.split()[:9], start=1)}
IN_WORDS = re.compile(rf"(?<![\w-])({'|'.join(WORDS)}) ({SCALE})\b", re.IGNORECASE)
PERCENTAGE = re.compile(rf"(?<![\w.,])({NUMBER})[ \u00a0]?(?:%|per ?cent\b|Prozent\b)", re.IGNORECASE)


@dataclass(frozen=True)
class NoteFact:
    """A fact that a note states. `applies`: whether it holds on the reference date and matters in law."""

    kind: str  # a member of KINDS
    applies: bool
    amount: Decimal | None  # EUR; None if the note gives no amount
    who: tuple[str, ...] = ()  # the other party; for `connected` the clients, by name or code
    since: str = ""  # the day from which it holds (YYYY-MM-DD), if the note names it
    quote: str = ""  # the words of the note that prove it


@dataclass(frozen=True)
class Step:
    """One step of the derivation: a figure without the amount, or a figure without the amount compared with a limit.

    In a rule `..._COUNTED`, `value` is the reported figure and `limit` the figure without the amount; each is None if unknown.
    In other rules `parts` are the figures from which `value` is computed: (remaining liquid assets, outflow); (capital, amount,
    remaining capital, risk exposure); or the shares of the clients.
    """

    rule: str
    kind: str  # kind of the fact
    cell: CellKey
    value: Decimal | None
    limit: Decimal | None
    is_missed: bool = True
    parts: tuple[Decimal, ...] = ()
    row: str = ""  # key of the row in an open table


def consequences(report: Report, results: Sequence[RuleResult], facts: Iterable[NoteFact]) -> list[Finding]:
    """Return the findings that follow from the facts, "violated" or "lifted" as in findings.csv, in the order of `KINDS`.

    `results` are the engine's results on the same report. `undecided` returns the consequences that could not be computed.
    """
    facts, case = list(facts), (report.entity.partition(".")[0], report.period)
    findings = [
        Finding(*case, step.rule, "violated", cell_name(step.cell, step.row), step.value, step.limit, kind=step.kind)
        for step in steps(report, facts)
        if isinstance(step, Step) and step.is_missed
    ]
    if is_waived(facts) and any(result.rule_id == "LCR_MIN" and result.state == "violated" for result in results):
        findings.append(Finding(*case, "LCR_MIN", "lifted", cell_name(LCR), legal="CRR Art. 8", kind="waiver"))
    return findings


def undecided(report: Report, facts: Iterable[NoteFact]) -> list[str]:
    """Return one sentence, beginning with the rule, for each consequence that the report's figures leave open, and why."""
    return [step for step in steps(report, facts) if isinstance(step, str)]


def is_waived(facts: Iterable[NoteFact]) -> bool:
    """Return whether the bank need not meet the liquidity coverage requirement."""
    return any(fact.kind == "waiver" and fact.applies for fact in facts)


def steps(report: Report, facts: Iterable[NoteFact]) -> Iterator[Step | str]:
    """Yield the steps that follow from the facts, in the order of `KINDS`; a sentence where the figures leave a rule open."""
    figures = index_facts(report)
    applying = [fact for fact in dict.fromkeys(facts) if fact.applies]
    amounts = {kind: [fact.amount for fact in applying if fact.kind == kind] for kind in COUNTED}
    for kind in (kind for kind in COUNTED if amounts[kind]):
        counting = BUFFER if kind == "pledged" else CET1
        deducted = ("pledged",) if kind == "pledged" else tuple(CAPITAL)  # kinds that reduce the same ratio
        reported, own = amount_in(figures, counting), _total(amounts[kind])
        total = _total([amount for deducted_kind in deducted for amount in amounts[deducted_kind]])
        why = _why_unknown(figures, counting, own)
        without = None if reported is None or own is None or why else reported - own
        yield Step(COUNTED[kind], kind, counting, reported, without)
        if why or total is None:
            yield f"{COUNTED[kind]}: {why or 'another amount is not stated'}; what is left is not known"
        elif kind != "pledged":
            yield from _capital(figures, kind, total)
        elif not is_waived(applying):
            remaining, outflow = (reported or Decimal(0)) - total, amount_in(figures, OUTFLOW)
            if not outflow or outflow < 0:
                yield f"LCR_PLEDGED: {cell_name(OUTFLOW)} is not reported or not above 0"
            else:
                yield _ratio_step("LCR_PLEDGED", kind, LCR, Decimal(1), (remaining, outflow))
    for fact in (fact for fact in applying if fact.kind == "connected"):
        connected = connected_shares(figures, fact)
        if isinstance(connected, str):
            yield connected
        else:
            by_row, limit = connected
            shares = tuple(share for _, share in by_row)
            total = sum(shares, Decimal(0))
            yield Step("LE_CONNECTED", fact.kind, SHARE, total, limit, total > limit, shares, row=by_row[0][0])


def _ratio_step(rule: str, kind: str, cell: CellKey, limit: Decimal, parts: tuple[Decimal, ...]) -> Step:
    """Compare a ratio, the second last of `parts` divided by the last, with its minimum."""
    ratio = parts[-2] / parts[-1]
    return Step(rule, kind, cell, round_beside(ratio, limit)[0], limit, ratio < limit, parts)


def amount_in(figures: Figures, cell: CellKey) -> Decimal | None:
    """Return the reported number of a cell; None if the report has none."""
    value = read_figure(figures, cell).value
    return value if isinstance(value, Decimal) else None


def _total(amounts: Sequence[Decimal | None]) -> Decimal | None:
    """Return the sum, or None if an amount is unknown."""
    return None if None in amounts else sum((amount for amount in amounts if amount is not None), Decimal(0))


def _why_unknown(figures: Figures, cell: CellKey, amount: Decimal | None) -> str:
    """Return why the figure without the amount is unknown; "" if it can be computed."""
    figure, reported = read_figure(figures, cell), amount_in(figures, cell)
    if amount is None:
        return "the note states no amount"
    if reported is None:
        return f"{cell_name(cell)} is {figure.source}"
    if figure.unit not in ("iso4217:EUR", "EUR"):
        return f"the amount is in EUR and {cell_name(cell)} in {str(figure.unit).removeprefix('iso4217:')}"
    return f"the amount is larger than {cell_name(cell)}" if amount > reported else ""


def _capital(figures: Figures, kind: str, amount: Decimal) -> Iterator[Step | str]:
    """Compare the capital ratios without the amount with one requirement. Yield the steps up to the first missed ratio.

    The requirement is the most severe one that is missed, or the last one if all are met. The legal order is minimum, TSCR,
    overall requirement; within an order CET1 comes first, then Tier 1, then total capital.
    """
    trea, rule = amount_in(figures, TREA), CAPITAL[kind]
    if not trea or trea < 0:
        yield f"{rule}: {cell_name(TREA)} is not reported or not above 0"
        return
    last: list[Step] = []
    for order, suffix in enumerate(LIMIT_RULES):
        level = []
        for row, (numerator, minimum, tscr, overall, _) in LEGS.items():
            capital = amount_in(figures, numerator)
            limit = (minimum, _ratio(figures, tscr), _overall(figures, tscr, overall, trea))[order]
            if capital is None and suffix == "_MIN":
                yield f"{rule}: {cell_name(numerator)} is not reported"
            if capital is not None and limit is not None:
                parts = (capital, amount, capital - amount, trea)
                level.append(_ratio_step(rule + suffix, kind, ("C_03.00", row, "c0010"), limit, parts))
                if level[-1].is_missed:
                    yield from level
                    return
        last = level or last
    yield from last


def limit_rule(result: RuleResult) -> str:
    """Return the engine's rule on the same limit: `TSCR_T1` for OWN_SHARES_TSCR on the Tier 1 ratio; else the finding's own.

    A finding OWN_SHARES... or INTERIM_PROFIT... concerns the CET1, the Tier 1 or the total capital ratio, as its cell tells.
    """
    for rule in CAPITAL.values():
        order = result.rule_id.removeprefix(rule)
        if result.rule_id.startswith(rule) and order in LIMIT_RULES and result.cell[1] in LEGS:
            return LIMIT_RULES[order].format(LEGS[result.cell[1]][-1])
    return result.rule_id


def _ratio(figures: Figures, row: str) -> Decimal | None:
    return amount_in(figures, ("C_03.00", row, "c0010"))


def _overall(figures: Figures, tscr: str, overall: str, trea: Decimal) -> Decimal | None:
    """Return the reported overall requirement, or else TSCR plus the combined buffer (CRD Art. 141a); None if unknown."""
    reported, share, buffer = _ratio(figures, overall), _ratio(figures, tscr), amount_in(figures, COMBINED_BUFFER)
    if reported is not None or share is None or buffer is None:
        return reported
    return share + buffer / trea


def connected_shares(figures: Figures, fact: NoteFact) -> tuple[list[tuple[str, Decimal]], Decimal] | str:
    """Return ([(row, share of Tier 1) per client], limit for their sum), or a sentence why the report does not have them.

    A group with an institution has the bank's limit for institutions if that is higher, provided that its other members
    together stay within 25% of Tier 1.
    """
    keys = {key: client for client in fact.who for key in [_row_of(figures, client)] if key is not None}
    missing = [client for client in fact.who if client not in keys.values()]
    if missing or len(keys) < 2:
        reason = f"{missing[0]} has no row in C 28.00" if missing else "the note does not name two clients of C 28.00"
        return f"LE_CONNECTED: {reason}"
    shares, of_non_institutions, limit = [], Decimal(0), LARGEST_SHARE
    for key in keys:
        share = read_figure(figures, SHARE, key)
        share = recompute(figures, SHARE, key, figures.tables) if share.source == "not reported" else share
        if not isinstance(share.value, Decimal):
            return f"LE_CONNECTED: {cell_name(SHARE, share.row)} is {share.source}"
        shares.append((share.row, share.value))
        if str(read_figure(figures, TYPE, key).value).endswith(INSTITUTION):
            limit = max(limit, amount_in(figures, LIMIT_FOR_INSTITUTIONS) or limit)
        else:
            of_non_institutions += share.value
    return shares, limit if of_non_institutions <= LARGEST_SHARE else LARGEST_SHARE


def amounts_in(text: str) -> list[Decimal]:
    """Return the amounts that a text may state, the largest first. A number with one separator may have two readings."""
    amounts = set()
    for match in AMOUNT.finditer(text):
        power = POWERS.get((match["before"] or match["after"] or "").casefold(), 0)
        amounts |= {number.scaleb(power).normalize() for number in _readings(match["number"])}
    for word, scale in IN_WORDS.findall(text):
        amounts.add(Decimal(WORDS[word.casefold()]).scaleb(POWERS[scale.casefold()]).normalize())
    return sorted((amount for amount in amounts if amount >= 1000), reverse=True)


def percentages_in(text: str) -> set[Decimal]:
    """Return the percentages that a text may state, as fractions."""
    return {number.scaleb(-2) for match in PERCENTAGE.finditer(text) for number in _readings(match[1])}


def _readings(printed: str) -> set[Decimal]:
    """Read a number with the decimal point, and with the decimal comma. Return the readings in which all groups have three digits."""
    digits = re.sub(r"['’ \u00a0\u202f]", "", printed)
    marks = [
        mark for mark, point in (",.", ".,") if re.fullmatch(rf"(\d{{1,3}}(\{mark}\d{{3}})+|\d+)(\{point}\d+)?", digits)
    ]
    return {Decimal(digits.replace(mark, "").replace(",", ".")) for mark in marks}


def clients_in(figures: Figures, text: str) -> list[str]:
    """Return the clients of C 28.00 whose code, or whose name in C 27.00, stands in a text."""
    clients = []
    for key in row_keys(figures, (SHARE, ("C_28.00", "*", "c330"))):
        name = read_figure(figures, NAME, key).value
        names = [member for _, member in key] + ([name] if isinstance(name, str) else [])
        clients += [member for member in names if stands_in(member, text)][:1]
    return clients


def stands_in(name: str, text: str) -> bool:
    """Return whether a name stands in a text as whole words, in any case."""
    return bool(name) and bool(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE))


def _row_of(figures: Figures, client: str) -> Key | None:
    """Find the row of a client in C 28.00, by its code or by its name in C 27.00."""
    for key in row_keys(figures, (SHARE, ("C_28.00", "*", "c330"))):
        name = read_figure(figures, NAME, key).value
        texts = [member for _, member in key] + ([name] if isinstance(name, str) else [])
        if _normalized(client) in map(_normalized, texts):
            return key
    return None


def _normalized(name: str) -> str:
    """Remove case, spaces and punctuation from a name."""
    return "".join(character for character in name.casefold() if character.isalnum())
