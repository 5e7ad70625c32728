"""The decision letter: made of blocks alone, complete in each language, in proportion, and safe against sentences as names."""

import re
import shutil
import tomllib
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal

import pytest

from common.errors import UserError
from tests.xbrl.desk.reports import CET1, CLIENT, LCR, LR, NAMED, OTHER_CLIENT, PERIOD, SMALL, read, record
from tests.xbrl.rules.figures import report_of
from xbrl.answers.answers import write_violation
from xbrl.desk import letters
from xbrl.desk.letters import BLOCKS, LANGUAGES, Context, Hearing, plain_name, required_measures, write_letter
from xbrl.read.render import Addressee
from xbrl.rules.findings import Finding, apply_findings, note_rules
from xbrl.rules.measures import DEADLINES, OWNERS, load_basis
from xbrl.rules.remittance import judge_return
from xbrl.rules.rule_lines import describe_result
from xbrl.rules.rules import RuleResult, built_in_rules, evaluate, violations

BUFFER, CET1_AMOUNT = ("C_76.00.a", "r0010", "c0010"), ("C_01.00", "r0020", "c0010")


def finding(rule, cell, value, limit, legal="CRR Art. 26(2)", unit="iso4217:EUR", kind="note"):
    low, high = (None if number is None else Decimal(number) for number in (value, limit))
    relation = note_rules()[rule].relation if rule in note_rules() else "min"
    return RuleResult(rule, kind, "violated", cell, low, high, relation, legal, unit, -3)


PLEDGED = finding("PLEDGED_COUNTED", BUFFER, 102_000_000, 62_000_000, "Delegated Reg. (EU) 2015/61 Art. 7(2)")
LATE = judge_return("COREP_LCR_DA", "2026-05-20", PERIOD)


@pytest.fixture(scope="module")
def breaches(tmp_path_factory):
    """The violations of a report with CET1 3.64%, leverage ratio 2.98%, LCR 85%, client A12 27% of Tier 1."""
    report = read(tmp_path_factory.mktemp("breaches"), {CET1: "0.0364", LR: "0.0298", LCR: "0.85", CLIENT: "0.27"})
    return violations(evaluate(report))


def test_letter_has_each_part_of_a_decision(breaches):
    """Each finding has figure, cell, limit, article and plain words. Basis, measures, duty, hearing, objection, remedy follow."""
    text = write_letter([*breaches, PLEDGED], NAMED, PERIOD)
    lines = text.splitlines()
    assert lines[0] == f"To the Management Board of {NAMED.name}"
    assert lines[1] == "Subject: supervisory report as of 31 March 2026, decision on measures"
    assert (
        "1. CET1 ratio: 3.64% (C 03.00 r0010 c0010). At least 4.5% is required: the minimum (CRR Art. 92(1)(a)). 0.86 percentage "
        "points are missing. The bank has less capital of this kind than the law demands at all times."
    ) in lines
    assert "4. Exposure to “A12”: 27.00% of Tier 1 after mitigation (C 28.00 A12 c350)." in text
    assert any("EUR 102000 thousand" in line and "Without them it is EUR 62000 thousand." in line for line in lines)
    measures = [line for line in lines if line.startswith("- ")]
    assert len(measures) == len(required_measures([*breaches, PLEDGED])) == 7
    assert measures[0].startswith("- Submit within ten working days of receipt a capital plan")
    assert measures[0].endswith(
        "Bring us within forty working days of receipt a resolution of your owners on new capital."
    )
    assert any(
        line.startswith("- Take the encumbered assets out of the liquidity buffer and file the ") for line in lines
    )
    heads = ("Legal basis:", "Measures:", "Reporting:", "Consequences:", "Right to be heard:", "Objection:", "Remedy:")
    assert [line.partition(" ")[0] for line in lines if line.startswith(heads)] == [h.partition(" ")[0] for h in heads]
    assert "CRR Art. 414" in text and "binds you only through the national law that transposes it" in text


