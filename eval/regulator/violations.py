"""Score the violated rules that answers name: precision, recall and F1 (micro-averaged and per rule), trivial baselines."""

from collections.abc import Sequence

from sklearn.metrics import precision_recall_fscore_support
from sklearn.preprocessing import MultiLabelBinarizer

from common.errors import UserError
from data.regulator.answer_reader import Answer, parse_answer
from data.regulator.baselines import trivial_predictions


def true_answers(examples: Sequence[dict], where: str) -> list[Answer] | None:
    """The true violations and directive of each example; None if no example has them (another task).

    Violations come from the example's field `violations`, or else from the assistant's last message.

    Raises `UserError` if only some of the examples have violations; it names the file `where` and the first one
    without.
    """
    answers = [_true_answer(example) for example in examples]
    missing = [i for i, answer in enumerate(answers) if answer is None]
    if len(missing) == len(answers):
        return None
    if missing:
        name = examples[missing[0]].get("id", missing[0] + 1)
        raise UserError(
            f"{where}, example {name}: neither a field `violations` nor an answer of the form `Violations: ... "
            f"Directive: ...`, although other examples have one; add it or remove the example."
        )
    return answers


def _true_answer(example: dict) -> Answer | None:
    message = example["messages"][-1]["content"]
    parsed = parse_answer(message)
    if "violations" in example:
        return Answer(tuple(example["violations"]), parsed.directive if parsed else message)
    return parsed


def score_violations(true: Sequence[Sequence[str]], answers: Sequence[Sequence[str] | None]) -> dict:
    """Multilabel scores over (report, rule) pairs, computed by scikit-learn; 0 where a ratio is undefined.

    `true` and `answers` have the rule ids of each report. An answer of None (unparsable) names no rule and never counts
    as `exact`. A rule that occurs only in an answer is a label too, so inventing rules lowers precision.
    """
    predicted = [answer or () for answer in answers]
    labels = sorted({rule for rules in [*true, *predicted] for rule in rules})
    exact = sum(answer is not None and set(truth) == set(answer) for truth, answer in zip(true, answers, strict=True))
    scores = {
        "n_reports": len(true),
        "n_violations": sum(len(set(rules)) for rules in true),
        "micro": {"precision": 0.0, "recall": 0.0, "f1": 0.0},
        "exact": exact / max(1, len(true)),
        "per_rule": {},
    }
    if not labels:  # scikit-learn rejects an empty matrix
        return scores
    # scikit-learn would treat a single column as binary classification. An extra column of zeros avoids this and
    # changes no score.
    binarizer = MultiLabelBinarizer(classes=[*labels, ""])
    y_true, y_pred = binarizer.fit_transform(true), binarizer.transform(predicted)
    precision, recall, f1, _ = precision_recall_fscore_support(y_true, y_pred, average="micro", zero_division=0)
    scores["micro"] = {"precision": float(precision), "recall": float(recall), "f1": float(f1)}
    columns = precision_recall_fscore_support(y_true, y_pred, average=None, zero_division=0)
    for rule, precision, recall, f1, n_true, n_predicted in zip(labels, *columns, y_pred.sum(axis=0), strict=False):
        scores["per_rule"][rule] = {
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "n_true": int(n_true),
            "n_predicted": int(n_predicted),
        }
    return scores


def baseline_answers(
    true: Sequence[Sequence[str]], training: Sequence[Sequence[str]] | None
) -> dict[str, tuple[str, ...]]:
    """Baseline name -> the rules that it predicts for every report. The baselines are fitted on `training`.

    Without a training split they are fitted on `true`. This favours "flag everything", and "most frequent violation" is
    left out.
    """
    answers = trivial_predictions(true if training is None else training)
    if training is None:
        del answers["most frequent violation"]
    return answers
