"""Score the violated rules that answers name: micro and macro F1, F1 per rule, without implied rules, exact reports."""

from collections.abc import Sequence

from common.errors import UserError
from eval.asked_examples import UNREADABLE
from xbrl.answers.answer_reader import Answer, claim_of, letter_in, parse_answer
from xbrl.answers.baselines import micro_f1, trivial_predictions
from xbrl.answers.implications import strictest


def true_answers(examples: Sequence[dict], where: str) -> list[Answer] | None:
    """The true violations, their facts and the directive of each example; None if no example has them (another task).

    Violations come from the example's field `violations`, or else from the assistant's last message; facts from that message,
    or else from the field `findings`.

    Raises `UserError` if only some of the examples have violations, or if a finding cannot be read; it names the file `where`
    and the first such example.
    """
    answers = [_true_answer(example, where) for example in examples]
    missing = [i for i, answer in enumerate(answers) if answer is None]
    if len(missing) == len(answers):
        return None
    if missing:
        name = examples[missing[0]].get("id", missing[0] + 1)
        raise UserError(
            f"{where}, example {name}: neither a field `violations` nor an answer of the form `Violations: ... "
            f"Directive: ...`, although other examples have one; add it or remove the example."
        )
    return [answer for answer in answers if answer]


def _true_answer(example: dict, where: str) -> Answer | None:
    message = example["messages"][-1]["content"]
    parsed = parse_answer(message)
    if "violations" not in example:
        return parsed
    if parsed:
        return Answer(tuple(example["violations"]), parsed.directive, parsed.claims, parsed.void)
    claims = [claim_of(finding) for finding in example.get("findings", ())]
    if None in claims:
        raise UserError(
            f"{where}, example {example.get('id', '?')}: the finding {example['findings'][claims.index(None)]} cannot be "
            f"read; it needs rule, cell, value, limit and legal as an answer prints them."
        )
    return Answer(
        tuple(example["violations"]), letter_in(message) or message, tuple(claim for claim in claims if claim)
    )


def labels_of(answer: Answer | None) -> tuple[str, ...]:
    """The rules that an answer names. One that cannot be read, in whole or in a line, names `UNREADABLE` too.

    This is a false positive, so that garbage costs on a clean report as well.
    """
    if answer is None:
        return (UNREADABLE,)
    return (*answer.rule_ids, UNREADABLE) if answer.void else answer.rule_ids


def score_violations(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict:
    """Multilabel scores over (report, rule) pairs, computed by scikit-learn; 0 where a ratio is undefined.

    `true` and `predicted` have the labels of each report. A label that occurs only in `predicted` counts too, so inventing
    rules, and `UNREADABLE`, lower precision. `macro_f1` is the mean F1 of the rules that occur in `true`. `without_implied`
    compares only the strictest rules on each ratio (`implications.strictest`).
    """
    # Here, because a run reads true answers and needs no scikit-learn.
    from sklearn.metrics import precision_recall_fscore_support
    from sklearn.preprocessing import MultiLabelBinarizer

    labels = sorted({rule for rules in [*true, *predicted] for rule in rules})
    scores = {
        "n_reports": len(true),
        "n_violations": sum(len(set(rules)) for rules in true),
        "micro": micro_f1(predicted, true),
        "macro_f1": 0.0,
        "without_implied": micro_f1([*map(strictest, predicted)], [*map(strictest, true)]),
        "exact": sum(set(truth) == set(one) for truth, one in zip(true, predicted, strict=True)) / max(1, len(true)),
        "per_rule": {},
    }
    if not labels:  # scikit-learn rejects an empty matrix
        return scores
    # scikit-learn would treat a single column as binary classification. An extra column of zeros avoids this and
    # changes no score.
    binarizer = MultiLabelBinarizer(classes=[*labels, ""])
    y_true, y_pred = binarizer.fit_transform(true), binarizer.transform(predicted)
    columns = precision_recall_fscore_support(y_true, y_pred, average=None, zero_division=0)
    for rule, precision, recall, f1, n_true, n_predicted in zip(labels, *columns, y_pred.sum(axis=0), strict=False):
        scores["per_rule"][rule] = {
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "n_true": int(n_true),
            "n_predicted": int(n_predicted),
        }
    known = [one["f1"] for one in scores["per_rule"].values() if one["n_true"]]
    scores["macro_f1"] = sum(known) / len(known) if known else 0.0
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
