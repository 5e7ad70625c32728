"""Answers that need no model: what a trained one must beat, on the violations and on the letter."""

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

BITS = 4096  # words of a report are told apart by a hash of so many values


def trivial_predictions(training: Iterable[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Name -> the rule ids that this baseline answers to every report. `training` are the violations of each training report."""
    counts = Counter(rule_id for violated in training for rule_id in violated)
    return {
        "always clean": (),
        "flag everything": tuple(sorted(counts)),
        "most frequent violation": tuple(
            rule_id for rule_id, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:1]
        ),
    }


def micro_f1(predicted: Sequence[Iterable[str]], true: Sequence[Iterable[str]]) -> dict[str, float]:
    """Precision, recall and F1 over all (report, rule) pairs; 0 where undefined."""
    pairs = [(set(one), set(other)) for one, other in zip(predicted, true, strict=True)]
    hits = sum(len(one & other) for one, other in pairs)
    said, there = sum(len(one) for one, _ in pairs), sum(len(other) for _, other in pairs)
    return {
        "precision": hits / said if said else 0.0,
        "recall": hits / there if there else 0.0,
        "f1": 2 * hits / (said + there) if said + there else 0.0,
    }


def score_baselines(training: Sequence[Sequence[str]], test: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    """Each trivial baseline, fitted on `training`, on the violations of the `test` reports."""
    return {name: micro_f1([answer] * len(test), test) for name, answer in trivial_predictions(training).items()}


def nearest_letters(training: Sequence[tuple[str, str]], test: Sequence[str]) -> list[str]:
    """For each report of `test` the letter of the training report, (report, letter), with the largest overlap of words."""
    known = [(_words(report), letter) for report, letter in training]
    letters = []
    for report in test:
        words = _words(report)
        letters.append(
            max(known, key=lambda pair: (pair[0] & words).bit_count() / max(1, (pair[0] | words).bit_count()))[1]
        )
    return letters


def _words(report: str) -> int:
    """The set of words of a report as the bits of a number."""
    bits = 0
    for word in set(report.split()):
        bits |= 1 << (zlib.crc32(word.encode()) % BITS)
    return bits
