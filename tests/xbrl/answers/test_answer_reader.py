"""The reader of answers, and the figures and citations in them."""

from decimal import Decimal

import pytest

from xbrl.answers.answer_reader import Answer, Claim, parse_answer, read_line
from xbrl.answers.answers import Check, write_checks
from xbrl.answers.statements import articles, parse_quantity, quantities

LCR = "LCR_MIN | C 76.00.a r0030 c0010 | 93.10% | min 100% | CRR Art. 412(1); Delegated Reg. (EU) 2015/61 Art. 4(2)"
SUM = "OF_SUM | C 01.00 r0010 c0010 | 90001 thousand | expected 92000 thousand | CRR Art. 72"
ANSWER = f"Violations:\n{LCR}\n{SUM}\nDirective:\nTo the Board.\nDo it."


def test_an_answer_is_read_into_claims():
    answer = parse_answer(ANSWER)
    assert (answer.rule_ids, answer.directive, answer.void) == (("LCR_MIN", "OF_SUM"), "To the Board.\nDo it.", 0)
    lcr, total = answer.claims
    law = frozenset({("CRR", "412(1)"), ("2015/61", "4(2)")})
    assert lcr == Claim("violated", "LCR_MIN", "c 76.00.a r0030 c0010", Decimal("0.931"), "min", Decimal(1), law)
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
        "LCR 93% < 100%: perhaps",
        "LCR < 100%: LCR_MIN, CRR Art. 412(1)",
        "LCR 93% min: LCR_MIN, CRR Art. 412(1)",
        "LCR min 100%: LCR_MIN, CRR Art. 412(1)",
        "min 100%: LCR_MIN, CRR Art. 412(1)",  # no figure stands above
        f"LCR {'1 - ' * 20_000}1 = 2 min 100%: LCR_MIN, CRR Art. 412(1)",  # read in minutes, were it not too long
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


def shown(answer) -> list[str]:
    return [f"{c.state} {c.rule} {c.where} {c.value} {c.relation} {c.limit}" for c in answer.claims]


def test_lifted_rule_is_no_violation():
    checks = [
        Check("LCR", "93%", "<", "100%", "LCR_MIN", "CRR Art. 412(1)"),
        Check("Tier 1 ratio", "3.7%", ">", "3%"),
        Check("Pledged assets", "104% - 9% = 95%", "<", "100%", "LCR_PLEDGED", "Delegated Reg. (EU) 2015/61 Art. 7(2)"),
        Check("Clients", "14% + 13% = 27%", ">", "25%", "LE_CONNECTED", "CRR Art. 395(1)"),
        Check("Received", "2026-05-20", ">", "2026-05-12", "LATE", "ITS (EU) 2024/3117 Art. 2"),
        Check("Waiver", verdict="lifts LCR_MIN", legal="CRR Art. 8"),
        Check("Guidance"),
        Check("NSFR", "93%", "<", "100%", "NSFR_MIN"),  # an article is optional here
    ]
    answer = parse_answer(write_checks(checks, "To the Board"))
    assert answer.rule_ids == ("LCR_PLEDGED", "LE_CONNECTED", "LATE", "NSFR_MIN") and answer.void == 0
    assert answer.directive == "To the Board"
    assert shown(answer) == [
        "violated LCR_MIN lcr 0.93 min 1",
        "met  tier 1 ratio 0.037 min 0.03",
        "violated LCR_PLEDGED pledged assets 0.95 min 1",
        "violated LE_CONNECTED clients 0.27 max 0.25",
        "violated LATE received 2026-05-20 max 2026-05-12",
        "lifts LCR_MIN waiver None  None",
        "met  guidance None  None",
        "violated NSFR_MIN nsfr 0.93 min 1",
    ]
    assert parse_answer("Checks:\nLCR 101% > 100%: met\nDirective:\nx").rule_ids == ()


