"""95% intervals of the metrics of one evaluation, and of their change between two.

Examples of one origin are alike, so everything is computed over clusters (`cluster` of the answers) with all of their examples. A
proportion has Wilson's interval, every other metric a bootstrap's, which draws whole clusters. For 1 of 20 a percentile bootstrap
gives 0 to 0.150; of 20 answers of which 5% are right, it covers the truth in 61% of all samples, and Wilson's interval in 91%
(docs/LOG.md).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from eval.asked_examples import UNREADABLE
from eval.bootstrap import Interval, bootstrap, sum_clusters

Z = 1.959964  # two-sided 95% of the normal distribution


@dataclass(frozen=True)
class Terms:
    """A metric as a function of sums over units (examples, texts, questions).

    rows: `(units, columns)`, the contribution of each unit to each sum. clusters: one key per unit. metric: sums
    `(..., columns)` -> values `(...)`. bounded: whether the metric lies between 0 and 1. seeds: the metric of each training run
    whose rows are averaged in `rows`; empty for a program that is not trained.
    """

    rows: np.ndarray
    clusters: Sequence[Hashable]
    metric: Callable[[np.ndarray], np.ndarray]
    bounded: bool = True
    seeds: tuple[float, ...] = ()

    @property
    def n(self) -> int:
        """The number of independent observations: the clusters with a row that is not all zero; at least 1."""
        return len({key for key, row in zip(self.clusters, self.rows, strict=True) if row.any()}) or 1

    @property
    def value(self) -> float:
        """The metric over all units."""
        return float(self.metric(self.rows.sum(axis=0)))

    @property
    def is_at_bound(self) -> bool:
        """Whether a metric between 0 and 1 is 0 or 1, where neither a bootstrap nor pairing sees any variation."""
        return self.bounded and self.value in (0.0, 1.0)

    @property
    def is_proportion(self) -> bool:
        """Whether the metric is the fraction of units that are right: each row is (0, 1), (1, 1) or, for no unit, (0, 0).

        If the rows are means over seeds, a unit is right in a whole number of them.
        """
        if self.metric is not ratio or not self.bounded:
            return False
        right, counted = self.rows.T
        runs_right = right * max(1, len(self.seeds))
        is_part = (right >= 0) & (right <= counted) & np.isclose(runs_right, runs_right.round())
        return bool((is_part & np.isin(counted, (0, 1))).all())

    def residuals(self) -> np.ndarray:
        """Return by how much each cluster of a proportion has more right units than its share, `(clusters,)`."""
        right, counted = sum_clusters(self.rows, self.clusters).T
        return right - self.value * counted


def intervals(result: dict) -> dict[str, Interval]:
    """Return the interval of each metric of a result that is known per example.

    A metric of a single cluster is left out: a bootstrap would claim that all clusters are equal.
    """
    return {name: interval(terms) for name, terms in terms_of(result).items() if len({*terms.clusters}) > 1}


def paired_change(before: dict, after: dict) -> dict[str, Interval]:
    """Return the change of each metric that both results have, with the interval of a paired bootstrap (`change`).

    The caller makes sure that the examples are the same. The loss is left out if the tokenizers differ, because nats per token
    cannot be compared then. The bounds are NaN for a single cluster.
    """
    old, new = terms_of(before), terms_of(after)
    if "loss" in old.keys() & new.keys() and not np.array_equal(old["loss"].rows[:, 1], new["loss"].rows[:, 1]):
        del old["loss"]
    same_answers = before.get("answers") == after.get("answers")
    shared = [name for name in old if name in new and len(old[name].rows) == len(new[name].rows)]
    changes = {name: change(old[name], new[name], same_answers) for name in shared}
    alone = [name for name in shared if len({*new[name].clusters}) < 2]
    return changes | {name: Interval(changes[name].value, math.nan, math.nan) for name in alone}


def interval(terms: Terms) -> Interval:
    """Return the metric with Wilson's interval if it is a proportion, or 0 or 1 at a bound; else with the bootstrap's."""
    if terms.is_at_bound or terms.is_proportion:
        return _wilson(terms)
    return bootstrap(terms.rows, lambda sums: {"value": terms.metric(sums)}, clusters=terms.clusters)["value"]


def change(before: Terms, after: Terms, same_answers: bool = False) -> Interval:
    """Return the change of a metric between two results on the same units, with its paired interval.

    Two proportions have Newcombe's interval for pairs (1998, https://pubmed.ncbi.nlm.nih.gov/9839354/), made of the intervals of
    both values and their correlation over clusters, which is not corrected for continuity. So has a metric of which a value is 0
    or 1, where the correlation is 0. Other metrics have a paired bootstrap's, and so have all with `same_answers`, where the change of a score is 0.
    """
    are_proportions = before.is_proportion and after.is_proportion
    is_at_bound = before.bounded and after.bounded and (before.is_at_bound or after.is_at_bound)
    if (are_proportions or is_at_bound) and not same_answers:
        return _newcombe(interval(before), interval(after), _correlation(before, after) if are_proportions else 0.0)
    columns = before.rows.shape[1]
    side_by_side = np.concatenate([before.rows, after.rows], axis=1)

    def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
        return {"change": after.metric(sums[..., columns:]) - before.metric(sums[..., :columns])}

    return bootstrap(side_by_side, metrics, clusters=after.clusters)["change"]


def _correlation(before: Terms, after: Terms) -> float:
    """Return the correlation of two proportions over their clusters; 0 if one of them does not vary."""
    first, second = before.residuals(), after.residuals()
    norm = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / norm if norm else 0.0


def _newcombe(old: Interval, new: Interval, correlation: float) -> Interval:
    def distance(of_new: float, of_old: float) -> float:
        return math.sqrt(max(0.0, of_new**2 - 2 * correlation * of_new * of_old + of_old**2))

    change = new.value - old.value
    low = distance(new.value - new.low, old.high - old.value)
    high = distance(new.high - new.value, old.value - old.low)
    return Interval(change, max(-1.0, change - low), min(1.0, change + high))


def _wilson(terms: Terms) -> Interval:
    """Return Wilson's (1927) interval of a proportion, or of a metric that is 0 or 1.

    If units of a cluster are alike, n is the effective sample size (Korn and Graubard, 1999): as many independent units would have
    the variance of the clusters. At 0 and 1, where clusters show no variance, it is the number of clusters, as if each were right
    or wrong as a whole.
    """
    share, n = terms.value, float(terms.n)
    if not terms.is_at_bound:
        residuals, units = terms.residuals(), float(terms.rows[:, 1].sum())
        independent = share * (1 - share) * units  # the sum of squares if the units of a cluster were independent
        n = units * independent / max(independent / max(1, len(terms.seeds)), float(residuals @ residuals))
    middle, half = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Interval(share, max(0.0, (middle - half) / (1 + Z**2 / n)), min(1.0, (middle + half) / (1 + Z**2 / n)))


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return the ratio of two sums `(..., 2)`; 0 if the second is 0."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-9)


def terms_of(result: dict) -> dict[str, Terms]:
    """Return the terms of the metrics that a result has per example.

    These are `own/NAME` (the scores of the user's metric), `exact_match`, `rouge_l` and `loss`. Answers with the labels `true`
    and `predicted` have `f1`, `exact` and `pairs`. They may count further items: a field of three integers, [right, true,
    claimed], gives an F1 under its name without a final s, such as `field_f1` for `fields`.
    """
    answers, losses = result.get("answers") or (), result.get("losses") or ()
    clusters = clusters_of(answers)
    terms: dict[str, Terms] = {}
    for name, values in (result.get("metric") or {}).get("each", {}).items():
        is_share = all(0 <= value <= 1 for value in values)
        terms[f"own/{name}"] = Terms(_array((value, 1) for value in values), clusters, ratio, bounded=is_share)
    if answers and all("true" in answer for answer in answers):
        terms["f1"] = Terms(_array(map(_f1_terms, answers)), clusters, ratio)
        terms["exact"] = Terms(_array((_is_exact(answer), 1) for answer in answers), clusters, ratio)
        for name in answers[0]:
            counts = [answer.get(name) for answer in answers]
            if all(isinstance(triple, list) and [*map(type, triple)] == [int] * 3 for triple in counts):
                rows = _array((2 * right, true + claimed) for right, true, claimed in counts)
                terms[f"{name.removesuffix('s')}_f1"] = Terms(rows, clusters, ratio)
        terms |= _pair_terms(answers, clusters)
    if answers and all("exact" in answer for answer in answers):
        terms["exact_match"] = Terms(_array((answer["exact"], 1) for answer in answers), clusters, ratio)
    if answers and all("rouge_l" in answer for answer in answers):
        terms["rouge_l"] = Terms(_array((answer["rouge_l"], 1) for answer in answers), clusters, ratio)
    if losses:
        if len(clusters) != len(losses):  # some examples are texts, which have a loss and no answer
            clusters = [f"example {i}" for i in range(len(losses))]
        terms["loss"] = Terms(_array(losses), clusters, ratio, bounded=False)
    return terms


def clusters_of(answers: Sequence[dict]) -> list[Hashable]:
    """Return the cluster of each answer. An answer without one is a cluster of its own."""
    return [f"example {i}" if a.get("cluster") is None else a["cluster"] for i, a in enumerate(answers)]


def _array(rows) -> np.ndarray:  # noqa: ANN001
    return np.array(list(rows), dtype=float)


def labels(answer: dict) -> tuple[set[str], set[str]]:
    """Return (true labels, predicted labels) of an answer. An unreadable answer predicts `UNREADABLE`, which is never true."""
    predicted = set(answer["predicted"] or ())
    return set(answer["true"]), predicted | ({UNREADABLE} if answer.get("unreadable") else set())


def _f1_terms(answer: dict) -> tuple[int, int]:
    """Return one example's part of the numerator and of the denominator of F1 = 2 TP / (true + predicted)."""
    true, predicted = labels(answer)
    return 2 * len(true & predicted), len(true) + len(predicted)


def _is_exact(answer: dict) -> bool:
    true, predicted = labels(answer)
    return answer["predicted"] is not None and true == predicted


def _pair_terms(answers: Sequence[dict], clusters: Sequence) -> dict[str, Terms]:
    """Return the terms of `pairs`: one row per minimal pair, in the cluster of its first example. {} without pairs."""
    members: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        if answer.get("pair"):
            members.setdefault(answer["pair"], []).append(i)
    pairs = [pair for pair in members.values() if len(pair) == 2]
    rows = [(all(_is_exact(answers[i]) for i in pair), 1) for pair in pairs]
    return {"pairs": Terms(_array(rows), [clusters[pair[0]] for pair in pairs], ratio)} if pairs else {}