@pytest.mark.parametrize(
    ("hearing", "english", "german"),
    [
        (Hearing(), "the measures on ____________ (Charter", "Wir haben Sie am ____________ zum"),
        (Hearing("2026-05-20"), "the measures on 20 May 2026 (Charter", "Wir haben Sie am 20. Mai 2026 zum"),
        (Hearing(urgent="a run"), "The matter is urgent, so", "Die Sache ist eilig"),
    ],
)
def test_signed_letter_says_how_the_bank_was_heard(breaches, hearing, english, german):
    """A refiling is not urgent, and a model does not learn the day of a hearing."""
    for language, basis, sentence in (("en", "model", english), ("de", "de", german)):
        form, context = {"language": language, "basis": basis, "context": Context(hearing=hearing)}, Context()
        signed = write_letter(breaches, NAMED, PERIOD, grouped=True, **form)
        assert sentence in signed and ("urgent" in signed or "eilig" in signed) == bool(hearing.urgent)
        assert sentence not in write_letter(breaches, NAMED, PERIOD, **form | {"context": context})
        assert sentence not in write_letter([PLEDGED], NAMED, PERIOD, grouped=True, **form)


@pytest.mark.parametrize("language", LANGUAGES)
def test_conservation_plan_runs_from_identification(breaches, language):
    """CRD Art. 142(1): five working days after the bank identified the failure, and up to ten if the authority authorises them."""
    english = "within five working days after you identified that the combined buffer is not met (CRD Art. 142(1))."
    german = "binnen fünf Arbeitstagen, nachdem Sie festgestellt haben, dass die Kapitalpuffer nicht erfüllt sind (CRD Art. 142(1))."
    text = write_letter(breaches, NAMED, PERIOD, language=language, grouped=True)
    assert {"en": english, "de": german}[language] in text and ("up to ten days" in text or "bis zu zehn Tage" in text)


def ratio(rule, row, value, limit):
    """Return a finding on a ratio of C 03.00, or on the LCR if `row` is "LCR"."""
    cell = LCR if row == "LCR" else ("C_03.00", row, "c0010")
    return replace(finding(rule, cell, value, limit, "CRR", "xbrli:pure"), decimals=4)


@pytest.mark.parametrize(
    ("value", "limit", "figure", "missing"),
    [
        ("0.99996", "1", "99.996%", "100%: 0.004"),
        ("0.99999999", "1", "99.999999%", "100%: 0.000001"),
        ("0.0812", "0.08123456", "8.12%", "8.123%: 0.003"),
        ("0.0812", "0.08200001", "8.12%", "8.2%: 0.08"),
    ],
)
def test_figure_and_limit_show_the_difference(value, limit, figure, missing):
    """A figure is printed as filed. Its limit has four decimals, and more if these hide the difference."""
    required, gap = missing.split(": ")
    result = ratio("LCR_PLEDGED", "LCR", value, limit)
    text = write_letter([result], NAMED, PERIOD)
    assert f"Liquidity coverage ratio: {figure} (" in text and f"At least {required} is required" in text
    assert f" {gap} percentage points are missing." in text
    described = describe_result(result)
    assert (described["value"], described["limit"]) == (figure, f"min {required}")
    assert f" | {figure} | min {required} | " in write_violation(result)


@pytest.mark.parametrize(
    ("language", "limits"),
    [
        ("en", ("At least 5.625% is required", "0.625 percentage points are missing", "1 percentage point is missing")),
        ("de", ("mindestens 5,625 %", "Es fehlen 0,625 Prozentpunkte.", "Es fehlt 1 Prozentpunkt.")),
    ],
)
def test_reported_limit_is_printed_unrounded(language, limits):
    """The CET1 part of a requirement of 10% is 5.625%. A letter with 5.62% would state a wrong requirement."""
    rows = {"r0010": "5%", "r0140": "5.625%", "r0030": "7%", "r0150": "8%"}
    report = report_of({("C_03.00", row, "c0010"): value for row, value in rows.items()})
    violated = violations(evaluate(report))
    text = write_letter(violated, NAMED, PERIOD, language=language, grouped=True)
    assert [result.rule_id for result in violated] == ["TSCR_CET1", "TSCR_T1"]
    assert all(printed in text for printed in limits)
    note = Finding(
        "", PERIOD, "OWN_SHARES_TSCR", "violated", "C 03.00 r0010 c0010", Decimal("0.04"), Decimal("0.05625")
    )
    assert apply_findings(evaluate(report), [note])[-1].printed_limit == "5.625%"


