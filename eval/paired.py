"""The change between two evaluations of the same examples, with 95% intervals from a paired bootstrap over examples."""

import numpy as np

from eval.bootstrap import Interval, bootstrap


def paired_change(before: dict, after: dict, seed: int = 0) -> dict[str, Interval]:
    """Changes of `f1`, `rouge_l` and `loss` (nats per token) between two results of scripts/evaluate.py.

    Contains only the metrics that both results have per example. The caller makes sure that the examples are the same
    (`eval.report.check_comparable`). F1 is micro-averaged: it is computed from sums over all reports of a resample.
    """
    changes = {}
    answers = before.get("answers", ()), after.get("answers", ())
    if answers[0] and len(answers[0]) == len(answers[1]):
        if all("true" in answer for result in answers for answer in result):
            counts = [np.array([_f1_terms(answer) for answer in result]) for result in answers]
            changes |= _change_of_ratio("f1", counts, seed)
        scores = [np.array([[answer["rouge_l"], 1.0] for answer in result]) for result in answers]
        changes |= _change_of_ratio("rouge_l", scores, seed)
    losses = before.get("losses"), after.get("losses")
    if losses[0] and losses[1] and len(losses[0]) == len(losses[1]):
        changes |= _change_of_ratio("loss", [np.array(result, dtype=float) for result in losses], seed)
    return changes


def _f1_terms(answer: dict) -> tuple[float, float]:
    """What one report adds to the numerator and the denominator of F1 = 2 TP / (true + predicted)."""
    true, predicted = set(answer["true"]), set(answer["predicted"] or ())
    return 2.0 * len(true & predicted), float(len(true) + len(predicted))


def _change_of_ratio(name: str, terms: list[np.ndarray], seed: int) -> dict[str, Interval]:
    """The change of a ratio of sums between two results.

    terms: for each result the numerators and denominators of its examples, `(examples, 2)`. A ratio is 0 if its
    denominator is 0.
    """

    def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
        before, after = (sums[..., column] / np.maximum(sums[..., column + 1], 1e-9) for column in (0, 2))
        return {name: after - before}

    return bootstrap(np.concatenate(terms, axis=1), metrics, seed)
