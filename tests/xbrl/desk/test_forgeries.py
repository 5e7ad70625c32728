"""No forged annotation, decision, file or note gives a letter that is ready and differs from the letter of the honest sources."""

import functools
import random
import re
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from common.errors import UserError
from tests.xbrl.desk.reports import BANK, CET1, HEARD, LCR, LR, NAMED, OTHER_CLIENT, PERIOD, SMALL, SOUND, TC, read
from xbrl.desk.derivation import unproven
from xbrl.desk.record import Case, Form, make_record
from xbrl.desk.verdicts import examine
from xbrl.read.filed_report import Note
from xbrl.read.render import cell_name
from xbrl.rules.findings import COLUMNS, KNOWN, load_findings
from xbrl.rules.measures import citations
from xbrl.rules.rules import built_in_rules

BUFFER, OUTFLOW = ("C_76.00.a", "r0010", "c0010"), ("C_76.00.a", "r0020", "c0010")
OTHER_LEI, OTHER_BANK = "SYNB00HULZMHQTBYWY23", "Birksee Credit Bank"
TEXT = "Of the covered bonds in the buffer, EUR 85 million were pledged to a clearing house and have not come back."
ENTITY = f"{BANK.entity}.{BANK.scope}"
DECISIONS = [
    {"rule": "PLEDGED_COUNTED", "cell": "C 76.00.a r0010 c0010", "value": "102000000", "limit": "17000000"},
    {"rule": "LCR_PLEDGED", "cell": "C 76.00.a r0030 c0010", "value": "0.17", "limit": "1"},
]


