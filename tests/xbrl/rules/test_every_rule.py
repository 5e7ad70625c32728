"""Each rule: on both sides of its limit, just within and just beyond its tolerance, and with a missing cell."""

import datetime
from decimal import Decimal

import pytest

from tests.xbrl.rules.figures import PERIOD, report_of
from xbrl.read.dpm import load_cells
from xbrl.rules.rules import built_in_rules, evaluate, violations

FILED = {f"C_{number}.00": True for number in ("01", "02", "03", "04", "22", "26", "27", "28", "47", "76", "84")}
FILED |= {name: True for name in ("F_01.01", "F_01.02", "F_01.03", "F_02.00")}


def judged(rule_id, figures, period=PERIOD):
    """Return the results of a rule. Integers are amounts in thousands."""
    figures = {name: value if isinstance(value, str) else value * 1000 for name, value in figures.items()}
    results = evaluate(report_of(figures, period=period, filed=FILED))
    return [result for result in results if result.rule_id == rule_id]


def state(rule_id, figures, period=PERIOD):
    return next((result.state for result in judged(rule_id, figures, period)), None)


CAPITAL = {"of 20": 100_000, "of 15": 120_000, "of 10": 150_000, "rea 10": 1_000_000}
# rule: (figures that satisfy it, changes that still satisfy it, changes that violate it, state if a cell is missing)
CASES = {
    "CET1_MIN": ({"ratio 10": "4.50%"}, [{"ratio 10": "4.51%"}], [{"ratio 10": "4.49%"}, {"ratio 10": "-7%"}], {"ratio 10": "undecided"}),
    "T1_MIN": ({"ratio 30": "6%"}, [{"ratio 30": "6.01%"}], [{"ratio 30": "5.99%"}, {"ratio 30": "-7%"}], {"ratio 30": "undecided"}),
    "TC_MIN": ({"ratio 50": "8%"}, [{"ratio 50": "8.01%"}], [{"ratio 50": "7.99%"}, {"ratio 50": "-7%"}], {"ratio 50": "undecided"}),
    "TSCR_CET1": ({"ratio 10": "5.62%", "ratio 140": "5.62%"}, [{"ratio 140": "5.61%"}], [{"ratio 10": "5.61%"}], {"ratio 10": "undecided", "ratio 140": "undecided"}),
    "TSCR_T1": ({"ratio 30": "7.5%", "ratio 150": "7.5%"}, [{"ratio 150": "7.49%"}], [{"ratio 150": "7.51%"}], {"ratio 30": "undecided", "ratio 150": "undecided"}),
    "TSCR_TC": ({"ratio 50": "10%", "ratio 130": "10%"}, [{"ratio 50": "10.01%"}], [{"ratio 50": "9.99%"}], {"ratio 50": "undecided", "ratio 130": "undecided"}),
    "OCR_TC": ({"ratio 50": "13.5%", "ratio 160": "13.5%"}, [{"ratio 50": "13.51%"}], [{"ratio 50": "13.49%"}], {"ratio 50": "undecided", "ratio 160": "undecided"}),
    "OCR_CET1": ({"ratio 10": "9%", "ratio 170": "9%"}, [{"ratio 10": "9.01%"}], [{"ratio 10": "8.99%"}], {"ratio 10": "undecided", "ratio 170": "undecided"}),
    "OCR_T1": ({"ratio 30": "11%", "ratio 180": "11%"}, [{"ratio 180": "10.99%"}], [{"ratio 180": "11.01%"}], {"ratio 30": "undecided", "ratio 180": "undecided"}),
    "CBR_CET1": (  # 5% + 40,000 / 1,000,000 = 9%; two ratios are rounded by half a basis point
        {"ratio 10": "9%", "ratio 140": "5%", "memo 740": 40_000, "rea 10": 1_000_000},
        [{"ratio 10": "8.99%"}],
        [{"ratio 10": "8.98%"}, {"ratio 140": "5.02%"}, {"memo 740": 40_200}],
        {"ratio 10": "undecided", "ratio 140": "undecided", "memo 740": "undecided", "rea 10": "undecided"},
    ),
    "CBR_T1": (
        {"ratio 30": "11%", "ratio 150": "7%", "memo 740": 40_000, "rea 10": 1_000_000},
        [{"ratio 30": "10.99%"}],
        [{"ratio 30": "10.98%"}, {"rea 10": 995_000}],
        {"ratio 30": "undecided", "ratio 150": "undecided", "memo 740": "undecided", "rea 10": "undecided"},
    ),
    "LR_MIN": ({"lev 340": "3%"}, [{"lev 340": "3.01%"}], [{"lev 340": "2.99%"}, {"lev 340": "-1%"}], {"lev 340": "undecided"}),
    "LR_TSLRR": ({"lev 340": "3.1%", "lev 420": "3.1%"}, [{"lev 340": "3.11%"}], [{"lev 340": "3.09%"}], {"lev 340": "undecided", "lev 420": "undecided"}),
    "LR_OLRR": (  # without a buffer it equals TSLRR, which another rule tests
        {"lev 340": "3.5%", "lev 440": "3.5%", "lev 420": "3%"},
        [{"lev 340": "3.51%"}, {"lev 340": "3.2%", "lev 420": "3.5%"}],
        [{"lev 340": "3.49%"}, {"lev 340": "2%"}],
        {"lev 340": "undecided", "lev 440": "undecided", "lev 420": "ok"},
    ),
    "LCR_MIN": ({"lcr 30": "100%"}, [{"lcr 30": "100.01%"}], [{"lcr 30": "99.99%"}, {"lcr 30": "-2%"}], {"lcr 30": "undecided"}),
    "NSFR_MIN": ({"nsfr 220 40": "100%"}, [{"nsfr 220 40": "100.01%"}], [{"nsfr 220 40": "99.99%"}], {"nsfr 220 40": "undecided"}),
    "LE_LIMIT": (
        {"le * c350": "25%", "lelim 030 010": "40%"},
        [{"le * c350": "24.99%"}, {"le * c350": "40%", "who * c070": "eba_qTE:qx2056"}],
        [{"le * c350": "25.01%"}, {"le * c350": "40%", "who * c070": "eba_qTE:qx2057"}, {"le * c350": "40.01%", "who * c070": "eba_qTE:qx2056"}],
        {"le * c350": None},
    ),
    "OUTPUT_FLOOR": (  # 55% in 2026, of 1,000,000
        {"rea 10": 550_000, "rea 36": 500_000, "floor 10 20": 1_000_000},
        [{"rea 10": 550_001}, {"floor 10 20": 1_000_001}, {"rea 36": 600_000, "rea 10": 600_000}, {"rea 36": 400_000, "rea 10": 500_000}],
        [{"rea 10": 549_999}, {"floor 10 20": 1_000_002}, {"rea 36": 600_000, "rea 10": 599_998}, {"rea 36": 400_000, "rea 10": 499_997}],
        {"rea 10": "undecided", "rea 36": "undecided", "floor 10 20": "undecided"},
    ),
    "OF_SUM": ({**CAPITAL, "of 750": 30_000}, [{"of 10": 150_001}, {"of 10": 149_999}], [{"of 10": 150_002}, {"of 750": 29_998}], {"of 750": "violated"}),
    "T1_SUM": ({**CAPITAL, "of 530": 20_000}, [{"of 15": 120_001}, {"of 530": 20_001}], [{"of 15": 120_002}, {"of 530": 19_998}], {"of 530": "violated"}),
    "AT1_EXCESS": ({"of 440": -5_000, "of 740": 5_000}, [{"of 740": 5_001}, {"of 440": 0, "of 740": 0}], [{"of 740": 5_002}, {"of 440": 5_000}], {"of 440": "violated", "of 740": "violated"}),
    "CET1_RATIO": ({**CAPITAL, "ratio 10": "10%"}, [{"of 20": 100_050}, {"of 20": 99_950}], [{"of 20": 100_051}, {"of 20": 99_949}], {"ratio 10": "violated"}),
    "T1_RATIO": ({**CAPITAL, "ratio 30": "12%"}, [{"of 15": 120_050}], [{"of 15": 120_051}, {"ratio 30": "12.02%"}], {"ratio 30": "violated"}),
    "TC_RATIO": ({**CAPITAL, "ratio 50": "15%"}, [{"of 10": 149_950}], [{"of 10": 149_949}, {"ratio 50": "15.02%"}], {"ratio 50": "violated"}),
    "CET1_SURPLUS": ({**CAPITAL, "ratio 20": 55_000}, [{"ratio 20": 55_001}, {"ratio 20": 54_999}], [{"ratio 20": 55_002}, {"ratio 20": -55_000}], {"ratio 20": "violated"}),
    "T1_SURPLUS": ({**CAPITAL, "ratio 40": 60_000}, [{"ratio 40": 60_001}, {"ratio 40": 59_999}], [{"ratio 40": 60_002}, {"ratio 40": -60_000}], {"ratio 40": "violated"}),
    "TC_SURPLUS": ({**CAPITAL, "ratio 60": 70_000}, [{"ratio 60": 70_001}, {"ratio 60": 69_999}], [{"ratio 60": 70_002}, {"ratio 60": -70_000}], {"ratio 60": "violated"}),
    "CET1_SIGN": ({"ratio 10": "4.5%", "ratio 20": 10}, [{"ratio 10": "4.4%", "ratio 20": -10}, {"ratio 10": "4.4%", "ratio 20": 0}], [{"ratio 10": "4.49%"}, {"ratio 10": "-2%"}], {"ratio 10": "violated", "ratio 20": "ok"}),
    "T1_SIGN": ({"ratio 30": "6%", "ratio 40": 10}, [{"ratio 30": "5.9%", "ratio 40": -10}, {"ratio 30": "5.9%", "ratio 40": 0}], [{"ratio 30": "5.99%"}, {"ratio 30": "-2%"}], {"ratio 30": "violated", "ratio 40": "ok"}),
    "TC_SIGN": ({"ratio 50": "8%", "ratio 60": 10}, [{"ratio 50": "7.9%", "ratio 60": -10}, {"ratio 50": "7.9%", "ratio 60": 0}], [{"ratio 50": "7.99%"}, {"ratio 50": "-2%"}], {"ratio 50": "violated", "ratio 60": "ok"}),
    "TSCR_FLOOR": ({"ratio 130": "8%"}, [{"ratio 130": "7.996%"}], [{"ratio 130": "7.99%"}, {"ratio 130": "2%"}], {"ratio 130": "undecided"}),
    "TSCR_CET1_FLOOR": ({"ratio 140": "4.5%"}, [{"ratio 140": "4.496%"}], [{"ratio 140": "4.49%"}], {"ratio 140": "undecided"}),
    "TSCR_T1_FLOOR": ({"ratio 150": "6%"}, [{"ratio 150": "5.996%"}], [{"ratio 150": "5.99%"}], {"ratio 150": "undecided"}),
    "OCR_CALC": (
        {"ratio 160": "13.5%", "ratio 130": "10%", "memo 740": 35_000, "rea 10": 1_000_000},
        [{"ratio 160": "13.51%"}, {"ratio 160": "13.49%"}, {"ratio 130": "7%", "ratio 160": "11.5%"}],
        [{"ratio 160": "13.52%"}, {"ratio 160": "13.48%"}, {"memo 740": 35_200}],
        {"ratio 160": "violated", "ratio 130": "violated", "memo 740": "violated", "rea 10": "undecided"},
    ),
    "CCB": ({"memo 750": 25_000, "rea 10": 1_000_000}, [{"rea 10": 1_000_020}, {"rea 10": 999_980}], [{"memo 750": 25_001}, {"rea 10": 1_000_021}], {"memo 750": "violated"}),
    "CBR": (
        {"memo 740": 60, "memo 750": 25, "memo 770": 10, "memo 780": 5, "memo 800": 20, "memo 810": 15},
        [{"memo 740": 62}, {"memo 740": 58}, {"memo 810": 20}],
        [{"memo 740": 63}, {"memo 740": 57}, {"memo 740": 75}, {"memo 810": 24}],
        {"memo 740": "violated", "memo 760": "ok", "memo 800": "violated"},
    ),
    "LR_CALC": ({"lev 300": 1_000_000, "lev 340": "5%", "lev 320": 50_000}, [{"lev 320": 50_050}], [{"lev 320": 50_051}, {"lev 320": 49_949}], {"lev 340": "violated"}),
    "LCR_CALC": ({"lcr 10": 120_000, "lcr 20": 100_000, "lcr 30": "120%"}, [{"lcr 10": 120_006}], [{"lcr 10": 120_007}, {"lcr 30": "120.01%"}], {"lcr 10": "undecided", "lcr 20": "undecided"}),
    "LCR_L1ADJ": ({"lcr 91": 90, "lcr 40": 100, "lcr 50": 20, "lcr 70": 10, "lcr 80": 20}, [{"lcr 91": 92}, {"lcr 91": 88}], [{"lcr 91": 93}, {"lcr 91": 87}], {"lcr 60": "ok", "lcr 40": "violated"}),
    "LCR_INFLOWCAP": ({"lcr 360": 75_000, "lcr 300": 100_000}, [{"lcr 360": 75_000}, {"lcr 300": 99_999}], [{"lcr 360": 75_001}, {"lcr 360": 90_000}], {"lcr 300": "violated", "lcr 360": "ok"}),
    "NSFR_CALC": ({"asf 120 30": 110_000, "rsf 10 20": 100_000, "nsfr 220 40": "110%"}, [{"asf 120 30": 110_006}], [{"asf 120 30": 110_007}], {"nsfr 220 40": "violated"}),
    "LE_PCT": ({"le * c330": 12_000, "le * c350": "10%", "of 15": 120_000}, [{"le * c330": 12_006}], [{"le * c330": 12_007}], {"of 15": "violated", "le * c350": "violated"}),
    "FX_12_5": ({"fx 10 100": 1_250, "fx 10 90": 100}, [{"fx 10 100": 1_256}], [{"fx 10 100": 1_257}, {"fx 10 90": 99}], {"fx 10 90": "violated", "fx 10 100": "violated"}),
    "FX_XTAB": ({"rea 560": 1_250, "fx 10 100": 1_250}, [{"rea 560": 1_251}], [{"rea 560": 1_252}, {"fx 10 100": 1_248}], {"rea 560": "violated"}),
    "FIN_BS": ({"ass 380": 1_000, "equ 300": 90, "lia 300": 910}, [{"ass 380": 1_001}], [{"ass 380": 1_002}, {"lia 300": 908}], {"equ 300": "violated"}),
    "FIN_PL": ({"equ 250": 40, "pl 690": 40}, [{"pl 690": 41}], [{"pl 690": 42}, {"equ 250": -40}], {"pl 690": "violated"}),
    "LE_DEF": ({"le * c230": "9.99%"}, [{"le * c230": "0%"}], [{"le * c230": "10%"}, {"le * c230": "26%"}], {"le * c230": None}),
    "P2G_TC": (
        {"ratio 50": "14%", "ratio 190": "14%", "ratio 160": "13%"},
        [{"ratio 50": "14.01%"}, {"ratio 50": "12.99%"}],
        [{"ratio 50": "13.99%"}, {"ratio 50": "13%"}],
        {"ratio 50": "undecided", "ratio 190": "undecided", "ratio 160": "undecided"},
    ),
    "FX_DEMIN": ({"fx 10 90": 240, "of 10": 150_000}, [{"fx 10 90": 1}], [{"fx 10 90": 241}], {"fx 10 90": "undecided", "of 10": "undecided"}),
}  # fmt: skip
TRIGGERS = {"LE_DEF", "FX_DEMIN", "P2G_TC"}