@pytest.mark.parametrize(
    ("results", "english", "german"),
    [
        ("own", "does not suspend the measures (§ 49 KWG).", "hat keine aufschiebende Wirkung (§ 49 KWG)."),
        ("wrong", "suspends the measures.", "hat aufschiebende Wirkung."),
        ("both", "suspends the measures only as far as they concern the corrected templates and your reporting dates; "
         "the others apply at once (§ 49 KWG).", "hat aufschiebende Wirkung nur, soweit die Maßnahmen die berichtigten "
         "Meldebögen und die Einreichungstermine betreffen; die übrigen gelten sofort (§ 49 KWG)."),
    ],
)  # fmt: skip
def test_objection_suspends_measures_as_the_law_says(results, english, german):
    """§ 80(1) VwGO. § 49 KWG names § 45, the basis of measures on own funds, and not § 6(3), the basis of corrections."""
    own = [ratio("CET1_MIN", "r0010", "0.04", "0.045")]
    violated = {"own": own, "wrong": [PLEDGED, LATE], "both": [*own, PLEDGED, LATE]}[results]
    for language, sentence in (("en", english), ("de", german)):
        text = write_letter(violated, NAMED, PERIOD, basis="de", language=language, grouped=True)
        assert f"{sentence}\nRe" in text
    assert "schriftlich oder zur Niederschrift" in text  # § 70(1) VwGO; without it the term is a year (§ 58(2))
    assert "does not suspend the measures.\n" in write_letter(violated, NAMED, PERIOD, grouped=True)


def test_profit_needs_permission_before_its_formal_decision():
    """CRR Art. 26(2) requires permission only before the formal decision on the profit of the year."""
    counted = finding("PROFIT_COUNTED", CET1_AMOUNT, 300_000_000, 250_000_000)
    signed, german = (write_letter([counted], NAMED, PERIOD, language=language, grouped=True) for language in LANGUAGES)
    assert "Before a formal decision confirms" in signed and "förmlich festgestellt" in german
    learned = write_letter([counted], NAMED, PERIOD)
    assert "Profit is not capital before we permit it." in learned


def test_order_on_two_exposures_names_each(tmp_path):
    """An administrative act must be definite (§ 37(1) VwVfG). With two exposures, `the exposure` is not."""
    for share, english, german in (
        ("0.08", "Reduce the exposure to the limit within", "Gewähren Sie diesem Kunden"),
        ("0.30", "Reduce each of these exposures to the limit within", "Gewähren Sie diesen Kunden"),
    ):
        violated = violations(evaluate(read(tmp_path / share, {CLIENT: "0.27", OTHER_CLIENT: share})))
        for language, sentence in (("en", english), ("de", german)):
            assert sentence in write_letter(violated, NAMED, PERIOD, language=language, grouped=True)
        learned = write_letter(violated, NAMED, PERIOD)
        assert "Reduce the exposure to the limit" in learned


def test_clean_letter_orders_nothing_and_excess_is_positive(tmp_path):
    (result,) = violations(evaluate(read(tmp_path, {CLIENT: "0.250004"})))
    text = write_letter([result], NAMED, PERIOD)
    assert "25.0004% of Tier 1" in text and "The excess is 0.0004 percentage points." in text
    results = evaluate(read(tmp_path))
    context = Context(
        margins=tuple(
            result_of_rule
            for result_of_rule in results
            if result_of_rule.state == "ok" and result_of_rule.relation == "min"
        )
    )
    text = write_letter([], NAMED, PERIOD, context)
    assert "no objection" in text and "No measure is required." in text and "within" not in text
    assert "The smallest margin: Net stable funding ratio 110.00% (C 84.00.a r0220 c0040)" in text


