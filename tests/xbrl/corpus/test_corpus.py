"""Reports generated around their notes: figures agree with the text, cross limits in half of the cases, and reveal no label."""

import functools
import itertools
from collections import Counter
from dataclasses import replace
from decimal import Decimal

import numpy
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from common.errors import UserError
from tests.xbrl.rules.law_check import judge
from xbrl.answers.answer_reader import letter_in, parse_answer, read_facts
from xbrl.answers.profiles import FULL, PROFILES, SHORT
from xbrl.corpus.banks import lei, make_bank, requirements
from xbrl.corpus.generate import Request, make_unit, plan_units
from xbrl.corpus.note_texts import GROUP, hand_notes
from xbrl.corpus.population import MAX_VIOLATIONS, make_filings
from xbrl.corpus.report_figures import as_report, violated
from xbrl.rules.findings import apply_findings, load_findings, write_findings
from xbrl.rules.note_facts import BUFFER, CET1, COUNTED, LCR, OUTFLOW, NoteFact, consequences
from xbrl.rules.rules import built_in_rules, evaluate

SHARES = [0.4, 0.2, 0.4]
RATIOS = ((10, 170), (30, 180), (50, 160))  # rows of C 03.00: capital ratio, overall requirement
LONG, BRIEF = Request(100, 3, "full", SHARES), Request(60, 3, "short", SHARES)


@functools.cache
def filings():
    """Make a short report around each training note."""
    return [make_filings(5, index, 1, SHORT, note)[0] for index, note in enumerate(hand_notes("train"))]


def follows(filing, fact: NoteFact) -> set[str]:
    """Return the rules that would be violated or lifted if the fact applied."""
    report = as_report(filing.bank, filing.period, filing.figures, filing.figures)
    return {finding.rule for finding in consequences(report, evaluate(report), [replace(fact, applies=True)])}


@pytest.fixture(scope="module", params=[LONG, BRIEF], ids=["full", "short"])
def generated(request, tmp_path_factory):
    """(profile, [(planned unit, generated bank)])."""
    arguments, folder = request.param, tmp_path_factory.mktemp(request.param.profile)
    return arguments.profile, [(unit, make_unit(folder, arguments, unit)) for unit in plan_units(arguments)]


def test_labels_follow_from_figures_and_facts(generated, tmp_path):
    profile, units = generated
    examples = [pair for _, bank in units for pair in zip(bank.examples, bank.filings, strict=True)]
    assert len(examples) == (100 if profile == "full" else 60)
    write_findings(tmp_path / "findings.csv", [finding for _, bank in units for finding in bank.findings])
    truth, seen = load_findings(tmp_path / "findings.csv"), set()
    for example, filing in examples:
        assert judge(example) == []  # the judge that shares no code with the rules
        text, facts = example["messages"][-1]["content"], filing.note.facts
        answer = parse_answer(text)
        assert answer and answer.void == 0 and not any(claim.contradicts_itself for claim in answer.claims)
        findings = truth.get((example["bank"], example["period"]), ())
        lifted, added = ({line.rule for line in findings if line.state == state} for state in ("lifted", "violated"))
        drawn = violated(filing.bank, filing.period, filing.figures, PROFILES[profile].rules)
        assert set(example["engine"]) == drawn and len(drawn) <= MAX_VIOLATIONS
        assert set(example["violations"]) == (drawn - lifted) | added
        applying = {fact.kind for fact in facts if fact.applies}
        assert all((COUNTED[kind] in added) == (kind in applying) for kind in filing.note.kinds & set(COUNTED))
        seen |= added
        assert read_facts(text) == (list(facts), 0)
        assert list(answer.rule_ids) == example["violations"]
        report = as_report(filing.bank, filing.period, filing.figures, filing.figures)
        report, findings = PROFILES[profile].as_seen(report, findings)
        corrected = apply_findings(evaluate(report, PROFILES[profile].rules), findings)
        assert set(answer.claims) == set(
            map(PROFILES[profile].claim_of, corrected)
        )  # rule, cell, value, limit and article
        assert example["note"] == filing.note.id
    assert len(seen) >= 4


