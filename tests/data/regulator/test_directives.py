"""Letters: their parts, and how severity, repetition, the type of the bank and triggers change them."""

import dataclasses
import string
from decimal import Decimal

import pytest

from data.regulator import phrases
from data.regulator.directives import Context, severity, write_directive
from data.regulator.render import Addressee
from data.regulator.rules import RuleResult, built_in_rules

BANK = Addressee("LEI", "Nordhaven Bank", "FI", "savings bank")
RULES = {rule.id: rule for rule in built_in_rules()}
EURO = {"unit": "iso4217:EUR", "decimals": -3}


def result(rule_id, value, limit, **more):
    """A violated result of a rule."""
    rule = RULES[rule_id]
    base = {"unit": "xbrli:pure", "decimals": 4, "state": "violated"}
    fields = base | more
    return RuleResult(
        rule_id, rule.kind, cell=rule.cells[0], value=Decimal(value), limit=Decimal(limit),
        relation=rule.formula.relation, legal=rule.legal, **fields,
    )  # fmt: skip


CET1 = result("CET1_MIN", "0.0430", "0.045")
SUM = result("OF_SUM", 90_001_000, 92_000_000, **EURO)


def letters(violated, count=30, bank=BANK, context=Context(), held_out=False):  # noqa: B008
    return [
        write_directive(violated, bank, "2026-03-31", "full", context, variant, held_out) for variant in range(count)
    ]


def test_a_letter_has_all_its_parts():
    for letter in letters([CET1, SUM]):
        for part in (
            "Nordhaven Bank",
            "Board of Managing Directors",
            "31 March 2026",
            "4.30%",
            "4.5%",
            "CRR Art. 92(1)(a)",
        ):
            assert part in letter
        for part in ("C 01.00 r0010 c0010", "92000 thousand", "Article 430 CRR", "Articles 102 and 104(1) CRD"):
            assert part in letter
        assert "\n1. " in letter and "\n2. " in letter and "\n- " in letter
        assert "within one month" in letter and "within ten working days" in letter
        assert "month" in letter.splitlines()[-1] or "monthly" in letter.splitlines()[-1]
    assert len(set(letters([CET1, SUM]))) == 30
    assert letters([CET1]) == letters([CET1])


def test_letters_on_every_rule_have_no_unfilled_placeholders():
    amounts = {"OUTPUT_FLOOR", "FX_12_5", "FX_XTAB"}
    for rule in RULES.values():
        if rule.kind == "trigger":
            continue
        money = rule.id in amounts or rule.cells[0][0] in ("C_01.00", "C_04.00", "F_01.01", "F_01.03", "C_84.00.d")
        values = ("1000000", "2000000", EURO) if money else ("0.02", "0.03", {})
        for missing in (False, True) if rule.kind == "filing" else (False,):
            row = "SYNC00ABCDEFGHIJKL12" if rule.cells[0][1] == "*" else ""
            one = result(rule.id, *values[:2], **values[2], row=row, missing=missing)
            for letter in letters([one], 12):
                assert "{" not in letter and "  " not in letter and "None" not in letter
                assert (row in letter) or not row
                assert all(
                    line and line[0] in string.ascii_uppercase + string.digits + "-" for line in letter.splitlines()
                )


def test_all_wordings_are_used():
    training, test = ("\n".join(letters([CET1], 200, held_out=held_out)) for held_out in (False, True))
    for place, sentence in enumerate(phrases.BASIS):
        start = sentence.partition("{power}")[0].strip()[:20]
        # The last third is held out for the tests.
        assert (start in training, start in test) == (place < 6, place >= 6), sentence


def test_short_letters():
    short = write_directive([CET1], BANK, "2026-03-31", "short")
    assert short == "Nordhaven Bank must restore CET1 ratio to 4.5% and file a capital plan within 30 days."
    own = result("TSCR_CET1", "0.0430", "0.0562")
    lcr = result("LCR_MIN", "0.9", "1")
    assert write_directive([CET1, own, lcr], BANK, "2026-03-31", "short") == (
        "Nordhaven Bank must restore CET1 ratio to 5.62% and LCR to 100% and file a capital plan and a liquidity plan within 10 days."
    )
    assert "No measure" in write_directive([], BANK, "2026-03-31", "short")


def test_severity_follows_the_shortfall():
    grades = [severity([result("CET1_MIN", value, "0.045")]) for value in ("0.0440", "0.0430", "0.0404", "-0.01")]
    assert grades == ["minor", "moderate", "serious", "serious"]
    assert severity([result("OCR_TC", "0.05", "0.13")]) == "moderate"  # banks may draw on their buffers
    assert severity([SUM]) == "minor"


@pytest.mark.parametrize(
    ("value", "deadline"), [("0.0440", "two months"), ("0.0430", "one month"), ("0.03", "five working days")]
)
def test_deadlines_follow_severity_and_repetition(value, deadline):
    one = result("CET1_MIN", value, "0.045")
    assert all(f"within {deadline}" in letter for letter in letters([one]))
    again = Context(repeated={"CET1_MIN": 1})
    shorter = {"two months": "one month", "one month": "five working days"}.get(deadline, deadline)
    for letter in letters([one], context=again):
        assert f"within {shorter}" in letter
        assert any(sentence in letter for sentence in phrases.PERSISTS)
        assert any(sentence in letter for sentence in phrases.REPEATED[1])


def test_severe_letters_depend_on_the_type_of_bank():
    one = result("CET1_MIN", "0.03", "0.045")
    cooperative = dataclasses.replace(BANK, type="cooperative bank")
    assert all("member shares" in letter for letter in letters([one], 10, cooperative))
    assert not any("member shares" in letter for letter in letters([one], 10))


def test_the_trend_names_the_previous_figure():
    cell = CET1.cell
    for before, words in (("0.05", phrases.TREND["fell"]), ("0.02", phrases.TREND["rose"])):
        shown = f"{Decimal(before) * 100:.2f}%"
        for letter in letters([CET1], 10, context=Context(previous={cell: Decimal(before)})):
            assert any(sentence.format(before=shown) in letter for sentence in words)


def test_triggers_are_mentioned_but_are_not_violations():
    large = tuple(result("LE_DEF", "0.12", "0.1", state="triggered", row=name) for name in "AB")
    context = Context(triggers=(*large, result("FX_DEMIN", 500_000, 240_000, state="triggered", **EURO)))
    for letter in [*letters([], context=context), *letters([CET1], context=context)]:
        assert "2 exposures" in letter and "CRR Art. 392" in letter and "CRR Art. 351" in letter
        assert "10%" in letter


def test_a_letter_without_findings_names_the_tightest_margin():
    margins = (result("LCR_MIN", "1.5", "1", state="ok"), result("CET1_MIN", "0.0455", "0.045", state="ok"))
    context = Context(margins=margins, previous={margins[0].cell: Decimal("1.4")}, templates=("C_03.00", "C_76.00"))
    found = letters([], 60, context=context)
    assert all("CET1 ratio" in letter and "4.5%" in letter and "140.00%" in letter for letter in found)
    assert len(set(found)) >= 55
    assert not any("Measures" in letter or "{" in letter for letter in found)