@pytest.mark.parametrize(
    ("language", "basis", "heard", "objection"),
    [
        ("en", "model", "You may comment on this letter in writing", "to object to it, and until when (CRD Art. 72)."),
        ("de", "de", "Sie können sich zu diesem Schreiben jederzeit", "ihr widersprechen können (§ 70(1) VwGO)."),
    ],
)
def test_clean_signed_letter_says_how_to_be_heard(language, basis, heard, objection):
    """Such a letter may ask a question or list untested rules. The letters that models learn do not change."""
    for context in (Context(), Context(unexamined="undecided")):
        signed, learned = (
            write_letter([], NAMED, PERIOD, context, basis=basis, language=language, grouped=is_signed)
            for is_signed in (True, False)
        )
        *before, hearing, last, signature = signed.splitlines()
        assert [*before, signature] == learned.splitlines()
        assert heard in hearing and last.endswith(objection)


def test_short_letter_has_orders_of_long_letter(breaches):
    """The deadlines come from measures.py. A late return must be explained, not filed again."""
    short = write_letter(breaches, NAMED, PERIOD, short=True)
    long = write_letter(breaches, NAMED, PERIOD)
    orders = [order for order in re.split(r"(?<=\.)(?<!Art\.) ", short) if order]
    assert len(orders) == 6 and all(order in long for order in orders) and "\n" not in short
    words = {2: "two", 3: "three", 5: "five", 7: "seven", 10: "ten", 15: "fifteen", 20: "twenty", 30: "thirty"}
    deadlines = re.findall(r"within (\w+) working days", short)
    assert deadlines == [words[int(measure["deadline_days"])] for measure in required_measures(breaches)]
    assert write_letter([], NAMED, PERIOD, short=True) == "No measure is required."
    late = write_letter([LATE], NAMED, PERIOD)
    assert "50 days after the reference date. It was due after 15 days (ITS (EU) 2024/3117 Art. 3(1)(a))" in late
    assert "Explain in writing within ten working days of receipt why you filed late." in late
    assert "file again" not in late and "C 01.00" not in late and "Correct" not in late


def test_plain_words_fit_the_finding():
    together = finding("LE_CONNECTED", CLIENT, "0.28", "0.25", unit="xbrli:pure")
    profit = finding("PROFIT_COUNTED", CET1_AMOUNT, 280_000_000, 270_000_000)
    english, german = (write_letter([together, profit], NAMED, PERIOD, language=language) for language in LANGUAGES)
    assert "failure of these clients together" in english and "this client would" not in english
    assert "Profit is not capital before we permit it." in english and "Until then the profit" not in english
    assert "Der gemeinsame Ausfall dieser Kunden" in german and "Bis dahin ist der Gewinn" not in german


def test_the_licence_is_named_only_in_proportion(tmp_path):
    """A capital gap of 0.86 points threatens the licence and demands a resolution of the owners. A gap of 0.03 points does not."""
    for number, (value, licence, owners) in enumerate((("0.0447", False, False), ("0.0364", True, True))):
        violated = violations(evaluate(read(tmp_path / str(number), {CET1: value})))
        text = write_letter(violated, NAMED, PERIOD)
        assert ("withdrawal of the authorisation" in text, "resolution of your owners" in text) == (licence, owners)
        assert ("Begin no new business" in text) == owners


def test_remark_and_margin_cite_the_legal_basis(tmp_path):
    overall = (("C_03.00", row, "c0010") for row in ("r0130", "r0160", "r0190"))
    report = read(tmp_path, dict(zip(overall, ("0.10", "0.148", "0.16"), strict=True)))
    results = evaluate(report)
    guidance = tuple(result for result in results if result.rule_id == "P2G_TC" and result.state == "triggered")
    margins = tuple(result for result in results if result.rule_id == "OCR_TC" and result.state == "ok")
    context = Context(triggers=guidance, margins=margins)
    national, union = (write_letter((), NAMED, PERIOD, context, basis=basis) for basis in ("de", "model"))
    assert "14.8% required (§ 10i KWG)" in national and "stands at 16% (§ 6d KWG)" in national
    assert "CRD Art." not in national
    assert "CRD Art. 104b" in union and "CRD Art. 141" in union
    orders = write_letter([PLEDGED], NAMED, PERIOD, basis="de")
    assert "§ 6(3) KWG" in orders and "§ 70(1) VwGO" in orders


