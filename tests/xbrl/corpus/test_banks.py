"""Invented banks: identifiers, requirements, consistent figures, and the errors planted in them."""

import dataclasses
import random
from collections import Counter
from decimal import Decimal
from functools import partial

import pytest

from xbrl.corpus import mutations
from xbrl.corpus.banks import lei, make_bank, requirements
from xbrl.corpus.corpus import (
    LEVELS_OF_SIGN_RULE,
    MAX_VIOLATIONS,
    make_filings,
    quarter_end,
    with_reporting_accuracy,
)
from xbrl.corpus.economics import RatioDistribution, draw_economics, draw_levels, ratios_of
from xbrl.corpus.mutations import (
    COMPOUND_ERRORS,
    ERROR_CELLS,
    FILING_RULES,
    TOLERANCE_CELLS,
    boundary_value,
    move_within_tolerance,
    plant_error,
)
from xbrl.corpus.positions import draw_positions
from xbrl.corpus.profiles import FULL
from xbrl.corpus.reporting import full_figures
from xbrl.corpus.trial import as_report, violated, violates
from xbrl.read.dpm import BUILT_IN, load_cells
from xbrl.rules.rules import built_in_rules, evaluate

RULES = {rule.id: rule for rule in built_in_rules()}


def cells_of(figures, table):
    return {row: value for (code, row, _), value in figures.items() if code == table}


def sound_report(seed, index, **levels):
    """(bank, economics, positions, figures) of a complete report, sound except for `levels`."""
    bank = with_reporting_accuracy(make_bank(seed, index), seed, index)
    for attempt in range(200):
        rng = random.Random(f"{seed} {index} {attempt}")
        economics = draw_economics(rng, bank, bank.trea, levels, RatioDistribution(near_limit=0), has_at1=index % 3 > 0)
        if economics is not None:
            bank_rng = random.Random(f"habit {seed} {index} {attempt}")
            positions = draw_positions(rng, bank_rng, bank, economics, levels, 0, 2026)
            if positions is not None:
                return bank, economics, positions, full_figures(bank_rng, rng, bank, economics, positions)
    raise AssertionError("no bank with these levels in 200 attempts")


@pytest.fixture(scope="module")
def population():
    """(filing, results) of 560 full reports of 140 banks."""
    filings = [filing for index in range(140) for filing in make_filings(1, index, 4, FULL)]
    return [
        (filing, evaluate(as_report(filing.bank, filing.period, filing.figures, filing.figures))) for filing in filings
    ]


def ids(results):
    return {result.rule_id for result in results if result.state == "violated"}


def test_lei_check_digits():
    assert lei("5493000IBP32UQZ0KL") == "5493000IBP32UQZ0KL24"  # an example of ISO 17442
    for entity in (make_bank(3, index).entity for index in range(50)):
        assert int("".join(str(int(character, 36)) for character in entity)) % 97 == 1


def test_banks_are_reproducible_and_have_different_names():
    assert len({make_bank(0, index).name for index in range(3000)}) == 3000
    assert make_bank(0, 7) == make_bank(0, 7) != make_bank(1, 7)


def test_requirements_of_a_bank():
    buffers = {
        "conservation": "0.025",
        "countercyclical": "0.01",
        "systemic_risk": "0",
        "g_sii": "0.01",
        "o_sii": "0.02",
    }
    bank = dataclasses.replace(
        make_bank(0, 0),
        pillar2=Decimal("0.02"),
        leverage_pillar2=Decimal("0.001"),
        buffers={name: Decimal(rate) for name, rate in buffers.items()},
    )
    need = requirements(bank)
    assert (need.tscr, need.tscr_cet1, need.tscr_t1) == (Decimal("0.10"), Decimal("0.0562"), Decimal("0.075"))
    assert need.ocr == Decimal("0.155")  # 10% + 2.5% + 1% + the larger of 1% and 2%
    assert (need.ocr_cet1, need.ocr_t1) == (Decimal("0.1112"), Decimal("0.13"))  # the buffer of 5.5% on top of each
    assert need.tslrr == Decimal("0.031")  # 3% + 0.1%
    assert need.olrr == Decimal("0.036")  # and half of 1%