def test_the_same_arguments_give_the_same_bytes(generated, tmp_path):
    profile, [(unit, bank), *_] = generated
    again = make_unit(tmp_path, LONG if profile == "full" else BRIEF, unit)
    assert [(path.name, path.read_bytes()) for path in again.files] == [
        (path.name, path.read_bytes()) for path in bank.files
    ]
    assert again.examples == bank.examples


def test_splits_share_no_bank_note_or_letter(generated):
    profile, units = generated
    parts: dict[str, dict[str, set]] = {}
    for unit, bank in units:
        part = parts.setdefault(unit.split, {"bank": set(), "note": set(), "letter": set()})
        for example in bank.examples:
            part["bank"].add(example["bank"])
            part["note"].add(example["note"] or example["id"])
            if profile == "full":  # a short letter has no addressee, only orders
                part["letter"].add(letter_in(example["messages"][-1]["content"]))
    assert list(parts) == ["train", "validation", "test"]
    for first, second in itertools.combinations(parts.values(), 2):
        assert not any(first[name] & second[name] for name in first)
    assert any(unit.quarters == 2 for unit, _ in units) == (profile == "full")


def test_notes_of_a_split_are_used_evenly():
    units = plan_units(Request(5500, 0, "full", [0.89, 0.055, 0.055]))
    tested = Counter(note.id for unit in units if unit.split == "test" for note in (unit.note, unit.pair) if note)
    assert sum(unit.quarters + (unit.pair is not None) for unit in units) == 5500
    assert set(tested.values()) == {1} and len(tested) == 240
    trained = Counter(unit.note.id for unit in units if unit.split == "train" and unit.note)
    assert len(trained) == 600 and max(trained.values()) - min(trained.values()) <= 1
    assert len({unit.index for unit in units}) == len(units)
    with pytest.raises(UserError, match="3 examples are too few for a share of 0.1 in 'validation'"):
        plan_units(Request(3, 0, "full", [0.8, 0.1, 0.1]))


def test_banks_have_valid_codes_and_legal_requirements():
    bank = make_bank(0, 0)
    assert bank.entity == lei(bank.entity[:18]) and bank.entity.startswith("SYNB00")
    assert lei("HWUPKR0MPOU8FGXBT3") == "HWUPKR0MPOU8FGXBT394"  # the LEI of a real bank
    assert len({make_bank(0, index).name for index in range(500)}) == 500
    need = requirements(bank)
    assert abs(need["cet1"].own - Decimal("0.045") - bank.pillar2 * 9 / 16) <= Decimal("0.00005")
    assert len({need[name].overall - need[name].own for name in ("cet1", "t1", "total")}) == 1  # the combined buffer


def test_notes_of_a_pair_share_their_figures():
    notes = {note.id: note for note in (*hand_notes("test"), *hand_notes("validation"))}
    pairs = [note for note in notes.values() if note.id < note.pair][-35:]
    same_date = 0
    for index, note in enumerate(pairs):
        first, second = make_filings(5, index, 1, SHORT, note, notes[note.pair])
        assert (first.note, second.note, first.bank.name) == (note, notes[note.pair], second.bank.name)
        if not any(GROUP in name for name in (*note.clients, *notes[note.pair].clients)):
            assert first.figures == second.figures
        assert (first.bank.entity, first.period) != (second.bank.entity, second.period)
        same_date += first.period == second.period
    assert 0 < same_date < len(pairs)


def test_amounts_cross_a_limit_in_half_of_reports():
    crossed: dict[tuple[str, bool], list[bool]] = {}
    for filing in filings()[:360]:
        facts = [
            fact
            for fact in filing.note.facts
            if fact.amount or fact.kind == "waiver" or fact.who == filing.note.connected
        ]
        pledged = [fact for fact in facts if fact.kind == "pledged"]
        for fact in facts:
            rules = follows(filing, fact)
            group = "capital" if fact.kind in ("own_shares", "profit") else fact.kind
            crossed.setdefault((group, fact.applies), []).append(any(not rule.endswith("_COUNTED") for rule in rules))
            if [fact] == pledged and fact.amount:
                below = (filing.figures[BUFFER] - fact.amount) / filing.figures[OUTFLOW] < 1
                assert ("LCR_PLEDGED" in rules) == below
                assert Decimal("0.03") < fact.amount / filing.figures[BUFFER] <= 1
        if filing.note.connected:
            shares = [clients_of(filing)[name] for name in filing.note.connected]
            assert max(shares) <= Decimal("0.25")
    assert len(crossed) == 8
    for (kind, _), cases in crossed.items():
        assert len(cases) > 25 and 0.3 < sum(cases) / len(cases) < 0.75, kind


