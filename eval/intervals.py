"""95% intervals of the metrics of one evaluation, and of their change between two.

Examples of one bank are alike, so the bootstrap draws whole banks (`cluster` of the answers) with all of their examples. At
0% and 100% a bootstrap sees no variation at all: there the interval is Wilson's, on as many observations as there are banks,
as if each bank were either right or wrong.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from eval.asked_examples import UNREADABLE
from eval.bootstrap import Interval, bootstrap

Z = 1.959964  # two-sided 95% of the normal distribution


@dataclass(frozen=True)
class Terms:
    """A metric as a function of sums over units (reports, texts, questions).

    rows: `(units, columns)`, what each unit adds to each sum. clusters: one key per unit. metric: sums `(..., columns)` ->
    values `(...)`. bounded: whether it lies between 0 and 1. seeds: the values of the single training runs that `rows` are
    the mean of; empty for what is not trained.
    """

    rows: np.ndarray
    clusters: Sequence[Hashable]
    metric: Callable[[np.ndarray], np.ndarray]
    bounded: bool = True
    seeds: tuple[float, ...] = ()

    @property
    def n(self) -> int:
        """The number of independent observations: the clusters that say something about the metric; at least 1."""
        return len({key for key, row in zip(self.clusters, self.rows, strict=True) if row.any()}) or 1

    @property
    def value(self) -> float:
        """The metric over all units."""
        return float(self.metric(self.rows.sum(axis=0)))


def intervals(result: dict) -> dict[str, Interval]:
    """The metrics of a result of scripts/evaluate.py that are known per example, each with its interval.

    None for one bank or one example, which says nothing of others: a bootstrap would say that all are like it.
    """
    return {name: interval(terms) for name, terms in terms_of(result).items() if len({*terms.clusters}) > 1}


def paired_change(before: dict, after: dict) -> dict[str, Interval]:
    """The change of each metric that both results have, with the interval of a paired bootstrap (`change`).

    The caller makes sure that the examples are the same. Nats per token of two tokenizers have no change. The bounds are no
    numbers for one bank or one example.
    """
    old, new = terms_of(before), terms_of(after)
    if "loss" in old.keys() & new.keys() and not np.array_equal(old["loss"].rows[:, 1], new["loss"].rows[:, 1]):
        del old["loss"]
    same_answers = before.get("answers") == after.get("answers")
    shared = [name for name in old if name in new and len(old[name].rows) == len(new[name].rows)]
    found = {name: change(old[name], new[name], same_answers) for name in shared}
    alone = [name for name in shared if len({*new[name].clusters}) < 2]
    return found | {name: Interval(found[name].value, math.nan, math.nan) for name in alone}


def interval(terms: Terms) -> Interval:
    """The metric with its bootstrap interval over clusters; with Wilson's where a bounded metric is 0 or 1."""
    found = bootstrap(terms.rows, lambda sums: {"value": terms.metric(sums)}, clusters=terms.clusters)["value"]
    return _widened(terms, found)


def change(before: Terms, after: Terms, same_answers: bool = False) -> Interval:
    """The change of a metric between two results on the same units, with the interval of a paired bootstrap.

    Where one of the two values is 0 or 1, pairing says nothing about its uncertainty: the interval is then that of Newcombe
    (1998, method 10, https://pubmed.ncbi.nlm.nih.gov/9595617/), made of the
    intervals of both values. With the `same_answers` the change is exactly 0.
    """
    columns = before.rows.shape[1]

    def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
        one, other = before.metric(sums[..., :columns]), after.metric(sums[..., columns:])
        return {"before": one, "after": other, "change": other - one}

    both = np.concatenate([before.rows, after.rows], axis=1)
    three = bootstrap(both, metrics, clusters=after.clusters)
    at_bound = before.bounded and after.bounded and bool({three["before"].value, three["after"].value} & {0.0, 1.0})
    if not at_bound or same_answers:
        return three["change"]
    return _newcombe(_widened(before, three["before"]), _widened(after, three["after"]))