def test_every_rule_has_a_case_and_cells():
    assert set(CASES) == {rule.id for rule in built_in_rules()}
    cells = load_cells()
    for rule in built_in_rules():
        for key in (*rule.cells, *rule.unless_reported):
            assert cells.by_cell(*key) is not None, (rule.id, key)
    assert [sum(rule.kind == kind for rule in built_in_rules()) for kind in ("breach", "filing", "trigger")] == [
        18,
        28,
        3,
    ]


@pytest.mark.parametrize("rule_id", CASES)
def test_limit_tolerance_and_missing_cells(rule_id):
    base, valid, invalid, missing = CASES[rule_id]
    positive = "triggered" if rule_id in TRIGGERS else "violated"
    assert state(rule_id, base) == "ok"
    for change in valid:
        assert state(rule_id, base | change) == "ok", change
    for change in invalid:
        assert state(rule_id, base | change) == positive, change
    for cell, expected in missing.items():
        assert state(rule_id, {name: value for name, value in base.items() if name != cell}) == expected, cell


@pytest.mark.parametrize(
    ("year", "share"), [(2025, 50), (2026, 55), (2027, 60), (2028, 65), (2029, 70), (2030, "72.5"), (2035, "72.5")]
)
def test_the_output_floor_is_phased_in(year, share):
    floored = int(Decimal(share) * 10_000)
    figures = {"rea 36": 600_000, "floor 10 20": 1_000_000}
    needed = max(floored, 600_000)
    assert state("OUTPUT_FLOOR", {**figures, "rea 10": needed}, f"{year}-12-31") == "ok"
    assert state("OUTPUT_FLOOR", {**figures, "rea 10": needed - 2}, f"{year}-12-31") == "violated"
    assert state("OUTPUT_FLOOR", {**figures, "rea 10": needed}, "2024-12-31") is None


