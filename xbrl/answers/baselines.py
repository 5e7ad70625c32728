"""Baselines that need no language model, for the violations and for the letter."""

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from eval.asked_examples import report_of
from xbrl.answers.learned_baselines import ngram_predictions, presence_predictions
from xbrl.answers.threshold_program import threshold_predictions

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


def baseline_predictions(training: Sequence[dict], test: Sequence[dict]) -> dict[str, list[tuple[str, ...]]]:
    """Baseline -> the rule ids that it predicts for each test example. Fitted on the examples of `training`.

    - `character n-grams`: a logistic regression on everything that is printed.
    - `presence and signs`: a logistic regression on which cells are reported and with which sign, without any digit.
    - `threshold program`: one learned cut per rule on a printed percentage, or on the sum or difference of two.
    - `nearest report`: the violations of the training report with the most words in common.
    - `engine`: what the rules find in the reported figures, the field `engine` of the examples; absent without it.

    The examples have a prompt and the field `violations`. Without test examples there are no baselines.
    """
    if not test:
        return {}
    known, new = [report_of(example) for example in training], [report_of(example) for example in test]
    violated = [tuple(example["violations"]) for example in training]
    predictions = {
        "character n-grams": ngram_predictions(known, violated, new),
        "presence and signs": presence_predictions(known, violated, new),
        "threshold program": threshold_predictions(known, violated, new),
        "nearest report": [violated[index] for index in nearest_reports(known, new)],
    }
    if all("engine" in example for example in test):
        predictions["engine"] = [tuple(example["engine"]) for example in test]
    return predictions


def decided_by_notes(examples: Sequence[dict]) -> list[frozenset[str]]:
    """For each example, the rules that its note decides: empty without a note, or without the field `engine`.

    They are the rules on which the truth and the engine differ in any example with a note of the same kind.
    """
    rules: dict[str, frozenset[str]] = {}
    for one in examples:
        if one.get("kind") and "engine" in one:
            decided = frozenset(one["violations"]) ^ frozenset(one["engine"])
            rules[one["kind"]] = rules.get(one["kind"], frozenset()) | decided
    return [rules.get(one.get("kind", ""), frozenset()) for one in examples]


def note_f1(examples: Sequence[dict], predicted: Sequence[Iterable[str]]) -> float | None:
    """F1 of what notes decide (`decided_by_notes`); None if they decide nothing."""
    decided = decided_by_notes(examples)
    if not any(decided):
        return None
    true = [rules & set(example["violations"]) for rules, example in zip(decided, examples, strict=True)]
    return micro_f1([rules & set(one) for rules, one in zip(decided, predicted, strict=True)], true)["f1"]


def micro_f1(predicted: Sequence[Iterable], true: Sequence[Iterable]) -> dict[str, float]:
    """Micro-averaged precision, recall and F1 of the items of each report, for example its rules; 0 where undefined."""
    pairs = [(set(guess), set(truth)) for guess, truth in zip(predicted, true, strict=True)]
    true_positives = sum(len(guess & truth) for guess, truth in pairs)
    n_predicted, n_true = sum(len(guess) for guess, _ in pairs), sum(len(truth) for _, truth in pairs)
    return {
        "precision": true_positives / n_predicted if n_predicted else 0.0,
        "recall": true_positives / n_true if n_true else 0.0,
        "f1": 2 * true_positives / (n_predicted + n_true) if n_predicted + n_true else 0.0,
    }


def score_baselines(
    training: Sequence[dict], tests: Mapping[str, Sequence[dict]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Test split -> baseline -> precision, recall, F1, and `note_f1` where notes decide something.

    All baselines are fitted once, on the examples of `training`; without any, there are none.
    """
    if not training:
        return {}
    trivial = trivial_predictions(example["violations"] for example in training)
    everything = [example for examples in tests.values() for example in examples]
    learned = baseline_predictions(training, everything)
    scores, start = {}, 0
    for split, examples in tests.items():
        true = [example["violations"] for example in examples]
        predictions = {name: [answer] * len(true) for name, answer in trivial.items()}
        predictions |= {name: found[start : start + len(true)] for name, found in learned.items()}
        scores[split] = {}
        for name, predicted in predictions.items():
            scores[split][name] = micro_f1(predicted, true)
            notes = note_f1(examples, predicted)
            scores[split][name] |= {} if notes is None else {"note_f1": notes}
        start += len(true)
    return scores


def nearest_letters(training: Sequence[tuple[str, str]], test: Sequence[str]) -> list[str]:
    """For each test report, the letter of the most similar training report. `training` are (report, letter) pairs."""
    return [training[index][1] for index in nearest_reports([report for report, _ in training], test)]


def nearest_reports(training: Sequence[str], test: Sequence[str]) -> list[int]:
    """For each test report, the index of the most similar training report: the Jaccard index of the sets of words."""
    known = [_words(report) for report in training]
    indices = []
    for report in test:
        words = _words(report)
        likeness = [(other & words).bit_count() / max(1, (other | words).bit_count()) for other in known]
        indices.append(likeness.index(max(likeness)))
    return indices


def _words(report: str) -> int:
    """The set of words of a report as a bit set: bit i is set if some word hashes to bucket i."""
    bits = 0
    for word in set(report.split()):
        bits |= 1 << (zlib.crc32(word.encode()) % HASH_BUCKETS)
    return bits
