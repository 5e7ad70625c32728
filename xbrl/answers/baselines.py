"""Baselines without a language model: programs that learn from printed reports, and the rule engine.

Every table shows them beside a model. All are fitted on the training split, and tuned like a model: on parts of the split that
are held out by note or bank, and on the validation split if it is given. `composed.py` has the strongest two.
"""

import argparse
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.files import Reading
from data.formats import read_examples
from eval.asked_examples import report_of
from xbrl.answers.composed import PERCENTAGE, hidden_states, note_predictions, printed_report, probability
from xbrl.answers.note_scores import note_of, score_notes
from xbrl.answers.scores import labelled, micro_f1, note_f1
from xbrl.rules.note_facts import NoteFact

Matrix = Any  # a scipy.sparse.csr_matrix

NGRAMS, THRESHOLDS, ENGINE = "character n-grams", "thresholds", "rule engine"
COMPOSED, PROBE = "engine + note words", "engine + note states"
BESIDE = (
    "default: the file of this name beside --data, as is the one of --train, if a data card of bank reports lies there"
)
MAX_CHARACTERS = 2_000_000  # of training reports from which n-grams are learned; more take minutes
MAX_FEATURES = 30_000  # n-grams that the regressions see
FOLDS = 2  # parts of the training that are held out in turn
STRENGTHS = (10.0, 100.0)  # candidates for C, the inverse of the regularization
CUTS = np.linspace(0.2, 0.8, 25)  # candidates for the probability from which a rule counts as violated
MAX_PAIRED = 24  # the labels that most training reports print are combined in pairs
MIN_REPORTS = 5  # a rule or a label is learned if so many training reports have it
_PERCENTAGE = re.compile(r"(\d+(?:\.\d+)?) ?%")


class Prediction(NamedTuple):
    """The rules that a program predicts for each report, and the facts that it reads in each note (None if it reads none)."""

    rules: list[tuple[str, ...]]
    facts: list[tuple[NoteFact, ...]] | None = None


def baseline_predictions(
    training: Sequence[dict], test: Sequence[dict], validation: Sequence[dict] = (), probe: str | None = None
) -> dict[str, Prediction]:
    """Return baseline -> its predictions for the test examples. Examples have a prompt and the field `violations`.

    - The trivial answers, the same for every report; without a training split, the rules come from `test`.
    - `NGRAMS`: logistic regressions on the whole text, in pieces of 2 to 6 characters.
    - `THRESHOLDS`: one learned cut per rule on a printed percentage, or on the sum or difference of two.
    - `ENGINE`: the violations in the reported figures, from the examples' field `engine`; missing without that field.
    - `COMPOSED`: the engine, and a logistic regression on the words of the note (`composed.py`), if the training examples have
      the facts of their notes (field `note_facts`).
    - `PROBE`: the same on the mean hidden states of the model directory `probe`, if given.
    """
    if not test:
        return {}
    counts = Counter(rule for example in training or test for rule in set(example["violations"]))
    trivial = {"always clean": [], "flag everything": sorted(counts)}
    if training:
        trivial["most frequent violation"] = sorted(counts, key=lambda rule: (-counts[rule], rule))[:1]
    predictions = {name: Prediction([tuple(rules)] * len(test)) for name, rules in trivial.items()}
    if training:
        predictions[NGRAMS] = Prediction(_ngram_predictions(training, test, validation))
        predictions[THRESHOLDS] = Prediction(_threshold_predictions(training, test))
    if all("engine" in example for example in test):
        predictions[ENGINE] = Prediction([tuple(example["engine"]) for example in test])
        if any(example.get("note_facts") for example in training):
            predictions[COMPOSED] = Prediction(*note_predictions(training, test, validation))
            if probe:
                reports = map(report_of, (*training, *test, *validation))
                states = hidden_states(probe, [note for report in reports if (note := note_of(report))])
                predictions[PROBE] = Prediction(*note_predictions(training, test, validation, states))
    return predictions


def add_baseline_options(parser: argparse.ArgumentParser) -> None:
    """Add `--validation`, on which the baselines are tuned, and `--probe`, the model that reads notes for one of them."""
    tuned = f"the validation split, on which the baselines are tuned, beside held-out parts of --train ({BESIDE})"
    parser.add_argument("--validation", type=Path, help=tuned)
    probe = "add a baseline: the engine, and a regression on this model's mean hidden states of the notes"
    parser.add_argument("--probe", metavar="BASE", help=probe)