def test_each_large_exposure_has_its_own_limit():
    figures = {"le A c350": "31%", "le B c350": "26%", "le C c350": "24%", "le D c350": "50%", "lelim 030 010": "40%"}
    figures |= {
        f"who {code} c070": f"eba_qTE:{kind}" for code, kind in (("A", "qx2056"), ("B", "qx2057"), ("D", "qx2056"))
    }
    violated = [(result.row, str(result.value), str(result.limit)) for result in judged("LE_LIMIT", figures)]
    assert violated == [("B", "0.26", "0.25"), ("D", "0.5", "0.4")]
    sound = {name: value for name, value in figures.items() if name.split()[1] not in "BD"}
    (met,) = judged("LE_LIMIT", sound)  # one result stands for all clients
    assert (met.state, met.row) == ("ok", "A")


def test_an_exposure_without_share_is_undecided():
    """B reports only its share before mitigation, so it is open whether B keeps to the limit."""
    figures = {"le A c350": "20%", "le B c230": "40%"}
    assert [(result.row, result.state) for result in judged("LE_LIMIT", figures)] == [("B", "undecided")]
    states = [(result.row, result.state) for result in judged("LE_DEF", figures)]
    assert states == [("B", "triggered"), ("A", "undecided")]


def test_institutions_buffer_legs_and_floor_cap_are_judged():
    who = {"who * c070": "eba_qTE:qx2056"}
    assert state("LE_LIMIT", {"le * c350": "25%", **who}) == "ok"
    assert state("LE_LIMIT", {"le * c350": "25.01%", **who}) == "violated"
    exposure = {"le * c350": "20%", "who * c070": "eba_qTE:qx2056", "memo 800": 1_000}
    assert state("LE_LIMIT", exposure) == "ok"  # the report does not say that both are G-SIIs
    missed = {"ratio 10": "5%", "ratio 140": "5%", "memo 740": 40_000, "rea 10": 1_000_000}
    assert (state("CBR_CET1", missed), state("OCR_CET1", missed)) == ("violated", "undecided")
    printed = missed | {"ratio 170": "9%"}
    assert (state("CBR_CET1", printed), state("OCR_CET1", printed)) == (None, "violated")
    figures = {"rea 10": 500_000, "rea 36": 400_000, "floor 10 20": 1_000_000}  # 125% of 400,000
    assert state("OUTPUT_FLOOR", figures, "2029-12-31") == "ok"
    assert state("OUTPUT_FLOOR", figures, "2030-12-31") == "violated"