def clients_of(filing) -> dict[str, Decimal]:
    """Return the exposure to each client as a share of Tier 1, by name."""
    codes = {value: key[1] for key, value in filing.figures.items() if key[0] == "C_27.00"}
    return {name: filing.figures["C_28.00", code, "c350"] for name, code in codes.items()}


def test_figures_agree_with_the_note():
    stated = {"buffer": BUFFER, "outflow": OUTFLOW, "cet1": CET1, "lcr": LCR}
    checked, dropped = Counter(), Counter()
    for filing in filings()[:360]:
        for name, value in filing.note.states.items():
            if name in stated:
                shown = filing.figures[stated[name]]
                assert abs(shown - value) <= (100_000 if value > 10 else 0), (filing.note.id, name)
                checked[name] += 1
        assert filing.note.clients.keys() <= clients_of(filing).keys()
        dropped.update(filing.dropped)
        if filing.note.kind == "waiver":
            assert filing.bank.scope == "IND"
    assert checked["buffer"] > 20 and checked["outflow"] > 5 and checked["cet1"] > 1 and sum(dropped.values()) <= 5
    note = next(note for note in hand_notes("train") if note.id == "train-a-009")
    (filing,) = make_filings(5, 0, 1, FULL, note)
    amounts = {value for (table, _, column), value in filing.figures.items() if (table, column) == ("C_28.00", "c330")}
    assert {27_000_000, 19_000_000} <= amounts and filing.period == note.period


def test_figures_alone_do_not_reveal_the_facts():
    """For each kind of note, a logistic regression on the figures alone is near chance (AUC 0.5)."""
    kinds = {"pledged": "liquidity", "own_shares": "capital", "profit": "capital"}
    legs = [(("C_03.00", f"r{row:04}", "c0010"), ("C_03.00", f"r{limit:04}", "c0010")) for row, limit in RATIOS]
    rows: dict[str, list[list[float]]] = {}
    truths: dict[str, list[bool]] = {}
    for filing in filings():
        groups = {kinds.get(fact.kind, fact.kind) for fact in filing.note.facts}
        if len(groups) == 1:
            figures = filing.figures
            shares = sorted((value for key, value in figures.items() if key[2] == "c350"), reverse=True)
            margins = [figures[ratio] - figures.get(limit, 0) for ratio, limit in legs]
            sizes = [numpy.log10(float(figures.get(cell, 1))) for cell in (BUFFER, CET1)]
            values = [figures.get(LCR, 0), min(margins), sum(shares[:2]), sum(shares), len(shares), *sizes]
            rows.setdefault(*groups, []).append([float(value) for value in values])
            truths.setdefault(*groups, []).append(any(fact.applies for fact in filing.note.facts))
    assert set(rows) == {"liquidity", "capital", "connected", "waiver"}
    for kind, features in rows.items():
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=500))
        scores = cross_val_predict(model, numpy.array(features), truths[kind], cv=5, method="decision_function")
        assert abs(roc_auc_score(truths[kind], scores) - 0.5) < 0.16, kind


def test_planted_problems_violate_many_different_rules():
    counts = Counter()
    for index in range(40):
        for filing in make_filings(7, index, 2, FULL):
            results = evaluate(as_report(filing.bank, filing.period, filing.figures, filing.figures))
            counts.update({result.rule_id for result in results if result.state == "violated"} or ["clean"])
            counts["triggers"] += any(result.state == "triggered" for result in results)
    kinds = Counter(rule.kind for rule in built_in_rules() if counts[rule.id])
    assert kinds["filing"] > 12 and kinds["breach"] > 10
    assert 15 < counts["clean"] < 45 and counts["triggers"] > 30


def test_previous_quarter_differs_little():
    moves = []
    for index in range(25):
        before, now = make_filings(6, index, 2, FULL)
        assert before.period < now.period and before.bank == now.bank and before.note.id == ""
        if LCR in before.figures and LCR in now.figures:
            moves.append(abs(now.figures[LCR] - before.figures[LCR]))
    assert sorted(moves)[len(moves) // 2] < Decimal("0.06")  # independent draws would differ by 0.15
