"""Invented banks: identifiers, requirements, and figures that hang together until something is planted."""

import random
from collections import Counter
from decimal import Decimal

import pytest

from data.regulator.banks import Bank, is_lei, lei, make_bank, requirements
from data.regulator.corpus import FULL, SHORT, make_filing, quarter_end, rules_of
from data.regulator.dpm import BUILT_IN, load_cells
from data.regulator.economics import draw_economics, draw_levels
from data.regulator.examples import read_filing
from data.regulator.filing import write_packages
from data.regulator.mutations import plant
from data.regulator.reporting import full_cells
from data.regulator.rules import built_in_rules, evaluate


def cells_of(figures, table):
    return {row: value for (code, row, _), value in figures.items() if code == table}


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    """(figures, reported results) of 300 full reports, through files."""
    folder = tmp_path_factory.mktemp("reports")
    cells = load_cells(BUILT_IN)
    filings = [make_filing(1, index, index % 2, FULL) for index in range(300)]
    files = [write_packages(folder, filing.bank, filing.period, filing.figures, cells) for filing in filings]
    return [
        (filing, evaluate(read_filing(paths, cells), rules_of(FULL)))
        for filing, paths in zip(filings, files, strict=True)
    ]


def violated(results):
    return {result.rule_id for result in results if result.state == "violated"}


def test_lei_check_digits():
    assert lei("5493000IBP32UQZ0KL") == "5493000IBP32UQZ0KL24"  # an example of ISO 17442
    assert is_lei("5493000IBP32UQZ0KL24")
    assert not is_lei("5493000IBP32UQZ0KL42")
    assert all(is_lei(make_bank(3, index).entity) for index in range(50))


def test_names_do_not_repeat():
    assert len({make_bank(0, index).name for index in range(3000)}) == 3000
    assert make_bank(0, 7) == make_bank(0, 7) != make_bank(1, 7)


def test_requirements_of_a_bank():
    need = requirements(make_bank(0, 0).__class__(**{**vars(make_bank(0, 0)), "pillar2": Decimal("0.02"), "leverage_pillar2": Decimal("0.001"), "buffers": dict(conservation=Decimal("0.025"), countercyclical=Decimal("0.01"), systemic_risk=Decimal(0), g_sii=Decimal("0.01"), o_sii=Decimal("0.02"))}))  # fmt: skip
    assert (need.tscr, need.tscr_cet1, need.tscr_t1) == (Decimal("0.10"), Decimal("0.0562"), Decimal("0.075"))
    assert need.ocr == Decimal("0.155")  # 10% + 2.5% + 1% + the larger of 1% and 2%
    assert need.olrr == Decimal("0.036")  # 3% + 0.1% + half of 1%


def test_sound_figures_add_up():
    for index in range(40):
        bank = make_bank(5, index)
        rng = random.Random(index)
        economics = draw_economics(rng, bank, bank.trea, {})
        figures = full_cells(rng, bank, economics)
        unit = Decimal(10) ** -bank.decimals
        own, risk, ratios = (cells_of(figures, table) for table in ("C_01.00", "C_02.00.a", "C_03.00"))
        items = ("r0030", "r0130", "r0180", "r0200", "r0300", "r0340", "r0370")
        assert abs(own["r0020"] - sum(own.get(row, 0) for row in items)) <= 4 * unit
        assert abs(own["r0010"] - own["r0020"] - own.get("r0530", 0) - own.get("r0750", 0)) <= 2 * unit
        assert abs(risk["r0010"] - sum(risk.get(row, 0) for row in ("r0040", "r0520", "r0590", "r0640"))) <= 3 * unit
        assert abs(risk["r0040"] - risk["r0050"] - risk.get("r0240", 0)) <= 2 * unit
        classes = ("r0120", "r0125", "r0140", "r0150")
        assert abs(risk["r0060"] - sum(risk[row] for row in classes)) <= 3 * unit
        assert abs(ratios["r0010"] - own["r0020"] / risk["r0010"]) < Decimal("0.00006")
        leverage, liquidity = cells_of(figures, "C_47.00"), cells_of(figures, "C_76.00.a")
        assert abs(leverage["r0340"] - leverage["r0320"] / leverage["r0300"]) < Decimal("0.00006")
        assert abs(liquidity["r0030"] - liquidity["r0010"] / liquidity["r0020"]) < Decimal("0.0002")
        assert liquidity["r0360"] <= Decimal("0.75") * liquidity["r0300"]  # cap on inflows
        funding = figures["C_84.00.d", "r0120", "c0030"] / figures["C_84.00.c", "r0010", "c0020"]
        assert abs(figures["C_84.00.a", "r0220", "c0040"] - funding) < Decimal("0.0002")


