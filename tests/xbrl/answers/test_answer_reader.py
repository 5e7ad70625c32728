"""The reader of answers, and the figures and citations in them."""

from decimal import Decimal

import pytest

from xbrl.answers.answer_reader import Answer, Claim, parse_answer, read_line
from xbrl.answers.statements import articles, parse_quantity, quantities

LCR = "LCR_MIN | C 76.00.a r0030 c0010 | 93.10% | min 100% | CRR Art. 412(1); Delegated Reg. (EU) 2015/61 Art. 4(2)"
SUM = "OF_SUM | C 01.00 r0010 c0010 | 90001 thousand | expected 92000 thousand | CRR Art. 72"
ANSWER = f"Violations:\n{LCR}\n{SUM}\nDirective:\nTo the Board.\nDo it."


def test_an_answer_is_read_into_claims():
    answer = parse_answer(ANSWER)
    assert (answer.rule_ids, answer.directive, answer.void) == (("LCR_MIN", "OF_SUM"), "To the Board.\nDo it.", 0)
    lcr, total = answer.claims
    law = frozenset({("CRR", "412(1)"), ("2015/61", "4(2)")})
    assert lcr == Claim("LCR_MIN", "c 76.00.a r0030 c0010", Decimal("0.931"), "min", Decimal(1), law)
    assert (total.value, total.relation, total.limit) == (90001000, "expected", 92000000)


@pytest.mark.parametrize(
    "text",
    [
        "Here is my examination of the report.\n\n" + ANSWER,
        ANSWER.replace("Violations:", "**Violations:**").replace("Directive:", "**Directive:**"),
        ANSWER.replace("Violations:", "## VIOLATIONS").replace("Directive:", "## Directive"),
        ANSWER.replace("LCR_MIN", "- LCR_MIN").replace("OF_SUM", "- OF_SUM"),
        ANSWER.replace("LCR_MIN", "1. **LCR_MIN**").replace("OF_SUM", "2) `OF_SUM`"),
        ANSWER.replace(LCR, f"| rule | cell | value | limit | article |\n|---|---|---|---|---|\n| {LCR} |"),
        ANSWER.replace("\n", "\n\n"),
        ANSWER.replace("Directive:\n", "directive: "),
        ANSWER.replace("93.10%", "93.1 %").replace("90001 thousand", "EUR 90,001,000").replace("min", "at least"),
        ANSWER.replace("CRR Art. 72", "Article 72 of Regulation (EU) No 575/2013").replace("r0010 c", "r0010  c"),
    ],
)
def test_the_form_may_vary(text):
    answer, plain = parse_answer(text), parse_answer(ANSWER)
    assert (answer.rule_ids, answer.claims, answer.void) == (plain.rule_ids, plain.claims, 0)
    assert answer.directive.split() == plain.directive.split()


