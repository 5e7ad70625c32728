"""Find tells: features of a report without its digits that occur only in reports with violations, or only in clean ones.

A feature is that a cell is reported, that it is not although its table is, that a figure is negative, or the form of a
figure with every digit read as 9. The first three are no tell in a report where a violated rule reads the cell: there they
are the violation itself.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from eval.asked_examples import report_of
from xbrl.read.printed_cells import printed_cells
from xbrl.read.render import cell_name
from xbrl.rules.rules import built_in_rules

# A deficit in the row of the surplus is the breach itself (CRR Art. 92).
_SURPLUS = {"CET1_MIN": "r0020", "T1_MIN": "r0040", "TC_MIN": "r0060"}


def find_tells(examples: Sequence[dict], least: int = 20, chance: float = 1e-4) -> dict[str, tuple[int, int]]:
    """One-sided feature -> (number of clean reports, number of reports with violations) that have it.

    Only features of `least` or more reports count, and only if a feature that has nothing to do with violations would be
    so one-sided with a probability below `chance`.
    """
    labels = [bool(example["violations"]) for example in examples]
    share = sum(labels) / len(labels)
    cells = [printed_cells(report_of(example)) for example in examples]
    known = Counter(cell for one in cells for cell in one)
    counts: dict[str, Counter[str]] = {}
    for example, figures, violated in zip(examples, cells, labels, strict=True):
        own = _cells_of(example["violations"])
        kinds = {feature: "explained" for feature, cell in _features(figures, known) if cell in own}
        others = {feature for feature, cell in _features(figures, known) if cell not in own}
        for feature, kind in (kinds | dict.fromkeys(others, "violated" if violated else "clean")).items():
            counts.setdefault(feature, Counter())[kind] += 1
    one_sided = {
        feature: (number["clean"], number["violated"])
        for feature, number in sorted(counts.items())
        if not number["clean"] or not number["violated"] + number["explained"]
    }
    return {
        feature: (clean, violated)
        for feature, (clean, violated) in one_sided.items()
        if clean + violated >= least and (share**violated if violated else (1 - share) ** clean) < chance
    }


def _features(figures: Mapping[str, str], known: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """(feature, its cell) of one report. `known` has all cells of the corpus."""
    tables = {cell.rpartition(" c")[0].rpartition(" r")[0] or cell.rpartition(" c")[0] for cell in figures}
    for cell in known:
        value = figures.get(cell)
        if value is None:
            if any(cell.startswith(f"{table} ") for table in tables):
                yield f"{cell} is not reported", cell
            continue
        yield f"{cell} is reported", cell
        if value.startswith("-"):
            yield f"{cell} is negative", cell
        yield f"a figure like {re.sub('[0-9]+', '9', value)}", ""


def _cells_of(rules: Collection[str]) -> set[str]:
    """The printed names of the cells that the violated `rules` read."""
    names = set()
    for rule in built_in_rules():
        if rule.id in rules:
            names |= {cell_name(cell).replace(" * ", " ") for cell in rule.cells}
    names |= {f"C 03.00 {row} c0010" for rule, row in _SURPLUS.items() if rule in rules}
    return names