def test_sound_figures_add_up_and_violate_no_rule():
    for index in range(30):
        bank, economics, positions, figures = sound_report(5, index)
        assert violated(bank, "2026-03-31", figures) == set(), index
        unit = Decimal(10) ** -bank.decimals
        own, risk, ratios = (cells_of(figures, table) for table in ("C_01.00", "C_02.00.a", "C_03.00"))
        items = ("r0030", "r0130", "r0180", "r0200", "r0300", "r0340", "r0370", "r0440")
        assert abs(own["r0020"] - sum(own.get(row, 0) for row in items)) <= 5 * unit
        assert abs(own["r0010"] - own["r0020"] - own.get("r0530", 0) - own.get("r0750", 0)) <= 2 * unit
        assert abs(risk["r0010"] - risk["r0036"] - risk.get("r0035", 0)) <= unit
        assert abs(risk["r0036"] - sum(risk.get(row, 0) for row in ("r0040", "r0520", "r0590", "r0640"))) <= 3 * unit
        assert abs(risk["r0040"] - risk["r0050"] - risk.get("r0240", 0)) <= 2 * unit
        assert abs(ratios["r0010"] - own["r0020"] / risk["r0010"]) < Decimal("0.00006") + unit / risk["r0010"]
        liquidity, assets = cells_of(figures, "C_76.00.a"), cells_of(figures, "F_01.01")
        assert liquidity["r0360"] <= Decimal("0.75") * liquidity["r0300"] + unit
        assert abs(liquidity["r0300"] - liquidity["r0360"] - liquidity["r0020"]) <= 2 * unit
        parts = ("r0010", "r0050", "r0141", "r0181", "r0270", "r0300")
        assert abs(assets["r0380"] - sum(assets.get(row, 0) for row in parts)) <= 4 * unit
        assert 2 <= len(positions.exposures) <= 5
        assert all(exposure.after <= exposure.before for exposure in positions.exposures)


def test_the_output_floor_is_binding_for_some_banks_and_missed_on_request():
    binding = 0
    for index in range(60):
        if not make_bank(5, index).uses_irb:
            continue
        bank, economics, positions, figures = sound_report(5, index)
        binding += positions.unfloored < economics.trea
        assert economics.trea >= min(
            max(positions.unfloored, Decimal("0.55") * positions.standardised), Decimal("1.25") * positions.unfloored
        ).quantize(Decimal(1), "ROUND_FLOOR")
        bank, economics, positions, figures = sound_report(5, index, floor="missed")
        assert economics.trea < Decimal("0.55") * positions.standardised
        assert violated(bank, "2026-03-31", figures) <= {"OUTPUT_FLOOR"}
    assert binding >= 3


def test_ratios_are_within_the_limits_of_their_level():
    bank = make_bank(0, 1)
    bank = dataclasses.replace(
        bank, buffers=bank.buffers | {"g_sii": Decimal("0.01")}, leverage_pillar2=Decimal("0.002")
    )
    need, rng = requirements(bank), random.Random(0)
    limits = {
        "cet1": ("0.045", need.tscr_cet1, need.ocr_cet1),
        "t1": ("0.06", need.tscr_t1, need.ocr_t1),
        "total": ("0.08", need.tscr, need.ocr),
        "leverage": ("0.03", need.tslrr, need.olrr),
    }
    drawn = Counter()
    for _ in range(800):
        levels = draw_levels(rng, 2)
        economics = draw_economics(rng, bank, bank.trea, levels)
        if economics is None:
            continue
        ratios = ratios_of(economics)
        for name, (minimum, own, overall) in limits.items():
            level = levels.get(name, "ok")
            drawn[name, level] += 1
            assert (level == "minimum") == (ratios[name] < Decimal(minimum))
            assert (level in ("minimum", "own")) == (ratios[name] < own)
            assert (level != "ok") == (ratios[name] < overall)
        assert (levels.get("lcr", "ok") == "ok") == (economics.liquid_assets >= economics.net_outflow)
        assert economics.at1 >= 0 and economics.t2 >= 0
    assert sum(drawn.values()) > 4 * 300
    for name in limits:  # every leg is met and missed on purpose
        assert min(drawn[name, level] for level in ("minimum", "own", "overall", "ok")) >= 10, name


def test_a_bank_without_at1_keeps_the_level_of_its_cet1():
    bank, rng = make_bank(0, 1), random.Random(0)
    need, drawn = requirements(bank), 0
    for _ in range(200):
        economics = draw_economics(rng, bank, bank.trea, {"cet1": "overall", "t1": "overall"}, has_at1=False)
        if economics is not None:
            drawn += 1
            assert economics.at1 == 0
            assert need.tscr_cet1 <= economics.cet1 / economics.trea < need.ocr_cet1
    assert drawn > 50


def test_every_figure_has_a_cell_of_its_type_in_the_dpm(population):
    cells = load_cells(BUILT_IN)
    for filing, _ in population[::7]:
        for (table, row, column), value in filing.figures.items():
            cell = cells.by_cell(table, "*" if cells.table(table).keys else row, column)
            kind = (
                "enumeration"
                if isinstance(value, str)
                else "percentage"
                if value.as_tuple().exponent < 0
                else "monetary"
            )
            assert cell.type == kind, (table, row, column)


def test_the_distribution_of_violations_and_banks(population):
    sizes = Counter(len(ids(results)) for _, results in population)
    assert 0.30 <= sizes[0] / len(population) <= 0.40
    assert 7 <= max(sizes) <= MAX_VIOLATIONS and min(sizes[count] for count in range(1, 7)) >= 10
    counts = Counter(rule_id for _, results in population for rule_id in ids(results))
    assert set(counts) == {rule.id for rule in built_in_rules() if rule.kind != "trigger"}
    triggered = Counter(
        result.rule_id for _, results in population for result in results if result.state == "triggered"
    )
    assert set(triggered) == {"LE_DEF", "LE_GSII", "FX_DEMIN", "P2G_TC"}
    absent = Counter(result.rule_id for _, results in population for result in results if result.state == "undecided")
    assert min(absent[rule_id] for rule_id in ("TSCR_CET1", "TSCR_T1", "LR_OLRR", "LCR_CALC", "OUTPUT_FLOOR")) >= 10
    assert absent["LCR_MIN"] == 0  # it is recomputed where its row is left out
    assert {filing.bank.decimals for filing, _ in population} == {0, -3, -4}
    assert {filing.bank.ratio_decimals for filing, _ in population} == {4, 5, 6}
    assert any(filing.unfiled for filing, _ in population)


