"""Baselines that need no model, for the violations and for the letter."""

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

HASH_BUCKETS = 4096  # the words of a report are hashed into this many buckets


def trivial_predictions(training: Iterable[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Baseline name -> the rule ids that it predicts for every report.

    `training` has the rule ids violated by each training report.
    """
    counts = Counter(rule_id for violated in training for rule_id in violated)
    return {
        "always clean": (),
        "flag everything": tuple(sorted(counts)),
        "most frequent violation": tuple(
            rule_id for rule_id, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:1]
        ),
    }


def micro_f1(predicted: Sequence[Iterable[str]], true: Sequence[Iterable[str]]) -> dict[str, float]:
    """Micro-averaged precision, recall and F1 over all (report, rule) pairs; 0 where undefined."""
    pairs = [(set(guess), set(truth)) for guess, truth in zip(predicted, true, strict=True)]
    true_positives = sum(len(guess & truth) for guess, truth in pairs)
    n_predicted, n_true = sum(len(guess) for guess, _ in pairs), sum(len(truth) for _, truth in pairs)
    return {
        "precision": true_positives / n_predicted if n_predicted else 0.0,
        "recall": true_positives / n_true if n_true else 0.0,
        "f1": 2 * true_positives / (n_predicted + n_true) if n_predicted + n_true else 0.0,
    }


def score_baselines(training: Sequence[Sequence[str]], test: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
    """Scores of each trivial baseline, fitted on `training` and evaluated on `test`.

    Both arguments have the rule ids of each report.
    """
    return {name: micro_f1([answer] * len(test), test) for name, answer in trivial_predictions(training).items()}


def nearest_letters(training: Sequence[tuple[str, str]], test: Sequence[str]) -> list[str]:
    """For each test report, the letter of the most similar training report.

    `training` are (report, letter) pairs, `test` are reports. Similarity is the Jaccard index of the sets of words.
    """
    known = [(_words(report), letter) for report, letter in training]
    letters = []
    for report in test:
        words = _words(report)
        letters.append(
            max(known, key=lambda pair: (pair[0] & words).bit_count() / max(1, (pair[0] | words).bit_count()))[1]
        )
    return letters


def _words(report: str) -> int:
    """The set of words of a report as a bit set: bit i is set if some word hashes to bucket i."""
    bits = 0
    for word in set(report.split()):
        bits |= 1 << (zlib.crc32(word.encode()) % HASH_BUCKETS)
    return bits
