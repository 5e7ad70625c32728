"""Rows for what needs no language model: trivial answers, learned baselines, and the rule engine without the notes."""

from collections.abc import Sequence

from eval.asked_examples import has_answer
from eval.comparison.measures import ENGINE
from xbrl.answers.baselines import baseline_predictions
from xbrl.answers.violations import baseline_answers, true_answers


def baseline_tasks(examples: Sequence[dict], training: Sequence[dict] | None, where: str) -> dict[str, dict]:
    """Baseline -> its answers in the form of a result of scripts/evaluate.py. Empty for another task.

    `examples` are those that the models answered. Without a training split there are only the rule engine (field `engine`
    of the examples) and the trivial answers, which are then fitted on the examples themselves.
    """
    asked = [*filter(has_answer, examples)]
    true = true_answers(asked, where) if asked else None
    if true is None:
        return {}
    rules = [answer.rule_ids for answer in true]
    fitted_on = [*filter(has_answer, training or ())]
    known = (true_answers(fitted_on, "the training split") if fitted_on else None) or []
    trivial = baseline_answers(rules, [answer.rule_ids for answer in known] or None)
    predictions = {name: [answer] * len(asked) for name, answer in trivial.items()}
    if known:
        labelled = [one | {"violations": truth.rule_ids} for one, truth in zip(fitted_on, known, strict=True)]
        predictions |= baseline_predictions(labelled, asked)
        predictions.pop("engine", None)
    if all("engine" in example for example in asked):
        predictions[ENGINE] = [tuple(example["engine"]) for example in asked]
    return {name: {"answers": _answers(asked, rules, said)} for name, said in predictions.items()}


def _answers(asked: Sequence[dict], true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> list[dict]:
    return [
        {"id": one.get("id"), "cluster": one.get("bank"), "true": list(truth), "predicted": list(said)}
        for one, truth, said in zip(asked, true, predicted, strict=True)
    ]