def test_a_german_letter_is_german(breaches):
    text = write_letter([*breaches, PLEDGED, LATE], NAMED, PERIOD, language="de")
    assert "Harte Kernkapitalquote: 3,64 % (C 03.00 r0010 c0010). Verlangt sind mindestens 4,5 %" in text
    assert "Es fehlen 0,86 Prozentpunkte." in text and "EUR 102000 Tausend" in text and "31. März 2026" in text
    assert not re.search(r"\b(?:the|of|and|within|is)\b", text.replace(NAMED.name, "").replace("Reg. (EU)", ""))


def test_letters_of_the_desk_separate_thousands(breaches):
    large = replace(PLEDGED, value=Decimal("1234567890"), limit=Decimal("9921000"), decimals=-3)
    english, german = (
        write_letter([*breaches, large], NAMED, PERIOD, language=name, grouped=True) for name in LANGUAGES
    )
    assert "EUR 1,234,567.89 thousand" in english and "it is EUR 9,921 thousand." in english
    assert "EUR 1.234.567,89 Tausend" in german and "EUR 9.921 Tausend" in german
    # A model learns plain digits. Years, cells and articles have no separators in either form.
    plain = write_letter([*breaches, large], NAMED, PERIOD)
    lines = zip(english.replace(",", "").splitlines(), plain.replace(",", "").splitlines(), strict=True)
    assert [line[:13] for line, plain_line in lines if line != plain_line] == ["Legal basis: ", "Right to be h"]
    assert "EUR 1234567.89 thousand" in write_letter([*breaches, large], NAMED, PERIOD)


def every_result():
    """Yield violated results of each rule, in each form of its block."""
    for rule in built_in_rules():
        if rule.kind in ("breach", "filing"):
            result = finding(rule.id, rule.cells[0], "0.02", "0.03", str(rule.legal), "xbrli:pure", rule.kind)
            for relation in ("min", "max", "expected"):
                yield replace(result, relation=relation)
                yield replace(result, relation=relation, missing=True)
            yield replace(result, value=Decimal("-0.02"))
            yield replace(result, relation="expected", limit=Decimal(0))
    for rule in note_rules().values():
        yield finding(rule.id, BUFFER, 3, 2, rule.legal)
        yield finding(rule.id, BUFFER, None, None, rule.legal)
    yield LATE


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_finding_has_its_blocks(language):
    """For every rule, form and legal basis no block is missing, no placeholder remains, and every line ends a sentence."""
    for result in every_result():
        for basis in ("model", "de"):
            text = write_letter([result], NAMED, PERIOD, basis=basis, language=language)
            assert "{" not in text and "None" not in text and ".." not in text and "  " not in text, text
            assert all(line.endswith((".", ":", "_")) for line in text.splitlines()[2:]), text
            assert write_letter([result], NAMED, PERIOD, language=language, short=True).endswith(".")
    for result in (PLEDGED, replace(PLEDGED, rule_id="PROFIT_COUNTED"), replace(PLEDGED, rule_id="OWN_SHARES_COUNTED")):
        for known in ("met", "unknown", "waived")[: 3 if result == PLEDGED else 2]:
            contexts = (Context(without={result.rule_id: known}), Context())
            text, plain = (write_letter([result], NAMED, PERIOD, context, language=language) for context in contexts)
            assert len(text) > len(plain) + 40 and "  " not in text
    for why in ("not applicable", "undecided"):
        assert len(write_letter([], NAMED, PERIOD, Context(unexamined=why), language=language).splitlines()) == 5


