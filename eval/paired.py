"""Two evaluations of the same examples, with intervals of the change: a bootstrap over examples that keeps pairs together."""

import numpy as np

from eval.bootstrap import Interval, bootstrap


def paired_change(before: dict, after: dict, seed: int = 0) -> dict[str, Interval]:
    """The change of `f1`, `rouge_l` and `loss` (nats a token) from one result of scripts/evaluate.py to another, each with 95%.

    Only figures that both results have by example are in it; `eval.report.check_comparable` says whether the examples are
    the same. F1 is micro: of sums over reports, so a resample of reports is one of whole reports.
    """
    found = {}
    answers = before.get("answers", ()), after.get("answers", ())
    if answers[0] and len(answers[0]) == len(answers[1]):
        if all("true" in answer for one in answers for answer in one):
            counts = [np.array([_counts(answer) for answer in one]) for one in answers]
            found |= _change("f1", counts, seed)
        scores = [np.array([[answer["rouge_l"], 1.0] for answer in one]) for one in answers]
        found |= _change("rouge_l", scores, seed)
    losses = before.get("losses"), after.get("losses")
    if losses[0] and losses[1] and len(losses[0]) == len(losses[1]):
        found |= _change("loss", [np.array(one, dtype=float) for one in losses], seed)
    return found


def _counts(answer: dict) -> tuple[float, float]:
    """Numerator and denominator of F1 = 2 TP / (true + predicted): what one report adds to each."""
    true, predicted = set(answer["true"]), set(answer["predicted"] or ())
    return 2.0 * len(true & predicted), float(len(true) + len(predicted))


def _change(name: str, ratios: list[np.ndarray], seed: int) -> dict[str, Interval]:
    """Of two ratios of sums, each from its `(examples, 2)` numerators and denominators; 0 where a denominator is 0."""

    def figures(sums: np.ndarray) -> dict[str, np.ndarray]:
        one, other = (sums[..., c] / np.maximum(sums[..., c + 1], 1e-9) for c in (0, 2))
        return {name: other - one}

    return bootstrap(np.concatenate(ratios, axis=1), figures, seed)