@pytest.mark.parametrize(
    ("rule_id", "figures", "first"),
    [
        ("LCR_MIN", {"lcr 30": "80%"}, "2018-01-01"),
        ("CCB", {"memo 750": 18_750_000, "rea 10": 1_000_000_000}, "2019-01-01"),  # 1.875% in 2018: CRD Art. 160(4)
        ("NSFR_MIN", {"nsfr 220 40": "80%"}, "2021-06-28"),
        ("LR_MIN", {"lev 340": "2%"}, "2021-06-28"),
        ("LE_LIMIT", {"le * c350": "26%"}, "2021-06-28"),  # before that, of eligible capital
        ("LE_PCT", {"le * c350": "20%", "le * c330": 5_000, "of 15": 10_000}, "2021-06-28"),
        ("LR_OLRR", {"lev 340": "3.4%", "lev 440": "3.5%", "lev 420": "3%"}, "2023-01-01"),
    ],
)
def test_a_minimum_applies_from_its_first_day(rule_id, figures, first):
    assert state(rule_id, figures, first) == "violated"
    before = datetime.date.fromisoformat(first) - datetime.timedelta(1)
    assert state(rule_id, figures, before.isoformat()) is None


@pytest.mark.parametrize(
    ("decimals", "off", "expected"), [(0, 1, "ok"), (0, 2, "violated"), ("INF", 0, "ok"), ("INF", 1, "violated")]
)
def test_a_filing_rule_tolerates_rounding(decimals, off, expected):
    figures = {"of 10": 150_000 + off, "of 15": 120_000, "of 750": 30_000}
    results = evaluate(report_of(figures, filed=FILED, decimals=decimals))
    assert [result.state for result in results if result.rule_id == "OF_SUM"] == [expected]


