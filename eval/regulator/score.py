"""Score a model's answers to bank reports: violations, ROUGE-L of the letter, and trivial baselines for both."""

from collections.abc import Sequence

from data.regulator.answer_reader import Answer, parse_answer
from eval.regulator.violations import baseline_answers, score_violations, true_answers
from eval.rouge import mean, rouge_l, score_whole_answers


def score_answers(
    examples: Sequence[dict], texts: Sequence[str], where: str, training: Sequence[dict] | None, train_where: str = ""
) -> dict:
    """Score `texts`, the model's answers to `examples` (conversations that end with the assistant's message).

    An answer that cannot be parsed has no violations and an empty directive. The trivial baselines are fitted on
    `training`, the training split, if given. Examples of another task, without violations, are scored by
    `rouge.score_whole_answers` instead.

    Raises `UserError` as `violations.true_answers` does; it names the file `where` or `train_where`.
    """
    true = true_answers(examples, where)
    if true is None:
        return score_whole_answers(examples, texts)
    parsed = [parse_answer(text) for text in texts]
    predicted = [answer or Answer((), "") for answer in parsed]
    scores = rouge_l([answer.directive for answer in true], [answer.directive for answer in predicted])
    fitted_on = true_answers(training, train_where) if training else None
    violations = score_violations(
        [answer.rule_ids for answer in true], [answer.rule_ids if answer else None for answer in parsed]
    )
    violations["unparsable"] = {"n": parsed.count(None), "share": parsed.count(None) / len(parsed)}
    violations["baselines"], letter_baselines = _score_baselines(true, fitted_on)
    violations["baselines_fitted_on"] = (
        f"{len(fitted_on)} training examples" if fitted_on else "the evaluated file itself"
    )
    return {
        "violations": violations,
        "rouge_l": {"of": "directive", "n": len(scores), "f": mean(scores), "baselines": letter_baselines},
        "answers": [
            {
                "id": example.get("id"),
                "true": list(truth.rule_ids),
                "predicted": list(answer.rule_ids) if answer else None,
                "rouge_l": score,
                "answer": text,
            }
            for example, truth, answer, score, text in zip(examples, true, parsed, scores, texts, strict=True)
        ],
    }


def fixed_letter(rule_ids: Sequence[str], training: Sequence[Answer]) -> str | None:
    """The letter that a trivial baseline sends to every bank.

    It is the letter of the first training answer with exactly `rule_ids`; None if there is none.
    """
    return next((answer.directive for answer in training if set(answer.rule_ids) == set(rule_ids)), None)


def _score_baselines(true: list[Answer], training: list[Answer] | None) -> tuple[dict, dict]:
    """(baseline -> micro scores of the violations, baseline -> mean ROUGE-L of its fixed letter, if it has one)."""
    violation_scores, letter_scores = {}, {}
    training_rules = [answer.rule_ids for answer in training] if training else None
    true_rules = [answer.rule_ids for answer in true]
    for name, rules in baseline_answers(true_rules, training_rules).items():
        violation_scores[name] = score_violations(true_rules, [rules] * len(true))["micro"]
        letter = fixed_letter(rules, training) if training else None
        if letter is not None:
            letter_scores[name] = mean(rouge_l([answer.directive for answer in true], [letter] * len(true)))
    return violation_scores, letter_scores
