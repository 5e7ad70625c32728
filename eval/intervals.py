"""95% intervals of the metrics of one evaluation, and of their change between two.

Examples of one bank are alike, so the bootstrap draws whole banks (`cluster` of the answers) with all of their examples. At
0% and 100% a bootstrap sees no variation at all: there the interval is Wilson's, on as many observations as there are banks,
as if each bank were either right or wrong.
"""

import math
from collections.abc import Sequence

import numpy as np

from eval.bootstrap import Interval, bootstrap

Z = 1.959964  # two-sided 95% of the normal distribution
BOUNDED = ("f1", "fact_f1", "exact", "pairs", "rouge_l")  # between 0 and 1


def wilson(value: float, n: int) -> tuple[float, float]:
    """The score interval of a share (Wilson, 1927): 95%, `n` independent observations. At 1 it starts at n / (n + 3.84)."""
    spread = Z * math.sqrt(value * (1 - value) / n + Z * Z / (4 * n * n))
    low, high = ((value + Z * Z / (2 * n) + sign * spread) / (1 + Z * Z / n) for sign in (-1, 1))
    return (0.0 if value == 0 else low), (1.0 if value == 1 else high)


def intervals(result: dict, seed: int = 0) -> dict[str, Interval]:
    """The metrics of a result of scripts/evaluate.py that are known per example, each with its interval."""
    found = {}
    for name, (terms, clusters) in _terms(result).items():
        interval = bootstrap(terms, lambda sums, name=name: {name: _ratio(sums)}, seed, clusters=clusters)[name]
        found[name] = _widened(name, interval, len(set(clusters)))
    return found


def paired_change(before: dict, after: dict, seed: int = 0) -> dict[str, Interval]:
    """The change of each metric that both results have, with the interval of a paired bootstrap.

    Where one of the two values is 0 or 1, pairing says nothing about its uncertainty: the interval is then that of Newcombe
    (1998, method 10), made of the intervals of both values. Results with the very same answers differ by exactly 0. The
    caller makes sure that the examples are the same.
    """
    found = {}
    same_answers = before.get("answers") == after.get("answers")
    terms = _terms(before), _terms(after)
    for name in terms[0]:
        if name not in terms[1] or len(terms[0][name][0]) != len(terms[1][name][0]):
            continue
        both = np.concatenate([side[name][0] for side in terms], axis=1)
        clusters = terms[1][name][1]

        def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
            one, other = _ratio(sums[..., :2]), _ratio(sums[..., 2:])
            return {"before": one, "after": other, "change": other - one}

        three = bootstrap(both, metrics, seed, clusters=clusters)
        old, new = (_widened(name, three[side], len(set(clusters))) for side in ("before", "after"))
        at_bound = name in BOUNDED and bool({three["before"].value, three["after"].value} & {0.0, 1.0})
        found[name] = _newcombe(old, new) if at_bound and not same_answers else three["change"]
    return found


def _newcombe(old: Interval, new: Interval) -> Interval:
    change = new.value - old.value
    low = math.hypot(new.value - new.low, old.high - old.value)
    high = math.hypot(new.high - new.value, old.value - old.low)
    return Interval(change, max(-1.0, change - low), min(1.0, change + high))


def _widened(name: str, interval: Interval, n: int) -> Interval:
    """The interval; Wilson's if the value is 0 or 1."""
    if name not in BOUNDED or interval.value not in (0.0, 1.0):
        return interval
    return Interval(interval.value, *wilson(interval.value, n))


def _ratio(sums: np.ndarray) -> np.ndarray:
    """The ratio of two sums `(..., 2)`; 0 if the second is 0."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1e-9)


def _terms(result: dict) -> dict[str, tuple[np.ndarray, Sequence]]:
    """Metric -> (numerator and denominator of each example `(examples, 2)`, cluster of each example)."""
    answers, losses = result.get("answers") or (), result.get("losses") or ()
    clusters = [f"example {i}" if a.get("cluster") is None else a["cluster"] for i, a in enumerate(answers)]
    terms: dict[str, tuple[np.ndarray, Sequence]] = {}
    if answers and all("true" in answer for answer in answers):
        terms["f1"] = _array(map(_f1_terms, answers)), clusters
        terms["exact"] = _array((_is_exact(answer), 1) for answer in answers), clusters
        if all("facts" in answer for answer in answers):
            terms["fact_f1"] = (
                _array((2 * right, true + said) for right, true, said in (a["facts"] for a in answers)),
                clusters,
            )
        terms |= _pair_terms(answers, clusters)
    if answers:
        terms["rouge_l"] = _array((answer["rouge_l"], 1) for answer in answers), clusters
    if losses:
        same = clusters if len(clusters) == len(losses) else [f"example {i}" for i in range(len(losses))]
        terms["loss"] = _array(losses), same
    return terms


def _array(rows) -> np.ndarray:  # noqa: ANN001
    return np.array(list(rows), dtype=float)


def _f1_terms(answer: dict) -> tuple[float, float]:
    """What one report adds to the numerator and the denominator of F1 = 2 TP / (true + predicted)."""
    true, predicted = set(answer["true"]), set(answer["predicted"] or ())
    return 2.0 * len(true & predicted), float(len(true) + len(predicted) + answer.get("unreadable", False))


def _is_exact(answer: dict) -> bool:
    readable = answer["predicted"] is not None and not answer.get("unreadable", False)
    return readable and set(answer["true"]) == set(answer["predicted"])


def _pair_terms(answers: Sequence[dict], clusters: Sequence) -> dict[str, tuple[np.ndarray, Sequence]]:
    """The terms of `pairs`: one row per minimal pair, in the cluster of its first report. Empty without pairs."""
    members: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        if answer.get("pair"):
            members.setdefault(answer["pair"], []).append(i)
    pairs = [pair for pair in members.values() if len(pair) == 2]
    rows = [(all(_is_exact(answers[i]) for i in pair), 1) for pair in pairs]
    return {"pairs": (_array(rows), [clusters[pair[0]] for pair in pairs])} if pairs else {}
