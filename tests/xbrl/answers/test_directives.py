"""Letters: their parts, and how severity, repetition, the type of the bank and triggers change them."""

import dataclasses
import string
from decimal import Decimal

import pytest

from xbrl.answers import phrases
from xbrl.answers.directives import Context, required_measures, write_directive
from xbrl.read.render import Addressee
from xbrl.rules.figures import Figure
from xbrl.rules.law_check import BELITTLING
from xbrl.rules.measures import DEADLINES, ORDERS, REQUIREMENTS, plan_measures, requirement_of, severity, urgency
from xbrl.rules.rules import RuleResult, built_in_rules

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
    return [write_directive(violated, bank, "2026-03-31", context, variant, held_out) for variant in range(count)]


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
        assert "\n1. " in letter and "\n2. " in letter and letter.count("\n- ") == 3
        assert "within seven working days" in letter and "within ten working days" in letter
        assert any(word in letter.splitlines()[-1] for word in ("week", "Monday"))
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


def test_a_ratio_whose_row_is_left_out_is_said_to_be_computed():
    rule = RULES["LCR_MIN"]
    buffer, outflow = (
        Figure(("C_76.00.a", row, "c0010"), "", Decimal(value), "iso4217:EUR", -4, "reported")
        for row, value in (("r0010", 750_000), ("r0020", 1_000_000))
    )
    ratio = Figure(rule.cells[0], "", Decimal("0.75"), "xbrli:pure", 4, "recomputed", (buffer, outflow))
    computed = result("LCR_MIN", "0.75", "1", inputs=(ratio,))
    parts = "C 76.00.a r0010 c0010 and C 76.00.a r0020 c0010"
    for held_out in (False, True):
        for letter in letters([computed], held_out=held_out):
            assert parts in letter and "C 76.00.a r0030 c0010" in letter
            assert "75.00%" in letter and "100%" in letter and "CRR Art. 412(1)" in letter
            assert "c0010 shows" not in letter and "You report" not in letter
    too_coarse = dataclasses.replace(computed, inputs=(dataclasses.replace(ratio, filed=ratio),))
    assert not any(parts in letter for letter in letters([too_coarse]))


def test_a_sum_that_lacks_one_part_names_the_part():
    total, tier1, tier2 = (
        Figure(("C_01.00", row, "c0010"), "", value, "iso4217:EUR", -3, source)
        for row, value, source in (
            ("r0010", Decimal(92_000_000), "reported"),
            ("r0015", Decimal(90_001_000), "reported"),
            ("r0750", None, "read as 0"),
        )
    )
    one = result("OF_SUM", 92_000_000, 90_001_000, **EURO, inputs=(total, tier1, tier2))
    for held_out in (False, True):
        for letter in letters([one], held_out=held_out):
            (finding,) = [line for line in letter.splitlines() if line.startswith("1. ")]
            assert all(part in finding for part in ("C 01.00 r0750 c0010", "C 01.00 r0010 c0010", "CRR Art. 72"))
            assert "92000 thousand" in finding and "90001 thousand" in finding
    # The missing part does not explain a sum that is too small; of two missing parts either may be the error.
    too_small = dataclasses.replace(one, value=Decimal(89_000_000))
    two_missing = dataclasses.replace(one, inputs=(total, dataclasses.replace(tier1, source="read as 0"), tier2))
    for other in (too_small, two_missing):
        assert not any("r0750" in letter or "r0015" in letter for letter in letters([other]))


P1, P2, BUFFER = (
    result("TC_MIN", "0.0799", "0.08"),
    result("TSCR_TC", "0.0900", "0.10"),
    result("OCR_TC", "0.10", "0.135"),
)


def test_severity_follows_the_legal_order_and_not_the_size():
    for value in ("0.0449", "0.0430", "0.03", "-0.01"):
        assert severity([result("CET1_MIN", value, "0.045")]) == "pillar1"
    assert severity([P2]) == "pillar2" and severity([BUFFER]) == "buffer" and severity([SUM]) == "filing"
    assert severity([SUM, BUFFER, P2]) == "pillar2" and severity([BUFFER, P1, SUM]) == "pillar1"
    assert [severity([result(f"{rule}_{leg}", "0.05", "0.09")]) for rule in ("OCR", "CBR") for leg in ("CET1", "T1")] == ["buffer"] * 4  # fmt: skip
    assert ORDERS == ("filing", "buffer", "pillar2", "pillar1")
    assert all(REQUIREMENTS[rule.id].order in ORDERS for rule in RULES.values() if rule.kind == "breach")


