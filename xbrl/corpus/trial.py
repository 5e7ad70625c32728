"""Evaluate the rules on generated figures before they are written to files.

The generator uses this to accept or reject a candidate report. The labels of the examples do not come from here: they
come from the files that were written and read back.
"""

import pathlib
import re
from collections.abc import Iterable
from decimal import Decimal

from xbrl.corpus.banks import Bank
from xbrl.corpus.reporting import Figures
from xbrl.corpus.rounding import exponent
from xbrl.read.report import Fact, Report, template_of
from xbrl.rules.rules import Rule, evaluate, violations


def violated(bank: Bank, period: str, figures: Figures, rules: Iterable[Rule] | None = None) -> set[str]:
    """The ids of the rules that these figures violate."""
    return {result.rule_id for result in violations(evaluate(as_report(bank, period, figures, figures), rules))}


def violates(bank: Bank, period: str, figures: Figures, rule: Rule) -> bool:
    """Whether these figures violate `rule`.

    This is faster than `violated`, because only the cells that the rule reads become facts.
    """
    open_tables = {table for table, row, _ in rule.cells if row == "*"}
    read = {key: figures[key] for key in rule.cells if key in figures}
    read |= {key: value for key, value in figures.items() if key[0] in open_tables} if open_tables else {}
    return bool(violations(evaluate(as_report(bank, period, read, figures), [rule])))


def as_report(bank: Bank, period: str, read: Figures, figures: Figures) -> Report:
    """A report whose facts are the figures `read`. Its filing indicators cover every table of `figures`.

    A row that is not of the form `r0010` is the key of a row in an open table.
    """
    facts = []
    for (table, row, column), value in read.items():
        unit, decimals = None, None
        if isinstance(value, Decimal):
            is_ratio = exponent(value) < 0
            unit, decimals = ("xbrli:pure", bank.ratio_decimals) if is_ratio else (bank.currency, bank.decimals)
        keys, place = {}, (table, row, column)
        if not re.fullmatch(r"r\d+", row):
            keys, place = {"qINC": row}, (table, "*", column)
        facts.append(Fact("", value, unit, decimals, bank.entity, period, keys, place))
    indicators = {template_of(table): True for table, _, _ in figures}
    return Report(pathlib.Path(), "", bank.entity, period, bank.currency, indicators, tuple(facts), ())