def test_line_with_min_or_max_continues_the_figure():
    lines = [
        "CET1 ratio 7.31% min 4.5%: met",
        "min 9.34%: OCR_CET1, CRD Art. 141a(a)",
        "Tier 1 ratio 120 - 10 = 110, 110 / 1000 = 11% min 12%: OWN_SHARES, CRR Art. 28(1)(b)",
        "min 11%: met",
        "Client Bern max & Co 2 15% + 13% = 28% max 25%: LE_CONNECTED, CRR Art. 395(1)",
        "max 30%: met",
    ]
    answer = parse_answer("\n".join(["Checks:", *lines, "Directive:", "min 3% is what you need."]))
    assert answer.void == 0 and answer.directive == "min 3% is what you need."
    assert shown(answer) == [
        "met  cet1 ratio 0.0731 min 0.045",
        "violated OCR_CET1 cet1 ratio 0.0731 min 0.0934",
        "violated OWN_SHARES tier 1 ratio 0.11 min 0.12",
        "met  tier 1 ratio 0.11 min 0.11",
        "violated LE_CONNECTED client bern max & co 2 0.28 max 0.25",
        "met  client bern max & co 2 0.28 max 0.3",
    ]
    signed = parse_answer("Checks:\nCET1 ratio 7.31% >= 4.5%: met\n< 9.34%: OCR_CET1, CRD Art. 141a(a)\nDirective:\nx")
    assert signed.void == 0 and signed.claims[1] == answer.claims[1]
    marked = "\n".join(["**Checks:**", *(f"{number}. **{line}**" for number, line in enumerate(lines, 1))])
    assert parse_answer(marked).claims == answer.claims
    assert parse_answer("\n".join(["Checks:", lines[0], "Waiver: lifts LCR_MIN, CRR Art. 8", lines[1]])).void == 1
    assert parse_answer("\n".join(["Checks:", lines[1]])) is None


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("CET1 ratio 9.48% min 9.5%: met", True),
        ("CET1 ratio 9.5% min 9.5%: met", False),
        ("Client Arno 25% max 25%: LE_LIMIT, CRR Art. 395(1)", True),
        ("Client Arno 25.01% max 25%: met", True),
        ("LCR 95% >= 100%: met", True),
        ("LCR 105% < 100%: LCR_MIN, CRR Art. 412(1)", True),
        ("LCR 1010 / 1000 = 101% = 104%: met", True),
        ("LCR 1010 / 1000 = 101% != 101%: LCR_CALC, 2015/61 Art. 4(1)", True),
        ("Liquidity buffer 10 k - 4 k = 6 k: PLEDGED_COUNTED, 2015/61 Art. 7(2)", False),
        (LCR.replace("93.10%", "104%"), True),
        ("Received 2026-05-20 > 2026-05-12: LATE, ITS Art. 2", False),  # dates are not compared
        ("Waiver: lifts LCR_MIN, CRR Art. 8", False),
        ("NSFR 110%: met", False),
    ],
)
def test_a_verdict_that_contradicts_its_own_figures(line, expected):
    assert read_line(line).contradicts_itself == expected


@pytest.mark.parametrize(
    ("line", "where", "value", "relation", "limit"),
    [
        ("LCR 1010 / 1000 = 101% != 104%: LCR_CALC, 2015/61 Art. 4(1)", "lcr", "1.04", "expected", "1.01"),
        ("LCR 1010 / 1000 = 101% = 101%: met", "lcr", "1.01", "expected", "1.01"),
        ("CET1 73.1 mn - 4 mn = 69.1 mn: PROFIT_COUNTED, CRR Art. 26(2)", "cet1", "73100000", "max", "69100000"),
        ("Tier 1 ratio 120 - 70 = 50, 50 / 1000 = 5% < 6%: OWN_SHARES_MIN, CRR Art. 92(1)", "tier 1 ratio", "0.05", "min", "0.06"),
        ("Client Arno SRL 26.01% > 25%: LE_LIMIT, CRR Art. 395(1)", "client arno srl", "0.2601", "max", "0.25"),
        ("Client Bern & Co 2 15% + 13% = 28% > 25%: LE_CONNECTED, CRR Art. 395(1)", "client bern & co 2", "0.28", "max", "0.25"),
    ],
)  # fmt: skip
def test_a_check_with_its_working(line, where, value, relation, limit):
    claim = read_line(line)
    assert (claim.where, claim.relation) == (where, relation)
    assert (claim.value, claim.limit) == (Decimal(value), Decimal(limit))


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