def test_a_level_puts_the_ratio_between_its_limits():
    bank = make_bank(0, 1)
    need, rng = requirements(bank), random.Random(0)
    seen = 0
    for _ in range(300):
        levels = draw_levels(rng, 2)
        economics = draw_economics(rng, bank, bank.trea, levels)
        if economics is None:
            continue
        seen += 1
        cet1, total = economics.cet1 / economics.trea, (economics.cet1 + economics.at1 + economics.t2) / economics.trea
        level = levels.get("cet1", "ok")
        assert (level == "minimum") == (cet1 < Decimal("0.045"))
        assert (level == "ok") == (cet1 >= need.tscr_cet1)
        assert (levels.get("total", "ok") == "ok") == (total >= need.ocr)
        assert (levels.get("lcr", "ok") == "ok") == (economics.liquid_assets >= economics.net_outflow)
        assert economics.at1 >= 0 and economics.t2 >= 0
    assert seen > 150


def test_every_cell_is_in_the_dpm_with_its_type(population):
    cells = load_cells(BUILT_IN)
    for filing, _ in population:
        for key, value in filing.figures.items():
            assert (cells.by_cell(*key).type == "percentage") == (value.as_tuple().exponent < 0), key


def test_the_mix_of_reports(population):
    sizes = Counter(len(violated(results)) for _, results in population)
    assert 0.30 <= sizes[0] / len(population) <= 0.42
    assert max(sizes) == 4 and min(sizes[count] for count in range(1, 5)) >= 15
    counts = Counter(rule_id for _, results in population for rule_id in violated(results))
    assert set(counts) == {rule.id for rule in rules_of(FULL)}
    assert min(counts.values()) >= 9  # no rule is rare: 3% of the reports
    undecided = Counter(
        result.rule_id for _, results in population for result in results if result.state == "undecided"
    )
    assert min(undecided[rule_id] for rule_id in ("CET1_MIN", "TSCR_TC", "LR_OLRR", "LCR_MIN", "NSFR_MIN")) >= 3


def test_near_misses_lie_on_both_sides_of_every_limit(population):
    near = Counter()
    for _, results in population:
        for result in results:
            if (
                result.kind == "breach"
                and result.state != "undecided"
                and abs(result.value - result.limit) <= Decimal("0.001")
            ):
                near[result.rule_id, result.state] += 1
    for rule in rules_of(FULL):
        if rule.kind == "breach":
            assert near[rule.id, "violated"] >= 1 and near[rule.id, "ok"] >= 1, rule.id


def test_no_silence_hides_what_the_amounts_show(population):
    """A ratio that is not filed is sound: recomputed from the amounts it meets its minimum."""
    hidden = 0
    for filing, _ in population:
        figures = filing.figures
        for table, row, amount, minimum in (("C_03.00", "r0010", "r0020", "0.045"), ("C_03.00", "r0030", "r0015", "0.06"), ("C_03.00", "r0050", "r0010", "0.08")):  # fmt: skip
            if (table, row, "c0010") not in figures:
                hidden += 1
                assert figures["C_01.00", amount, "c0010"] >= Decimal(minimum) * figures["C_02.00.a", "r0010", "c0010"]
    assert hidden >= 5


@pytest.mark.parametrize("rule_id", ["OF_SUM", "T1_SUM", "LCR_CALC"])
def test_a_planted_error_changes_one_figure_and_violates_its_rule_only(rule_id, tmp_path):
    cells = load_cells(BUILT_IN)
    for index in range(20):
        rng = random.Random(f"{rule_id} {index}")
        bank = make_bank(2, index)
        sound = full_cells(rng, bank, draw_economics(rng, bank, bank.trea, {}, near=0))
        wrong = plant(rng, rule_id, sound)
        assert sum(wrong.get(key) != sound.get(key) for key in set(wrong) | set(sound)) == 1
        paths = write_packages(tmp_path, bank, "2026-03-31", wrong, cells)
        assert rule_id in violated(evaluate(read_filing(paths, cells), rules_of(FULL)))
        paths = write_packages(tmp_path, bank, "2026-03-31", sound, cells)
        assert violated(evaluate(read_filing(paths, cells), rules_of(FULL))) == set()


def test_the_short_profile_files_few_figures():
    for index in range(60):
        filing = make_filing(0, index, 0, SHORT)
        assert 4 <= len(filing.figures) <= 6
        assert isinstance(filing.bank, Bank)


def test_quarter_ends():
    assert [quarter_end(quarter) for quarter in (0, 1, 3, 4)] == [
        "2026-03-31",
        "2026-06-30",
        "2026-12-31",
        "2027-03-31",
    ]