def test_an_insolvent_bank_has_breaches_without_filing_errors():
    figures = {"of 10": -50_000, "of 15": -70_000, "of 20": -70_000, "of 750": 20_000, "rea 10": 1_000_000}
    figures |= {"ratio 10": "-7%", "ratio 30": "-7%", "ratio 50": "-5%"}
    figures |= {"ratio 20": -115_000, "ratio 40": -130_000, "ratio 60": -130_000}
    figures |= {"ratio 130": "8%", "ratio 140": "4.5%", "ratio 150": "6%", "ratio 160": "10.5%"}
    figures |= {"memo 740": 25_000, "memo 750": 25_000}
    figures |= {"lev 300": 2_000_000, "lev 320": -70_000, "lev 340": "-3.5%", "lev 440": "3%"}
    figures = {name: value if isinstance(value, str) else value * 1000 for name, value in figures.items()}
    violated = violations(evaluate(report_of(figures, filed=FILED)))
    assert {result.kind for result in violated} == {"breach"}
    assert {result.rule_id for result in violated} == {
        *("CET1_MIN", "T1_MIN", "TC_MIN", "TSCR_CET1", "TSCR_T1", "TSCR_TC", "OCR_TC", "LR_MIN", "LR_OLRR"),
        *("CBR_CET1", "CBR_T1"),
    }
