"""Which rules an answer calls violated, against the truth: micro-F1, precision and recall per rule, trivial baselines."""

from collections.abc import Sequence

from sklearn.metrics import precision_recall_fscore_support
from sklearn.preprocessing import MultiLabelBinarizer

from common.errors import UserError
from data.regulator.answers import Answer, parse_answer
from data.regulator.baselines import trivial_predictions


def true_answers(examples: Sequence[dict], where: str) -> list[Answer] | None:
    """Violations and directive of each example; None if none of them is of the regulator's form (another domain).

    The field `violations` decides where an example has it, else the assistant's message, which ends the conversation.
    Raises `UserError` that names the example if only some of them have violations.
    """
    answers = [_true_answer(example) for example in examples]
    missing = [i for i, answer in enumerate(answers) if answer is None]
    if len(missing) == len(answers):
        return None
    if missing:
        name = examples[missing[0]].get("id", missing[0] + 1)
        raise UserError(
            f"{where}, example {name}: neither a field `violations` nor an answer of the form `Violations: ... "
            f"Directive: ...`, while other examples have one; add it or take the example out."
        )
    return answers


def _true_answer(example: dict) -> Answer | None:
    message = example["messages"][-1]["content"]
    parsed = parse_answer(message)
    if "violations" in example:
        return Answer(tuple(example["violations"]), parsed.directive if parsed else message)
    return parsed


def score_violations(true: Sequence[Sequence[str]], answers: Sequence[Sequence[str] | None]) -> dict:
    """Multilabel scores over (report, rule) pairs, by scikit-learn; 0 where a ratio is undefined.

    An answer of None (unparsable) names no rule, and is never exactly right. Rules that exist only in an answer are
    labels too, so inventing one costs precision.
    """
    predicted = [answer or () for answer in answers]
    labels = sorted({rule for rules in [*true, *predicted] for rule in rules})
    exact = sum(answer is not None and set(one) == set(answer) for one, answer in zip(true, answers, strict=True))
    scores = {
        "n_reports": len(true),
        "n_violations": sum(len(set(rules)) for rules in true),
        "micro": {"precision": 0.0, "recall": 0.0, "f1": 0.0},
        "exact": exact / max(1, len(true)),
        "per_rule": {},
    }
    if not labels:  # scikit-learn refuses an empty matrix
        return scores
    # It takes a matrix with one column for two classes, violated and not: a column of zeros beside it changes no score.
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
    """Name -> the rules that a trivial baseline answers to every report, fitted on the training split where it is given.

    Without one, "flag everything" knows the rules of the evaluated file itself (which favours it), and there is no
    "most frequent violation".
    """
    answers = trivial_predictions(true if training is None else training)
    if training is None:
        del answers["most frequent violation"]
    return answers
