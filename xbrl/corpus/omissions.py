"""Remove figures from a generated report: modules and templates that a bank does not file, details and optional figures.

`bank_rng` yields the same values in every quarter of a bank, `rng` different ones for each report.
"""

import random

from xbrl.corpus.banks import Bank
from xbrl.corpus.reporting import Figures
from xbrl.corpus.trial import violated
from xbrl.read.report import template_of
from xbrl.rules.rules import built_in_rules

# (probability that a bank files the module, its templates). Drawn once per bank.
MODULES = (
    (0.93, ("C_47.00",)),
    (0.93, ("C_76.00",)),
    (0.88, ("C_84.00",)),
    (0.6, ("C_26.00", "C_27.00", "C_28.00")),
    (0.45, ("F_01.01", "F_01.02", "F_01.03", "F_02.00")),
)
# (probability that a filed template is missing, template). Drawn for each report. `quality.MANDATORY` has no place here.
MISSING_TEMPLATES = ((0.05, "C_22.00"),)
# Figures that rules read but that may be missing without an error: the bank's own requirements and the LCR. Without the
# CET1 or Tier 1 part of OCR the rules derive it.
OMITTABLE = (
    *(("C_03.00", row, "c0010") for row in ("r0140", "r0150", "r0170", "r0180", "r0170", "r0180")),
    *(("C_47.00", "r0440", "c0010"), ("C_76.00.a", "r0030", "c0010")),
)
MAX_FIGURES = 74  # a report and its answer then fit into 4,096 tokens


def omit_templates(rng: random.Random, bank_rng: random.Random, figures: Figures) -> tuple[Figures, tuple[str, ...]]:
    """Remove modules that this bank never files, and sometimes a template. Returns (figures, templates not filed)."""
    missing = {template for share, templates in MODULES if bank_rng.random() >= share for template in templates}
    unfiled = {template for share, template in MISSING_TEMPLATES if rng.random() < share}
    kept = {key: value for key, value in figures.items() if template_of(key[0]) not in missing | unfiled}
    filed = {template_of(table) for table, _, _ in figures} - missing
    return kept, tuple(sorted(filed & unfiled))


def omit_details(bank_rng: random.Random, figures: Figures) -> Figures:
    """Keep only some of the figures that no rule reads.

    The fraction is fixed per bank. `MAX_FIGURES` limits the size of the whole report. A template keeps one figure.
    """
    read = {cell for rule in built_in_rules() for cell in rule.cells}
    others = [key for key in figures if key not in read and (key[0], "*", key[2]) not in read]
    kept = round(len(others) * bank_rng.choice((0.25, 0.5, 0.75, 1.0)))
    kept = max(0, min(kept, MAX_FIGURES - (len(figures) - len(others))))
    order = {key: bank_rng.random() for key in sorted(others)}
    templates_read = {template_of(key[0]) for key in figures.keys() - set(others)}
    only = {template_of(key[0]): key for key in others if template_of(key[0]) not in templates_read}
    order |= dict.fromkeys(only.values(), -1.0)
    kept = max(kept, len(only))
    omitted = set(sorted(others, key=order.__getitem__)[kept:])
    return {key: value for key, value in figures.items() if key not in omitted}


def omit_optional(rng: random.Random, bank: Bank, period: str, figures: Figures) -> Figures:
    """Remove up to two `OMITTABLE` figures. The LCR is removed only if that does not change the violations."""
    for key in rng.sample(OMITTABLE, rng.choice((0, 0, 0, 1, 1, 2))):
        fewer = {other: value for other, value in figures.items() if other != key}
        if key[0] != "C_76.00.a" or violated(bank, period, figures) == violated(bank, period, fewer):
            figures = fewer
    return figures