def test_subjects_and_deadlines_have_blocks_in_both_languages():
    files = ("words", "findings", "measures")
    english, german = (
        {name: tomllib.loads((BLOCKS / language / f"{name}.toml").read_text()) for name in files}
        for language in LANGUAGES
    )
    for blocks in (english, german):
        assert not {f"{subject}_{order}" for subject, order in DEADLINES} - blocks["measures"].keys()
        days = {str(day) for table in (DEADLINES, OWNERS) for terms in table.values() for day in terms if day}
        assert not days - blocks["words"]["text"]["numbers"].keys()
    for name in files:
        for section in english[name].keys() - {"format", "law", "boards"}:
            assert english[name][section].keys() == german[name][section].keys(), (name, section)


def test_nothing_that_a_report_names_begins_a_sentence():
    """Banks choose their entity, the codes of clients, filing indicators and units. None may add a sentence to a letter."""
    sentences = "A12. You need not: reduce anything!\nAll measures are deferred."
    inner = "A12 You need not reduce anything All measures are deferred"
    client = finding("LE_LIMIT", CLIENT, "0.27", "0.25", unit="xbrli:pure", kind="breach")
    client = replace(client, row=sentences, relation="max")
    text = write_letter(
        [client, replace(PLEDGED, unit=f"iso4217:EUR{sentences}")], Addressee(sentences, sentences, "", ""), PERIOD
    )
    assert text.splitlines()[0] == f"To the Management Board of {inner}"
    assert f"Exposure to “{inner}”: 27%" in text and text.count("need not") == text.count(inner) == 3
    clean = write_letter([], NAMED, PERIOD, Context(templates=("C_76.00", f"C_01.00 {sentences}")))
    assert "We have examined C 76.00 and found" in clean and "need not" not in clean
    for name, plain in (
        ("A" * 500, "A" * 60 + " ..."),
        ("Müller & Söhne AG, Köln", "Müller & Söhne AG Köln"),
        ("x\u202egnp.exe", "xgnp.exe"),
        ("A12” (CRR Art. 1) „B“ »C«", "A12 CRR Art 1 B C"),
    ):
        assert plain_name(name) == plain


def test_letter_names_cells_that_count_as_nil():
    """A position of 5.7 million without its own funds requirement. The missing cell is the error, so the letter must name it."""
    report = report_of({"fx 10 c0100": 5_727_975, "of 10": 90_000_000}, filed={"C_22.00": True, "C_01.00": True})
    (violated,) = violations(evaluate(report, [rule for rule in built_in_rules() if rule.id == "FX_12_5"]))
    text = write_letter([violated], NAMED, PERIOD, grouped=True)
    sentence = "the other figures of the report give EUR 0 (CRR Art. 92(6)(b)). Not reported, and counted as nil: C 22.00 r0010 c0090."
    assert sentence in text and "Not reported" not in write_letter([violated], NAMED, PERIOD)
    in_two_tables = replace(
        violated,
        inputs=tuple(
            replace(figure, cell=("C_02.00.a", *figure.cell[1:])) if figure.source == "read as 0" else figure
            for figure in violated.inputs
        ),
    )
    german = write_letter([in_two_tables], NAMED, PERIOD, grouped=True, language="de")
    assert (
        "als null gezählt: C 02.00.a r0010 c0090." in german and "Berichtigen Sie C 22.00 und C 02.00.a und" in german
    )


@pytest.mark.parametrize(
    ("cell", "value", "basis"),
    [
        (CET1, "0.0364", "CRD Art. 104(1)(c), (e), (h), (i), (j); CRD Art. 104(1)(j), 141, 142."),
        (LCR, "0.99", "CRR Art. 414."),
        (LCR, "0.85", "CRR Art. 414; CRD Art. 104(1)(e)."),  # the measure forbids uncommitted loans
        # No new business with this client, and weekly reports.
        (CLIENT, "0.251", "CRR Art. 396(1); CRD Art. 104(1)(e), (j)."),
    ],
)
def test_every_duty_has_its_legal_basis(tmp_path, cell, value, basis):
    """Limits on business and weekly reports rest on CRD Art. 104(1)(e) and (j), not on CRR Art. 414 or 396(1)."""
    violated = [result for result in violations(evaluate(read(tmp_path, {cell: value}))) if result.kind == "breach"]
    assert f"Legal basis: {basis} CRR (Reg" in write_letter(violated, NAMED, PERIOD, grouped=True)
    assert "(j)" not in write_letter(violated, NAMED, PERIOD)  # the letter that models learned