@pytest.mark.parametrize(
    "line",
    [
        "LCR_MIN",
        "LCR_MIN | C 76.00.a r0030 c0010 | 93.1%",  # cut short
        LCR.replace("93.10%", "low"),
        LCR.replace("min 100%", "the minimum"),
        LCR.replace("LCR_MIN", "lcr"),
        LCR.replace("C 76.00.a r0030 c0010", ""),
        LCR + " | more",
        "The liquidity coverage ratio is too low.",
    ],
)
def test_only_malformed_lines_are_void(line):
    assert read_line(line) is None
    answer = parse_answer(ANSWER.replace(LCR, line))
    assert (answer.rule_ids, answer.void, answer.directive) == (("OF_SUM",), 1, "To the Board.\nDo it.")
    assert parse_answer(f"Violations:\n{line}\nDirective:\nx") is None  # nothing in it can be read


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("The bank is fine.", None),
        ("Violations:", None),
        ("Violations:\nDirective:\nTo the Board", None),
        ("Violations:\nnone", Answer((), "")),  # generation cut short before the letter
        ("Violations: None.\nDirective: x", Answer((), "x")),
        ("Directive:\nViolations:\nnone", Answer((), "")),
        # This answer contradicts itself.
        (f"Violations:\nnone\n{LCR}\nDirective:\nx", Answer(("LCR_MIN",), "x", (read_line(LCR),), 1)),
        (f"Violations:\n{LCR}\n{LCR}", Answer(("LCR_MIN",), "", (read_line(LCR),))),
    ],
)
def test_none_repeated_and_contradicting_lines(text, expected):
    assert parse_answer(text) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (LCR, False),
        (LCR.replace("93.10%", "104%"), True),
        (LCR.replace("93.10%", "100%"), True),
        (LCR.replace("93.10%", "not reported"), False),
        ("LE_LIMIT | Client Arno | 25% | max 25% | CRR Art. 395(1)", True),
        ("LE_LIMIT | Client Arno | 25.01% | max 25% | CRR Art. 395(1)", False),
        (SUM, False),
        (SUM.replace("90001", "92000"), True),
        ("LATE | COREP_LR | 2026-05-20 | max 2026-05-12 | ITS (EU) 2024/3117 Art. 3", False),  # dates are not compared
    ],
)
def test_figures_that_meet_the_violated_rule(line, expected):
    assert read_line(line).contradicts_itself == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("4.310%", "0.0431"), ("4.31 per cent", "0.0431"), ("0.19 percentage points", "0.0019"), ("0", "0")),
        *(("1.340 thousand", "1340"), ("1,340", "1340"), ("-2.017 thousand", "-2017"), ("−3 k", "-3000")),
        *(("12.4 bn", "12400000000"), ("EUR 3 million", "3000000"), ("1340 thousand EUR", "1340000"), ("-0%", "0")),
        *((text, None) for text in ("", "abc", "4.5%.", "1,34", "4.5 %%", "4 5", "5 thousandths")),
    ],
)
def test_figures_are_compared_as_numbers(text, number):
    assert parse_quantity(text) == (None if number is None else Decimal(number))


def test_the_figures_of_a_letter():
    letter = (
        "By 31 March 2026 (C 76.00.a r0030 c0010) the LCR of 93.1% missed 100% under CRR Art. 412(1) by 6.9 percentage "
        "points; EUR 1,340 thousand are missing within 30 days. It was 4.31%. Tier 1 and -2.5 million, 2026-03-31."
    )
    assert [printed for printed, _ in quantities(letter)] == [
        *("93.1%", "100%", "6.9 percentage points", "EUR 1,340 thousand", "4.31%", "-2.5 million"),
    ]


@pytest.mark.parametrize(
    ("text", "cited"),
    [
        ("CRR Art. 92(1)(a)", ["CRR 92(1)(a)"]),
        ("Article 92 (1) (a) of Regulation (EU) No 575/2013", ["CRR 92(1)(a)"]),
        ("Article 92(1), point (a), of the CRR", ["CRR 92(1)(a)"]),
        ("Articles 414 and 428b(3) CRR and Article 430 CRR", ["CRR 414", "CRR 428b(3)", "CRR 430"]),
        ("Articles 102 and 104(1) CRD and Article 414 CRR", ["CRD 102", "CRD 104(1)", "CRR 414"]),
        ("CRD Art. 104(1)(a), 104a(4)", ["CRD 104(1)(a)", "CRD 104a(4)"]),
        ("Articles 141 to 142 CRD", ["CRD 141", "CRD 142"]),
        ("CRR Art. 412(1); Delegated Reg. (EU) 2015/61 Art. 4(2)", ["2015/61 4(2)", "CRR 412(1)"]),
        ("CRR Art. 412(1); Delegated Regulation (EU) 2015/61, Art. 4(2)", ["2015/61 4(2)", "CRR 412(1)"]),
        ("Article 7(2) of Commission Delegated Regulation (EU) 2015/61", ["2015/61 7(2)"]),
        ("Artikel 92 Absatz 1 Buchstabe a der Verordnung (EU) Nr. 575/2013", ["CRR 92(1)(a)"]),
        ("Art. 412 Abs. 1 CRR und Art. 104 der Richtlinie 2013/36/EU", ["CRD 104", "CRR 412(1)"]),
        ("4.5% under CRR Art. 92. It was 4.9% before. Under Article 102 CRD", ["CRD 102", "CRR 92"]),
        ("as Article 395(1) demands", ["395(1)"]),
        ("ITS (EU) 2024/3117 Annex I", ["2024/3117 Annex I"]),
        ("the articles of association, 3 articles of 31 March 2026", []),
        ("Article " + "1, " * 20_000, ["1"]),
    ],
)
def test_articles_are_normalised(text, cited):
    assert sorted(f"{act} {number}".strip() for act, number in articles(text)) == cited
