"""Baselines that learn from the text of reports without a language model: logistic regressions by scikit-learn.

`character n-grams` sees everything that is printed, notes included, in pieces of two to five characters.
`presence and signs` sees which cells are reported, in which unit and with which sign, and no digit of a figure.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xbrl.answers.printed_figures import printed_figures

Matrix = Any  # a scipy.sparse.csr_matrix; scipy is slow to import, and its types are those of newer classes

MAX_CHARACTERS = 10_000_000  # of training reports from which n-grams are learned; more take minutes
NGRAMS = range(2, 6)  # lengths in bytes
BUCKET_BITS = 18  # n-grams are hashed into 2**18 columns
MAX_FEATURES = 3000  # of each regression: those with the highest chi-squared statistic
CUTS = np.linspace(0.1, 0.9, 17)  # candidates for the probability from which a rule counts as violated
Vectorize = Callable[[Sequence[str]], Matrix]


def ngram_predictions(
    training: Sequence[str], violated: Sequence[Sequence[str]], reports: Sequence[str]
) -> list[tuple[str, ...]]:
    """The rules that a logistic regression on character n-grams finds in each of `reports`.

    `violated` has the rule ids of each training report. Of long training reports an even sample of `MAX_CHARACTERS`
    characters in all is used.
    """
    step = -(-sum(map(len, training)) // MAX_CHARACTERS)
    return _predictions(training[::step], violated[::step], reports, _count_ngrams)


def presence_predictions(
    training: Sequence[str], violated: Sequence[Sequence[str]], reports: Sequence[str]
) -> list[tuple[str, ...]]:
    """The rules that a logistic regression on the presence and signs of cells finds in each of `reports`."""
    return _predictions(training, violated, reports, _count_presence)


def _predictions(
    training: Sequence[str], violated: Sequence[Sequence[str]], reports: Sequence[str], vectorize: Vectorize
) -> list[tuple[str, ...]]:
    """Fit one regression per rule, and one cut for all of them: the best micro-averaged F1 on a fifth of the training.

    The fifth is held out while the cut is chosen; the regressions that predict have seen all training reports.
    """
    rules = sorted({rule for one in violated for rule in one})
    if not rules:
        return [()] * len(reports)
    true = np.array([[rule in one for rule in rules] for one in map(set, violated)])
    counts = vectorize([*training, *reports])
    known, new = counts[: len(training)], counts[len(training) :]
    held_out = np.arange(len(training)) % 5 == 4
    cut = 0.5
    if held_out.any():
        guessed = _probabilities(known[~held_out], true[~held_out], known[held_out])
        cut = max(CUTS, key=lambda one: _f1(guessed >= one, true[held_out]))
    found = _probabilities(known, true, new) >= cut
    return [tuple(rule for rule, hit in zip(rules, row, strict=True) if hit) for row in found]


def _probabilities(known: Matrix, true: np.ndarray, new: Matrix) -> np.ndarray:
    """`(new reports, rules)`: the probability of each rule. A rule without examples of both kinds is never predicted."""
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression

    columns = np.zeros((new.shape[0], true.shape[1]))
    best = _best_features(known, true)
    known, new = known.tocsc(), new.tocsc()
    for rule in range(true.shape[1]):
        if 0 < true[:, rule].sum() < len(true):
            weights = TfidfTransformer(sublinear_tf=True)
            features = weights.fit_transform(known[:, best[rule]])
            model = LogisticRegression(C=30.0, solver="liblinear").fit(features, true[:, rule])
            columns[:, rule] = model.predict_proba(weights.transform(new[:, best[rule]]))[:, 1]
    return columns


def _best_features(known: Matrix, true: np.ndarray) -> np.ndarray:
    """`(rules, features)`: the columns whose presence has the highest chi-squared statistic with each rule."""
    present = known > 0
    total = present.sum(axis=0).A1.astype(np.float32)
    found = np.asarray((present.T @ true.astype(np.float32)).T)  # reports with the feature that violate the rule
    share = true.mean(axis=0, dtype=np.float32)[:, None]
    spread = np.maximum(share * (1 - share) * total * (1 - total / len(true)), 1e-9)
    statistic = (found - share * total) ** 2 / spread
    statistic[:, total < min(2, len(true))] = -1
    return np.sort(np.argsort(-statistic, axis=1, kind="stable")[:, :MAX_FEATURES], axis=1)


def _f1(predicted: np.ndarray, true: np.ndarray) -> float:
    return 2 * (predicted & true).sum() / max(1, predicted.sum() + true.sum())


def _count_ngrams(texts: Sequence[str]) -> Matrix:
    """Counts of hashed n-grams of bytes, `(texts, 2**BUCKET_BITS)`. An n-gram may cross spaces and lines."""
    rows = []
    for text in texts:
        data = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint64)
        code = np.zeros(len(data) + 1, dtype=np.uint64)
        hashed = []
        for length in range(1, max(NGRAMS) + 1):
            code = code[:-1] * np.uint64(257) + data[length - 1 :] + np.uint64(1)
            if length in NGRAMS:  # Fibonacci hashing: the high bits of a product with 2**64 / golden ratio
                hashed.append((code * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - BUCKET_BITS))
        rows.append(np.unique(np.concatenate(hashed), return_counts=True))
    return _matrix(rows, 2**BUCKET_BITS)


def _count_presence(texts: Sequence[str]) -> Matrix:
    """Counts of (label, sign, unit), `(texts, features)`; the first feature is 1 in every text."""
    number: dict[tuple[str, str, str], int] = {("any report", "", ""): 0}
    rows = []
    for text in texts:
        counts = Counter({0: 1})
        for figure in printed_figures(text):
            counts[number.setdefault((figure.label, figure.sign, figure.unit), len(number))] += 1
        columns = np.array(sorted(counts))
        rows.append((columns, np.array([counts[column] for column in columns])))
    return _matrix(rows, len(number))


def _matrix(rows: Sequence[tuple[np.ndarray, np.ndarray]], width: int) -> Matrix:
    """The sparse matrix with these (columns, counts), `(rows, width)`."""
    from scipy.sparse import csr_matrix

    starts = np.cumsum([0, *(len(columns) for columns, _ in rows)])
    columns, counts = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return csr_matrix((counts.astype(np.float32), columns.astype(np.int32), starts), shape=(len(rows), width))
