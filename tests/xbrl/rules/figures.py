"""Reports made of figures, without files."""

import pathlib
import re
from decimal import Decimal

from xbrl.read.filed_report import CellKey, Fact, Report

PERIOD = "2026-03-31"
TABLES = {
    **{
        "of": "C_01.00",
        "rea": "C_02.00.a",
        "floor": "C_02.00.b",
        "ratio": "C_03.00",
        "memo": "C_04.00",
        "fx": "C_22.00",
    },
    **{
        "lelim": "C_26.00",
        "who": "C_27.00",
        "le": "C_28.00",
        "lev": "C_47.00",
        "lcr": "C_76.00.a",
        "nsfr": "C_84.00.a",
    },
    **{"rsf": "C_84.00.c", "asf": "C_84.00.d", "ass": "F_01.01", "lia": "F_01.02", "equ": "F_01.03", "pl": "F_02.00"},
}


def cell_of(name: str) -> CellKey:
    """Return the cell of a short name: `ratio 10` is C 03.00 r0010 c0010. A column can follow; a row without digits is a key."""
    table, row, *column = name.split()
    digits = 3 if table == "lelim" else 4
    row = f"r{int(row):0{digits}}" if row.isdigit() else row
    code = column[0] if column else "10"
    return TABLES[table], row, code if code.startswith("c") else f"c{int(code):0{digits}}"


def report_of(figures, *, period=PERIOD, filed=None, entity="BANK", unit="iso4217:EUR", decimals=-3) -> Report:
    """Make a report of {cell or its short name: value}.

    A text with % is a ratio to four places, any other text a member. A number is an amount in units of the currency with the
    accuracy `decimals`. `filed` maps templates to their filing indicators.
    """
    facts = []
    for name, value in figures.items():
        table, row, column = cell_of(name) if isinstance(name, str) else name
        is_open = not re.fullmatch(r"r\d+", row)
        keys = ({"qINC": row} | ({"qNCO": "LEI"} if table == "C_27.00" else {})) if is_open else {}
        if not isinstance(value, str):
            content = Decimal(value), unit, decimals
        else:
            content = (Decimal(value[:-1]) / 100, "xbrli:pure", 4) if value.endswith("%") else (value, None, None)
        facts.append(Fact("dp1", *content, entity, period, keys, (table, "*" if is_open else row, column)))
    return Report(pathlib.Path("x"), "xBRL-CSV", entity, period, "EUR", filed or {}, tuple(facts), ())