def test_size_and_duration_grade_within_an_order():
    one = [result("CET1_MIN", value, "0.045") for value in ("0.0440", "0.0430", "0.0404")]
    assert [urgency([each], {}) for each in one] == [0, 1, 2]
    assert [urgency([one[0]], {"CET1_MIN": times}) for times in (1, 2, 3)] == [1, 2, 2]
    for (subject, order), days in DEADLINES.items():
        assert days[0] >= days[1] >= days[2], (subject, order)
    errors = [SUM, *(result(rule, 1_000_000, 1_000_001, **EURO) for rule in ("T1_SUM", "FX_XTAB", "FIN_PL"))]
    assert [required_measures(errors[:count])[0]["deadline_days"] for count in (1, 2, 3, 4)] == [10, 5, 3, 3]
    for subject in ("capital", "leverage"):  # a graver order never has a longer deadline, whatever the size
        assert min(DEADLINES[subject, "pillar2"]) >= max(DEADLINES[subject, "pillar1"])


@pytest.mark.parametrize(
    ("value", "days", "words"), [("0.0449", 10, "ten"), ("0.0430", 7, "seven"), ("0.03", 5, "five")]
)
def test_deadlines_follow_severity_and_repetition(value, days, words):
    one = result("CET1_MIN", value, "0.045")
    expected = [{"subject": "capital", "deadline_days": days}, {"subject": "distributions", "deadline_days": 5}]
    assert required_measures([one]) == expected
    assert all(f"within {words} working days" in letter for letter in letters([one]))
    again = Context(repeated={"CET1_MIN": 1})
    shorter = {10: 7, 7: 5}.get(days, days)
    assert required_measures([one], again)[0] == {"subject": "capital", "deadline_days": shorter}
    for letter in letters([one], context=again):
        assert f"within {phrases.WORKING_DAYS[shorter]} working days" in letter
        assert any(sentence in letter for sentence in phrases.PERSISTS)
        assert any(sentence in letter for sentence in phrases.REPEATED[1])


def test_a_breach_of_pillar_1_is_never_a_small_matter():
    minima = [
        rule_id for rule_id, requirement in REQUIREMENTS.items() if requirement.order == "pillar1" and rule_id in RULES
    ]
    assert len(minima) == 8
    for rule_id in minima:
        smallest = result(rule_id, "0.2501", "0.25") if rule_id == "LE_LIMIT" else result(rule_id, "0.2499", "0.25")
        for times in (0, 1, 2, 3):
            for letter in letters([smallest, SUM], 12, context=Context(repeated={rule_id: times})):
                assert not any(words in letter for words in BELITTLING), letter
                assert "We expect no repetition" not in letter


def test_a_missed_buffer_names_its_consequences():
    for rule_id in ("OCR_CET1", "OCR_T1", "OCR_TC", "CBR_CET1", "CBR_T1"):
        missed = result(rule_id, "0.08", "0.09")
        assert required_measures([missed]) == [{"subject": "distributions", "deadline_days": 5}]
        for letter in letters([missed], 12):
            assert "CRD Art. 141a" in letter and "CRD Art. 142" in letter and "CRD Art. 141" in letter
            assert "maximum distributable amount" in letter and "capital conservation plan" in letter
            assert "within five working days" in letter
            assert "recapitalis" not in letter and "weekly" not in letter
    for letter in letters([result("LR_OLRR", "0.032", "0.035")], 12):
        assert "CRD Art. 141b" in letter and "CRD Art. 142" in letter