def _newcombe(old: Interval, new: Interval) -> Interval:
    change = new.value - old.value
    low = math.hypot(new.value - new.low, old.high - old.value)
    high = math.hypot(new.high - new.value, old.value - old.low)
    return Interval(change, max(-1.0, change - low), min(1.0, change + high))


def _widened(terms: Terms, found: Interval) -> Interval:
    """The interval; Wilson's (1927) if a bounded metric is 0 or 1: at 1 it starts at n / (n + 3.84)."""
    if not terms.bounded or found.value not in (0.0, 1.0):
        return found
    wilson = stats.binomtest(round(found.value * terms.n), terms.n).proportion_ci(method="wilson")
    return Interval(found.value, wilson.low, wilson.high)


def ratio(sums: np.ndarray) -> np.ndarray:
    """The ratio of two sums `(..., 2)`; 0 if the second is 0."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-9)


def terms_of(result: dict) -> dict[str, Terms]:
    """Those of `f1`, `exact`, `pairs`, `exact_match`, `rouge_l`, `loss` that a result of scripts/evaluate.py has, per example.

    `own/NAME` are the scores of the user's own metric (eval/metric.py). What an answer counts under another name, [right,
    true, claimed], gives the F1 of that name: `facts` gives `fact_f1`.
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
            if all(isinstance(one, list) and [*map(type, one)] == [int] * 3 for one in counts):
                rows = _array((2 * right, true + claimed) for right, true, claimed in counts)
                terms[f"{name.removesuffix('s')}_f1"] = Terms(rows, clusters, ratio)
        terms |= _pair_terms(answers, clusters)
    if answers and all("exact" in answer for answer in answers):
        terms["exact_match"] = Terms(_array((answer["exact"], 1) for answer in answers), clusters, ratio)
    if answers and all("rouge_l" in answer for answer in answers):
        terms["rouge_l"] = Terms(_array((answer["rouge_l"], 1) for answer in answers), clusters, ratio)
    if losses:
        same = clusters if len(clusters) == len(losses) else [f"example {i}" for i in range(len(losses))]
        terms["loss"] = Terms(_array(losses), same, ratio, bounded=False)
    return terms


def clusters_of(answers: Sequence[dict]) -> list[Hashable]:
    """The cluster of each answer; one of its own where the example names none."""
    return [f"example {i}" if a.get("cluster") is None else a["cluster"] for i, a in enumerate(answers)]


def _array(rows) -> np.ndarray:  # noqa: ANN001
    return np.array(list(rows), dtype=float)


def labels(answer: dict) -> tuple[set[str], set[str]]:
    """(true rules, predicted rules) of an answer; one that cannot be read predicts `UNREADABLE`."""
    predicted = set(answer["predicted"] or ())
    return set(answer["true"]), predicted | ({UNREADABLE} if answer.get("unreadable") else set())


def _f1_terms(answer: dict) -> tuple[int, int]:
    """What one report adds to the numerator and the denominator of F1 = 2 TP / (true + predicted)."""
    true, said = labels(answer)
    return 2 * len(true & said), len(true) + len(said)


def _is_exact(answer: dict) -> bool:
    true, said = labels(answer)
    return answer["predicted"] is not None and true == said


def _pair_terms(answers: Sequence[dict], clusters: Sequence) -> dict[str, Terms]:
    """The terms of `pairs`: one row per minimal pair, in the cluster of its first report. Empty without pairs."""
    members: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        if answer.get("pair"):
            members.setdefault(answer["pair"], []).append(i)
    pairs = [pair for pair in members.values() if len(pair) == 2]
    rows = [(all(_is_exact(answers[i]) for i in pair), 1) for pair in pairs]
    return {"pairs": Terms(_array(rows), [clusters[pair[0]] for pair in pairs], ratio)} if pairs else {}