@pytest.fixture
def own_blocks(tmp_path, monkeypatch):
    """A copy of the blocks for a supervisor to edit."""
    monkeypatch.setattr(letters, "BLOCKS", shutil.copytree(BLOCKS, tmp_path / "blocks"))
    letters.load_blocks.cache_clear()
    yield tmp_path / "blocks"
    letters.load_blocks.cache_clear()


def test_signed_letter_does_not_depend_on_separators(own_blocks, tmp_path):
    """The texts of a signed letter do not depend on the separator of thousands."""
    words = own_blocks / "en" / "words.toml"
    words.write_text(words.read_text().replace('thousands = ","', 'thousands = ""'))
    violated = violations(evaluate(read(tmp_path / "report", {CLIENT: "0.27", OTHER_CLIENT: "0.30"})))
    assert "Reduce each of these exposures" in write_letter(violated, NAMED, PERIOD, grouped=True)


def test_wrong_block_is_one_sentence(own_blocks):
    measures = own_blocks / "en" / "measures.toml"
    good = measures.read_text()
    for text, problem in (
        (good.replace("[PLEDGED_COUNTED]", "[OTHER]").replace("[misstatement_filing]", "[X]"), "has no block"),
        (good.replace("{{ deadline }}", "{{ dedline }}"), "'dedline' is undefined; mend the block"),
        (good.replace("{{ deadline }}", "{{ deadline }"), "cannot be filled in"),
        (
            good.replace('order = "', 'order = 5 # "'),
            "[measures] PLEDGED_COUNTED must be a text, not 5; mend the block",
        ),
        (good.replace("{{ deadline }}", "{{ deadline + 1 }}"), "cannot be filled in"),
        ("[", "the blocks of letters cannot be read"),
    ):
        measures.write_text(text)
        letters.load_blocks.cache_clear()
        with pytest.raises(UserError, match=r"measures\.toml.*" + re.escape(problem)):
            write_letter([PLEDGED], NAMED, PERIOD)
    measures.write_text(good)
    words = own_blocks / "en" / "words.toml"
    lines = words.read_text().splitlines()
    for line in lines:  # without this line the letter is written, or the error names the block
        if line.startswith(("[", "and =", "months =", "numbers =", "thousands =")):
            words.write_text("\n".join(kept for kept in lines if kept != line))
            letters.load_blocks.cache_clear()
            with suppress(UserError):
                write_letter([PLEDGED], NAMED, PERIOD, grouped=True)


def test_letter_not_ready_always_has_its_mark(tmp_path, own_blocks):
    """A mark without words is refused, also if the letter is ready."""
    notes = (["Our systems were migrated."], [])
    reports = [read(tmp_path / str(len(texts)), figures=SMALL, notes=texts) for texts in notes]
    waiting, ready = (record(report)["letter"] for report in reports)
    marked, draft = waiting["text"].splitlines(), "NOT READY: not to be sent"
    assert marked[0] == marked[-1] == draft and waiting["state"] == "not ready"
    assert ready["state"] == "ready" and draft not in ready["text"]
    words = own_blocks / "en" / "words.toml"
    good = words.read_text()
    for line in ("", 'draft = " "', 'draft = ""', "draft = \"{{ '' }}\"", "draft = 5"):
        words.write_text(good.replace(f'draft = "{draft}"', line))
        letters.load_blocks.cache_clear()
        for report in reports:
            with pytest.raises(UserError, match=r"en/words\.toml: \[text\] .*draft"):
                record(report)


def test_unknown_term_of_legal_basis_is_one_sentence(monkeypatch):
    law = load_basis()
    longer = replace(law, row={**law.row, "objection": {**law.row["objection"], "months": 6}})
    monkeypatch.setattr(letters, "load_basis", lambda name: longer)
    with pytest.raises(UserError, match=r"words\.toml: \[months\] has no block '6'; write it there"):
        write_letter([PLEDGED], NAMED, PERIOD)