def test_the_letter_demands_exactly_the_required_measures():
    violated = [SUM, result("LCR_MIN", "0.9", "1"), P2, BUFFER, result("LE_LIMIT", "0.3", "0.25", row="CLIENT")]
    measures = required_measures(violated)
    assert measures == [
        {"subject": "liquidity", "deadline_days": 3},
        {"subject": "exposure", "deadline_days": 5},
        {"subject": "capital", "deadline_days": 15},
        {"subject": "distributions", "deadline_days": 5},
        {"subject": "filing", "deadline_days": 10},
    ]
    for letter in letters(violated, 12):
        demands = [line for line in letter.splitlines() if line.startswith("- ")]
        assert len(demands) == len(measures)
        for demand, measure in zip(demands, measures, strict=True):
            days = phrases.WORKING_DAYS[measure["deadline_days"]]
            assert demand.count("working days") == 1 and f"within {days} working days" in demand
        assert "daily" in letter or "every business day" in letter  # CRR Art. 414
    assert required_measures([]) == []


def test_one_figure_that_misses_several_limits_is_one_finding():
    missed = [P1, result("TSCR_TC", "0.0799", "0.10"), result("OCR_TC", "0.0799", "0.135")]
    for letter in letters(missed, 12):
        (finding,) = [line for line in letter.splitlines() if line[0].isdigit()]
        for part in ("8%", "10%", "13.5%", "CRR Art. 92(1)(c)", "CRD Art. 104(1)(a)", "CRD Art. 141a(c)"):
            assert part in finding
    (capital, distributions) = plan_measures(missed, {})
    assert (capital.order, distributions.order) == ("pillar1", "buffer")


def test_findings_of_notes_are_written_with_and_without_figures():
    base = dataclasses.replace(result("LCR_MIN", "0.95", "1"), rule_id="LCR_PLEDGED", kind="note")
    pledged = dataclasses.replace(base, legal="Delegated Reg. (EU) 2015/61 Art. 7(2)")
    late = dataclasses.replace(
        pledged, rule_id="LATE", cell=("", "*", ""), value=None, limit=None, legal="ITS (EU) 2024/3117 Art. 3"
    )
    assert requirement_of(pledged)[:2] == ("liquidity", "pillar1")
    assert requirement_of(late)[:2] == ("filing", "filing")
    for letter in letters([pledged, late], 12):
        assert "95.00%" in letter and "Art. 7(2)" in letter and "Art. 3" in letter
        assert "None" not in letter and "{" not in letter
    owned = dataclasses.replace(pledged, rule_id="OWN_SHARES", cell=("C_03.00", "r0010", "c0010"), value=None)
    assert requirement_of(owned)[:2] == ("capital", "buffer")


@pytest.mark.parametrize("violated", [[], [CET1], [SUM], [BUFFER], [P1, P2, BUFFER, SUM]])
def test_eight_variants_are_eight_letters(violated):
    for start in (0, 5):
        for bank in (BANK, dataclasses.replace(BANK, entity="OTHER")):
            written = {
                write_directive(violated, bank, "2026-06-30", variant=variant) for variant in range(start, start + 8)
            }
            assert len(written) == 8


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
    guidance = result("P2G_TC", "0.14", "0.15", state="triggered")
    other = result("LE_GSII", "0.2", "0.15", state="triggered", row="SYNC00OTHER")
    currency = result("FX_DEMIN", 500_000, 240_000, state="triggered", **EURO)
    context = Context(triggers=(*large, other, currency, guidance))
    for letter in [*letters([], context=context), *letters([CET1], context=context)]:
        assert "2 exposures" in letter and "CRR Art. 392" in letter and "CRR Art. 351" in letter
        assert "10%" in letter
        assert "CRD Art. 104b" in letter and "15%" in letter and "SYNC00OTHER" in letter


def test_a_letter_without_findings_names_the_tightest_margin():
    margins = (result("LCR_MIN", "1.5", "1", state="ok"), result("CET1_MIN", "0.0455", "0.045", state="ok"))
    context = Context(margins=margins, previous={margins[0].cell: Decimal("1.4")}, templates=("C_03.00", "C_76.00"))
    found = letters([], 60, context=context)
    assert all("CET1 ratio" in letter and "4.5%" in letter and "140.00%" in letter for letter in found)
    assert len(set(found)) >= 55
    assert not any("Measures" in letter or "{" in letter for letter in found)