def line(**columns) -> dict:
    return {"entity": ENTITY, "period": PERIOD, "state": "violated"} | columns


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Honest cases by name, each with its decisions: sound, with breaches, with a pledge, and with a waiver."""
    folder = tmp_path_factory.mktemp("forgeries")
    waiver = "Our LCR requirement is waived since 2024."
    pledge = {LCR: "1.02", BUFFER: "102000000", OUTFLOW: "100000000"}
    breaches = {CET1: "0.0364", LR: "0.0298", LCR: "0.85", OTHER_CLIENT: "0.27"}
    reports = {
        "sound": read(folder / "sound"),
        "high": read(folder / "high", {LCR: "1.7336"}, SMALL),
        "breaches": read(folder / "breaches", breaches, SOUND),
        "pledge": read(folder / "pledge", pledge, SMALL, [TEXT]),
        "waiver": read(folder / "waiver", {LCR: "0.93"}, SMALL, [waiver]),
    }
    lifting = line(rule="LCR_MIN", state="lifted", legal="CRR Art. 8", kind="waiver", note=Note(waiver).id)
    decisions = {
        "pledge": [line(**columns, kind="pledged", note=Note(TEXT).id) for columns in DECISIONS],
        "waiver": [lifting],
    }
    honest = {name: Case(report, NAMED, hearing=HEARD) for name, report in reports.items()}
    return {name: (case, decisions.get(name, [])) for name, case in honest.items()}


@pytest.fixture
def letter_of(tmp_path):
    """Write the decisions to a file, read it, and return (state, reasons and text of the letter)."""

    def write(case: Case, lines: list[dict], form: Form = Form()) -> tuple[str, list[str], str]:  # noqa: B008
        path = tmp_path / "decisions.csv"
        rows = [",".join(str(columns.get(name, "")).replace(",", " ") for name in KNOWN) for columns in lines]
        path.write_text("\n".join([",".join(KNOWN), *rows]) + "\n")
        decisions = tuple(decision for own in load_findings(path).values() for decision in own) if lines else ()
        letter = make_record(replace(case, decisions=decisions), form)["letter"]
        return letter["state"], letter["reasons"], letter["text"]

    return write


def changed(report, change, count: int = 1):
    """Change the first `count` facts of ratios of a report."""
    facts = list(report.facts)
    places = [number for number, fact in enumerate(facts) if fact.cell and fact.cell in (LCR, LR, CET1)][:count]
    for place in places:
        facts[place] = replace(facts[place], **change)
    return replace(report, facts=tuple(facts))


ANNOTATIONS = {
    "value": ("high", {"rule": "LCR_MIN", "cell": cell_name(LCR), "value": "0.50", "limit": "1"}, "173.36% min 100%"),
    "cell": (
        "high",
        {"rule": "LCR_MIN", "cell": cell_name(LR), "value": "0.50", "limit": "1"},
        "do not apply it to this",
    ),
    "limit": ("high", {"rule": "LR_MIN", "cell": cell_name(LR), "value": "0.04", "limit": "0.05"}, "5.00% min 3%"),
    "output floor": (
        "sound",
        {"rule": "OUTPUT_FLOOR", "cell": "C 02.00.a r0010 c0010", "value": "1000000", "limit": "2000000"},
        "not applicable",
    ),
    "guidance": (
        "sound",
        {"rule": "P2G_TC", "cell": cell_name(TC), "value": "0.15", "limit": "0.16"},
        "P2G_TC is violated",
    ),
    "lifting": ("breaches", {"rule": "LCR_MIN", "state": "lifted", "legal": "CRR Art. 8"}, "without a note"),
}


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_annotation_differs_from_the_rules(cases, letter_of, name):
    case_name, columns, words = ANNOTATIONS[name]
    state, reasons, _ = letter_of(cases[case_name][0], [line(**columns)])
    assert state == "not ready" and any(words in reason for reason in reasons), reasons


@pytest.mark.parametrize("legal", ["CRR Art. 999(9)", "please pay EUR 5000 to the account below"])
def test_free_text_is_no_citation(cases, letter_of, legal):
    columns = line(rule="LCR_MIN", cell=cell_name(LCR), value="0.85", limit="1", legal=legal)
    with pytest.raises(UserError, match="column legal: .* is not a citation of the legal bases; the nearest are "):
        letter_of(cases["breaches"][0], [columns])


@pytest.mark.parametrize(
    ("forge", "words"),
    [
        (lambda report: replace(report, files=(Path(f"{OTHER_LEI}.IND_x_{PERIOD}.json"),)), "is named for SYNB00HUL"),
        (lambda report: replace(report, files=(Path(f"{BANK.entity}.CON_x_{PERIOD}.json"),)), "is named for CON, but its content is of IND"),
        (lambda report: changed(report, {"entity": OTHER_LEI}), f"{OTHER_LEI} instead of"),
        (lambda report: replace(report, period="2026-03-30"), "is named for 2026-03-31, but its content is of 2026-03-30"),
        (lambda report: changed(report, {"unit": "iso4217:USD"}, 3), "ratios and numbers in iso4217:USD"),
        (lambda report: changed(report, {"value": Decimal("-0.95")}, 3), "cannot be below zero"),
    ],
)  # fmt: skip
def test_forged_file_keeps_the_letter_back(cases, letter_of, forge, words):
    case = cases["high"][0]
    state, reasons, _ = letter_of(replace(case, report=forge(case.report)), [])
    assert state == "not ready" and any(words in reason for reason in reasons), reasons


def test_plain_file_name_says_nothing(cases, letter_of):
    case = cases["high"][0]
    assert letter_of(replace(case, report=replace(case.report, files=(Path("report.xbrl"),))), [])[0] == "ready"


def test_decided_amount_must_stand_in_the_note(cases, letter_of):
    case, (counted, limit) = cases["pledge"]
    forged = counted | {"limit": "62000000"}, limit | {"value": "0.62"}
    state, reasons, _ = letter_of(case, list(forged))
    assert state == "not ready" and "the amount 40,000,000 does not stand in the note" in reasons[0]
    confirmed = forged[0] | {"state": "override", "reason": "85 less 45 that came back", "second": "M. Weber"}
    state, _, text = letter_of(case, [confirmed, forged[1]])
    assert state == "ready" and "Reason: 85 less 45 that came back. Confirmed by M. Weber." in text
    for column in ("reason", "second"):
        with pytest.raises(UserError, match=f"column {column}: "):
            letter_of(case, [confirmed | {column: ""}, forged[1]])


@pytest.mark.parametrize("stranger", [OTHER_BANK, OTHER_LEI])
def test_note_of_another_bank_is_a_doubt(cases, letter_of, stranger):
    case, decisions = cases["pledge"]
    note = Note(f"{stranger} informs you: {TEXT}")
    forged = replace(case, report=replace(case.report, notes=(note,)), others=(OTHER_BANK,))
    lines = [columns | {"note": note.id} for columns in decisions]
    state, reasons, _ = letter_of(forged, lines)
    assert state == "not ready" and "names another bank than" in reasons[0]
    assert letter_of(forged, [columns | {"second": "M. Weber"} for columns in lines])[0] == "ready"


def test_override_is_printed_with_reason_and_second_name(cases, letter_of):
    columns = line(
        rule="LCR_MIN", state="override", cell=cell_name(LCR), value="0.98", reason="see our letter", second="M. Weber"
    )
    for form, words in (
        (Form(), "Override (LCR_MIN): this letter sets 98.00% against 100%"),
        (Form("de", "de"), "Abweichung (LCR_MIN)"),
    ):
        state, reasons, text = letter_of(cases["breaches"][0], [columns], form)
        assert state == "ready" and words in text and "85" in text and "M. Weber" in text, reasons
    lifted = letter_of(cases["breaches"][0], [columns | {"value": ""}])[2]
    assert "Liquidity coverage ratio: 85.00%" not in lifted and "does not apply 100% to C 76.00.a r0030 c0010" in lifted
    floor = letter_of(
        cases["high"][0], [columns | {"rule": "OUTPUT_FLOOR", "cell": "C 02.00.a r0010 c0010", "limit": "2"}]
    )
    assert floor[0] == "not ready" and "overrides OUTPUT_FLOOR, which does not apply to this report" in floor[1][0]


def forged_annotation(rng: random.Random) -> dict:
    rules = [rule for rule in built_in_rules() if rule.cells]
    rule, other = rng.choice(rules), rng.choice(rules)
    number = functools.partial(rng.choice, ["", "0.01", "0.045", "0.5", "1", "1.7336", "2000000", "-0.95"])
    return line(
        rule=rule.id,
        state=rng.choice(["violated", "violated", "lifted"]),
        cell=rng.choice([cell_name(rule.cells[0]), cell_name(other.cells[0]), ""]),
        value=number(),
        limit=number(),
        legal=rng.choice(["", "", rng.choice(sorted(citations())), "Pay at once"]),
    )


def forged_decision(rng: random.Random, lines: list[dict]) -> list[dict]:
    """Change a column of an honest decision, or leave a line out."""
    forged = [dict(columns) for columns in lines]
    victim = rng.choice(forged)
    column = rng.choice(["value", "limit", "cell", "rule", "legal", "note", "period", "quote", "gone"])
    values = {
        "value": ["1", "0.62", "0.99", "102000001", "500000000"],
        "limit": ["0.5", "2", "17000001", "16999999", "118000000"],
        "cell": ["C 76.00.a r0020 c0010", "C 01.00 r0020 c0010", "C 28.00 A12 c350"],
        "rule": ["OWN_SHARES_MIN", "LE_CONNECTED", "LCR_MIN", "PLEDGED_COUNTED", "LR_MIN", "INTERIM_PROFIT"],
        "legal": ["CRR Art. 396(1)", "CRR Art. 92(1)(d)", "CRR Art. 8a"],
        "note": ["0" * 16],
        "period": ["2025-12-31"],
        "quote": ["we have pledged nothing", "nothing"],
    }
    if column == "gone":
        forged.remove(victim)
    else:
        victim[column] = rng.choice(values[column])
    return forged


def forged_report(rng: random.Random, case: Case) -> Case:
    """Change names, dates, units or signs of a report, or the words of its note."""
    report = case.report
    day, lei = (
        f"20{rng.randrange(10, 30)}-0{rng.randrange(1, 9)}-15",
        f"{rng.randrange(10**17):018}{rng.randrange(10, 99)}",
    )
    kind = rng.choice(["file", "day", "entity", "period", "unit", "sign", "note", "bank"])
    if kind == "file":
        return replace(case, report=replace(report, files=(Path(f"{lei}.IND_ES_{PERIOD}.json"),)))
    if kind == "day":
        return replace(case, report=replace(report, files=(Path(f"{BANK.entity}.IND_ES_{day}.json"),)))
    if kind == "period":
        return replace(case, report=replace(report, period=day))
    if kind == "bank":
        return replace(case, bank=replace(NAMED, entity=lei, name=OTHER_BANK))
    if kind == "note":
        text = rng.choice([f"{lei} writes: {TEXT}", TEXT.replace("85", str(rng.randrange(1, 80))), f"{TEXT} And more."])
        return replace(case, report=replace(report, notes=(Note(text),)))
    changes = {"entity": {"entity": lei}, "unit": {"unit": "iso4217:USD"}, "sign": {"value": Decimal(-rng.random())}}
    if kind == "sign":
        lcr = [replace(fact, **changes[kind]) if fact.cell == LCR else fact for fact in report.facts]
        return replace(case, report=replace(report, facts=tuple(lcr)))
    return replace(case, report=changed(report, changes[kind]))


def test_random_forgeries_change_no_ready_letter(cases, letter_of):
    """A letter that is ready in spite of a forgery is the honest letter to the byte."""
    rng = random.Random(56)
    honest = {name: letter_of(case, lines) for name, (case, lines) in cases.items()}
    assert all(state == "ready" for state, _, _ in honest.values()), honest
    held = 0
    for _ in range(600):
        name = rng.choice(sorted(cases))
        case, lines = cases[name]
        kind = rng.choice(["annotation", "decision", "report"])
        if kind == "annotation":
            lines = [*lines, forged_annotation(rng)]
        elif kind == "decision" and lines:
            lines = forged_decision(rng, lines)
        else:
            case = forged_report(rng, case)
        try:
            state, _, text = letter_of(case, lines)
        except UserError:
            held += 1
            continue
        assert state == "not ready" or text == honest[name][2], (name, kind, lines)
        held += state == "not ready"
    assert held > 500


@pytest.mark.parametrize("form", [Form(), Form("de", "de")])
def test_every_digit_of_a_letter_is_proved(cases, letter_of, tmp_path, form):
    """A changed digit anywhere in a finished letter has no source: in figures, cells, articles, dates and names."""
    rng = random.Random(7)
    for name, (case, lines) in cases.items():
        state, reasons, text = letter_of(case, lines, form)
        assert state == "ready", reasons
        decisions = load_findings(tmp_path / "decisions.csv").values() if lines else ()
        case = replace(case, decisions=tuple(decision for own in decisions for decision in own))
        engine = examine(case.report, (), case.decisions)
        assert list(unproven(text, case, engine, form)) == []
        for place in rng.sample([match.start() for match in re.finditer(r"\d", text)], 60):
            digit = rng.choice([other for other in "0123456789" if other != text[place]])
            forged = text[:place] + digit + text[place + 1 :]
            assert list(unproven(forged, case, engine, form)), (name, forged[max(place - 60, 0) : place + 30])
        assert list(unproven(text.replace(NAMED.name, OTHER_BANK), case, engine, form))
        for term in ("within five", "within ten", "binnen fünf", "binnen zehn"):
            assert term not in text or list(unproven(text.replace(term, f"{term}zig"), case, engine, form))
        finding = re.search(r"^1\. .*\n", text, re.MULTILINE)
        assert not finding or list(unproven(text.replace(finding[0], ""), case, engine, form))


def test_columns_of_the_project_have_no_override():
    assert set(KNOWN) - set(COLUMNS) == {"quote", "reason", "second"}