def test_there_are_near_misses_on_both_sides_of_every_limit(population):
    near = Counter()
    for _, results in population:
        for result in results:
            if result.kind == "breach" and result.value is not None and result.limit:
                wide = result.rule_id.startswith("CBR")  # few banks leave out the cell that these rules stand in for
                close = abs(result.value - result.limit) <= result.limit / (10 if wide else 30)
                near[result.rule_id, result.state] += close
    for rule in built_in_rules():
        if rule.kind == "breach":
            assert near[rule.id, "violated"] >= 1 and near[rule.id, "ok"] >= 1, rule.id


def test_quarters_of_a_bank_are_consistent_and_some_breaches_persist():
    moves, repeats, breaches = [], 0, 0
    for index in range(40):
        filings = make_filings(4, index, 4, FULL)
        assert [filing.period for filing in filings] == sorted(filing.period for filing in filings)
        assert filings[:2] == make_filings(4, index, 2, FULL)
        size = [filing.figures.get(("C_02.00.a", "r0010", "c0010")) for filing in filings]
        for before, now in zip(size, size[1:], strict=False):
            if before and now:
                moves.append(abs(now / before - 1))
        found = [violated(filing.bank, filing.period, filing.figures) for filing in filings]
        breached = [{rule_id for rule_id in one if RULES[rule_id].kind == "breach"} for one in found]
        breaches += sum(bool(one) for one in breached[:-1])
        repeats += sum(bool(one & two) for one, two in zip(breached, breached[1:], strict=False))
    assert max(moves) < Decimal("0.06")
    assert breaches / 5 < repeats < breaches


def test_a_planted_error_violates_its_rule_and_changes_few_figures():
    planted = Counter()
    for index in range(25):
        bank, _, _, figures = sound_report(2, index)
        for rule_id in FILING_RULES:
            rng = random.Random(f"{rule_id} {index}")
            check = partial(violates, bank, "2026-03-31")
            wrong = plant_error(rng, rule_id, figures, partial(check, rule=RULES[rule_id]))
            if wrong is not None:
                planted[rule_id] += 1
                changed = sum(wrong.get(key) != figures.get(key) for key in set(wrong) | set(figures))
                assert changed == 1 if rule_id in ERROR_CELLS else changed <= 5, rule_id
                assert rule_id in violated(bank, "2026-03-31", wrong)
    signs = {"CET1_SIGN", "T1_SIGN", "TC_SIGN"}
    assert set(planted) == set(FILING_RULES) - signs  # these three need a deficit, which a sound report does not have
    assert min(planted.values()) >= 2


@pytest.mark.parametrize("rule_id", LEVELS_OF_SIGN_RULE)
def test_a_deficit_filed_as_a_surplus(rule_id):
    bank, _, _, figures = sound_report(2, 1, **LEVELS_OF_SIGN_RULE[rule_id])
    wrong = COMPOUND_ERRORS[rule_id](random.Random(0), dict(figures)) and plant_error(
        random.Random(0), rule_id, figures, lambda changed: violates(bank, "2026-03-31", changed, RULES[rule_id])
    )
    assert rule_id not in violated(bank, "2026-03-31", figures)
    assert rule_id in violated(bank, "2026-03-31", wrong)


def test_boundary_values_differ_by_one_unit_in_the_last_place():
    bank, _, _, figures = sound_report(2, 4)
    key = ("C_01.00", "r0750", "c0010")
    check = lambda changed: violates(bank, "2026-03-31", changed, RULES["OF_SUM"])  # noqa: E731
    unit = Decimal(10) ** -bank.decimals
    for seed in range(6):
        outside = boundary_value(random.Random(seed), key, figures, check)
        inside = boundary_value(random.Random(seed), key, figures, check, inside=True)
        assert check({**figures, key: outside}) and not check({**figures, key: inside or figures[key]})
        assert abs(outside - (inside or figures[key])) == unit
    n_moved = sum(move_within_tolerance(random.Random(seed), "OF_SUM", figures, check) != figures for seed in range(6))
    assert n_moved >= 3
    assert set(ERROR_CELLS) < set(TOLERANCE_CELLS) and set(mutations.WEIGHTS) == set(FILING_RULES)


def test_quarter_ends():
    assert [quarter_end(quarter) for quarter in (0, 1, 3, 4)] == [
        "2026-03-31",
        "2026-06-30",
        "2026-12-31",
        "2027-03-31",
    ]