def set_default_splits(arguments: argparse.Namespace) -> None:
    """Set `train` and `validation`, if missing, to the files beside `data`, provided that a data card of this case lies there."""
    try:
        is_corpus = "baselines" in json.loads(arguments.data.with_name("dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return
    for split in ("train", "validation") if is_corpus else ():
        path = arguments.data.with_name(f"{split}.jsonl")
        if getattr(arguments, split) is None and path.is_file() and path != arguments.data:
            setattr(arguments, split, path)


def read_baseline_options(arguments: argparse.Namespace, reading: Reading) -> dict[str, Any]:
    """Return the arguments `validation` and `probe` of `baseline_predictions`. Raise UserError if a file cannot be read."""
    validation = read_examples(arguments.validation, reading) if arguments.validation else []
    return {"validation": validation, "probe": arguments.probe}


def baseline_results(
    examples: Sequence[dict],
    training: Sequence[dict] | None,
    where: str,
    validation: Sequence[dict] = (),
    probe: str | None = None,
) -> dict[str, dict]:
    """Return the answers of each baseline to `examples`, in the form of a result of scripts/evaluate.py."""
    test, known = labelled(examples, where), labelled(training or (), "the training split")
    return {
        name: {
            "answers": [
                {
                    "id": example.get("id"),
                    "cluster": example.get("bank"),
                    "true": example["violations"],
                    "predicted": list(rules),
                }
                for example, rules in zip(test, prediction.rules, strict=True)
            ]
        }
        for name, prediction in baseline_predictions(known, test, validation, probe).items()
    }


def score_baselines(
    training: Sequence[dict], examples: Sequence[dict], validation: Sequence[dict] = (), probe: str | None = None
) -> dict[str, dict]:
    """Return baseline -> its scores on the examples.

    They are precision, recall and F1 of the rules, `note_f1` if notes decide any rule, and `notes` if the baseline reads facts.
    """
    scores = {}
    for name, prediction in baseline_predictions(training, examples, validation, probe).items():
        scores[name] = micro_f1(prediction.rules, [example["violations"] for example in examples])
        if (notes := note_f1(examples, prediction.rules)) is not None:
            scores[name]["note_f1"] = notes
        if prediction.facts:
            scores[name]["notes"] = score_notes(examples, prediction.facts)
    return scores


def _ngram_predictions(
    training: Sequence[dict], test: Sequence[dict], validation: Sequence[dict]
) -> list[tuple[str, ...]]:
    """Fit one balanced regression per rule. Strength and cut are the ones with the best F1 on held-out parts and `validation`."""
    step = -(-sum(len(report_of(example)) for example in training) // MAX_CHARACTERS)
    training = training[::step]
    rules = sorted({rule for example in training for rule in example["violations"]})
    if not rules:
        return [()] * len(test)
    true, true_validation = (
        np.array([[rule in example["violations"] for rule in rules] for example in examples], bool).reshape(
            -1, len(rules)
        )
        for examples in (training, validation)
    )
    counts = _ngrams([report_of(example) for example in (*training, *validation, *test)], true)
    known, tuned, new = counts[: len(training)], counts[len(training) : -len(test)], counts[-len(test) :]
    groups = [str(example.get("note") or example.get("bank") or number) for number, example in enumerate(training)]
    folds = np.array([zlib.crc32(group.encode()) % FOLDS for group in groups])
    truth, f1_by_setting = np.concatenate([true, true_validation]), {}
    for strength in STRENGTHS:
        held_out = np.zeros(true.shape)
        for fold in range(FOLDS):
            held = folds == fold
            held_out[held] = _probabilities(known[~held], true[~held], known[held], strength)
        predicted = np.concatenate([held_out, _probabilities(known, true, tuned, strength)])
        f1_by_setting |= {(strength, cut): _f1(predicted >= cut, truth) for cut in CUTS}
    strength, cut = max(f1_by_setting, key=lambda setting: (f1_by_setting[setting], -abs(setting[1] - 0.5)))
    hits = _probabilities(known, true, new, strength) >= cut
    return [tuple(rule for rule, hit in zip(rules, row, strict=True) if hit) for row in hits]


def _ngrams(texts: Sequence[str], true: np.ndarray) -> Matrix:
    """Return the TF-IDF of the n-grams with the largest chi-squared statistic of any rule, `(texts, n-grams)`.

    true: `(training reports, rules)`; the training reports are the first of `texts`.
    """
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    options = {"ngram_range": (2, 6), "lowercase": False, "norm": None, "alternate_sign": False, "n_features": 2**18}
    counts: Matrix = HashingVectorizer(analyzer="char", **options).transform(f" {text} " for text in texts)
    present = counts[: len(true)] > 0
    total = present.sum(axis=0).A1.astype(np.float32)
    violated = np.asarray((present.T @ true.astype(np.float32)).T)  # reports that have the n-gram and violate the rule
    share = true.mean(axis=0, dtype=np.float32)[:, None]
    spread = np.maximum(share * (1 - share) * total * (1 - total / len(true)), 1e-9)
    statistic = ((violated - share * total) ** 2 / spread).max(axis=0)
    best = np.sort(np.argsort(-statistic, kind="stable")[: min(MAX_FEATURES, int((total > 0).sum()))])
    weights = TfidfTransformer(sublinear_tf=True).fit(counts[: len(true), best])
    return weights.transform(counts[:, best])


def _probabilities(known: Matrix, true: np.ndarray, new: Matrix, strength: float) -> np.ndarray:
    """Return `(new reports, rules)`: the probability of each rule; 0 for a rule with fewer than `MIN_REPORTS` examples."""
    columns = np.zeros((new.shape[0], true.shape[1]))
    for rule in range(true.shape[1]) if new.shape[0] else ():
        if MIN_REPORTS <= true[:, rule].sum() < len(true):
            columns[:, rule] = probability(known, true[:, rule], new, strength)
    return columns


def _f1(predicted: np.ndarray, true: np.ndarray) -> float:
    return 2 * (predicted & true).sum() / max(1, predicted.sum() + true.sum())


class _Comparison(NamedTuple):
    """The comparison `sign * feature >= cut`, with its F1 and counts on the training reports."""

    f1: float = 0.0
    feature: int = 0
    sign: int = 1
    cut: float = np.inf
    right: int = 0
    predicted: int = 0


def _threshold_predictions(training: Sequence[dict], test: Sequence[dict]) -> list[tuple[str, ...]]:
    """Return the rules whose comparison holds in each test report: `x < cut` or `x > cut`.

    x is a printed percentage, or the sum or difference of two. A rule gets the comparison with the best F1 on the training
    reports. Rules are then added in the order of that F1 as long as the micro-averaged F1 on the training reports grows.
    """
    rules = sorted({rule for example in training for rule in example["violations"]})
    if not rules:
        return [()] * len(test)
    percentages = [_percentages(report_of(example)) for example in training]
    counts = Counter(label for of_report in percentages for label in of_report)
    labels = [label for label, count in counts.most_common() if count >= MIN_REPORTS]
    true = np.array([[rule in example["violations"] for rule in rules] for example in training])
    best = _best_comparisons(_features(percentages, labels), true)
    order = sorted((i for i in range(len(rules)) if best[i].f1), key=lambda i: -best[i].f1)
    right, predicted = (np.cumsum([getattr(best[i], name) for i in order]) for name in ("right", "predicted"))
    kept = sorted(order[: int(np.argmax(2 * right / (predicted + true.sum()))) + 1]) if order else []
    features = _features([_percentages(report_of(example)) for example in test], labels)
    hits = {i: best[i].sign * features[:, best[i].feature] >= best[i].cut for i in kept}
    return [tuple(rules[i] for i in kept if hits[i][row]) for row in range(len(test))]


def _percentages(report: str) -> dict[str, float]:
    """Return label -> percentage, for each cell `smallest CELL` and `largest CELL`, which differ in an open table.

    The percentages of the note have the label `note` in place of a cell.
    """
    values: dict[str, list[float]] = {}
    for fact in printed_report(report).facts:
        if fact.unit == PERCENTAGE and isinstance(fact.value, Decimal):
            values.setdefault(str(fact.cell), []).append(100 * float(fact.value))
    if in_note := [float(number) for number in _PERCENTAGE.findall(note_of(report))]:
        values["note"] = in_note
    return {f"smallest {k}": min(v) for k, v in values.items()} | {f"largest {k}": max(v) for k, v in values.items()}


def _features(percentages: Sequence[dict[str, float]], labels: Sequence[str]) -> np.ndarray:
    """Return `(reports, features)`: each label, then sums and differences of pairs; NaN for a figure that a report lacks."""
    rows = [[of_report.get(label, np.nan) for label in labels] for of_report in percentages]
    single = np.array(rows).reshape(len(percentages), len(labels))
    columns = [single]
    for i, j in itertools.combinations(range(min(MAX_PAIRED, len(labels))), 2):
        columns.append(np.stack([single[:, i] + single[:, j], single[:, i] - single[:, j]], axis=1))
    return np.concatenate(columns, axis=1)


def _best_comparisons(features: np.ndarray, true: np.ndarray) -> list[_Comparison]:
    """Return for each rule the comparison with the best F1. features: `(reports, features)`; true: `(reports, rules)`."""
    best = [_Comparison()] * true.shape[1]
    totals = true.sum(axis=0)
    for feature, sign in itertools.product(range(features.shape[1]), (1, -1)):
        values = sign * features[:, feature]
        order = np.argsort(-values, kind="stable")[: np.isfinite(values).sum()]  # NaN comes last
        ordered = values[order]
        # A cut can only lie between two different values.
        ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
        if not len(ordered):
            continue
        positives = true[order].cumsum(axis=0)[ends]
        f1 = 2 * positives / (ends[:, None] + 1 + totals)
        for rule, row in enumerate(f1.argmax(axis=0)):
            if f1[row, rule] > best[rule].f1:
                end = ends[row]
                cut = ordered[end] if end + 1 == len(ordered) else (ordered[end] + ordered[end + 1]) / 2
                right = int(positives[row, rule])
                best[rule] = _Comparison(float(f1[row, rule]), feature, sign, float(cut), right, int(end + 1))
    return best
