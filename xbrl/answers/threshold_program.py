"""A baseline that compares printed percentages with cuts: for each rule the one comparison that fits the training reports.

A comparison is `x < cut` or `x > cut`. x is a printed percentage, or the sum or the difference of two. It knows no law: the
cuts are learned. A label that is printed several times (the rows of an open table) stands for its smallest and its largest
percentage.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xbrl.answers.printed_figures import printed_figures

MAX_PAIRED = 24  # the labels that most training reports print are combined in pairs
MIN_REPORTS = 5  # a label is read if so many training reports print it


@dataclass(frozen=True)
class _Comparison:
    """`sign * feature >= cut`, and how often it was right in training."""

    feature: int
    sign: int
    cut: float
    true_positives: int
    predicted: int
    f1: float


def threshold_predictions(
    training: Sequence[str], violated: Sequence[Sequence[str]], reports: Sequence[str]
) -> list[tuple[str, ...]]:
    """The rules that the program finds in each of `reports`. `violated` has the rule ids of each training report.

    A rule gets the comparison with the best F1 on the training reports. The rules are then taken in the order of that F1 for
    as long as the micro-averaged F1 on the training reports grows.
    """
    rules = sorted({rule for one in violated for rule in one})
    if not rules:
        return [()] * len(reports)
    percentages = [_percentages(report) for report in training]
    counts = Counter(label for one in percentages for label in one)
    labels = [label for label, count in counts.most_common() if count >= MIN_REPORTS]
    true = np.array([[rule in one for rule in rules] for one in map(set, violated)])
    best = _best_comparisons(_features(percentages, labels), true)
    kept = _worth_keeping(best, true.sum(axis=0))
    features = _features([_percentages(report) for report in reports], labels)
    hits = {i: best[i].sign * features[:, best[i].feature] >= best[i].cut for i in kept}
    return [tuple(rules[i] for i in sorted(kept) if hits[i][row]) for row in range(len(reports))]


def _percentages(report: str) -> dict[str, float]:
    """Label -> percentage. A label with several percentages has the entries `smallest` and `largest`."""
    values: dict[str, list[float]] = {}
    for figure in printed_figures(report):
        if figure.percent is not None:
            values.setdefault(figure.label, []).append(figure.percent)
    return {f"smallest {k}": min(v) for k, v in values.items()} | {f"largest {k}": max(v) for k, v in values.items()}


def _features(percentages: Sequence[dict[str, float]], labels: Sequence[str]) -> np.ndarray:
    """`(reports, features)`: each label, then sums and differences of pairs; NaN where a report prints no such figure."""
    single = np.array([[one.get(label, np.nan) for label in labels] for one in percentages]).reshape(
        len(percentages), len(labels)
    )
    columns = [single]  # none at all if no report prints percentages
    for i, j in itertools.combinations(range(min(MAX_PAIRED, len(labels))), 2):
        columns.append(np.stack([single[:, i] + single[:, j], single[:, i] - single[:, j]], axis=1))
    return np.concatenate(columns, axis=1)


def _best_comparisons(features: np.ndarray, true: np.ndarray) -> list[_Comparison]:
    """For each rule, the comparison with the best F1. features: `(reports, features)`; true: `(reports, rules)`."""
    best = [_Comparison(0, 1, np.inf, 0, 0, 0.0) for _ in range(true.shape[1])]
    totals = true.sum(axis=0)
    for feature, sign in itertools.product(range(features.shape[1]), (1, -1)):
        values = sign * features[:, feature]
        order = np.argsort(-values, kind="stable")[: np.isfinite(values).sum()]  # NaN comes last
        ordered = values[order]
        ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # a cut lies between two different values
        if not len(ordered):
            continue
        positives = true[order].cumsum(axis=0)[ends]
        f1 = 2 * positives / (ends[:, None] + 1 + totals)
        for rule, row in enumerate(f1.argmax(axis=0)):
            if f1[row, rule] > best[rule].f1:
                end = ends[row]
                cut = ordered[end] if end + 1 == len(ordered) else (ordered[end] + ordered[end + 1]) / 2
                best[rule] = _Comparison(
                    feature, sign, float(cut), int(positives[row, rule]), int(end + 1), float(f1[row, rule])
                )
    return best


def _worth_keeping(best: Sequence[_Comparison], totals: np.ndarray) -> set[int]:
    """The rules whose comparisons together have the best micro-averaged F1 on the training reports."""
    order = sorted((i for i in range(len(best)) if best[i].f1), key=lambda i: -best[i].f1)
    if not order:
        return set()
    positives = np.cumsum([best[i].true_positives for i in order])
    predicted = np.cumsum([best[i].predicted for i in order])
    return set(order[: int(np.argmax(2 * positives / (predicted + totals.sum()))) + 1])
