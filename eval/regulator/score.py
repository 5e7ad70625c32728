"""From examples and a model's answers to figures: one dictionary that goes to JSON and to the table."""

from collections.abc import Sequence

from data.regulator.answers import Answer, parse_answer
from eval.regulator.violations import baseline_answers, score_violations, true_answers
from eval.rouge import fixed_letter, rouge_l


def score_answers(
    examples: Sequence[dict], texts: Sequence[str], where: str, training: Sequence[dict] | None, train_where: str = ""
) -> dict:
    """Scores of `texts`, the answers to `examples` (conversations that end with the assistant's message).

    An answer that cannot be parsed names no violation and has an empty directive. `training`: the training split, which
    only the trivial baselines are fitted on. For examples without violations (another domain) only ROUGE-L of the whole
    answer is given. Raises `UserError` as `violations.true_answers`, with the file, `where` or `train_where`.
    """
    true = true_answers(examples, where)
    if true is None:
        references = [example["messages"][-1]["content"] for example in examples]
        scores = rouge_l(references, texts)
        rows = zip(examples, texts, scores, strict=True)
        return {
            "rouge_l": {"of": "answer", "n": len(scores), "f": _mean(scores), "baselines": {}},
            "answers": [{"id": _id(example), "answer": text, "rouge_l": score} for example, text, score in rows],
        }
    parsed = [parse_answer(text) for text in texts]
    predicted = [answer or Answer((), "") for answer in parsed]
    scores = rouge_l([answer.directive for answer in true], [answer.directive for answer in predicted])
    fitted = true_answers(training, train_where) if training else None
    violations = score_violations([a.rule_ids for a in true], [a and a.rule_ids for a in parsed])
    violations["unparsable"] = {"n": parsed.count(None), "share": parsed.count(None) / len(parsed)}
    violations["baselines"], letters = _baselines(true, fitted)
    violations["baselines_fitted_on"] = f"{len(fitted)} training examples" if fitted else "the evaluated file itself"
    return {
        "violations": violations,
        "rouge_l": {"of": "directive", "n": len(scores), "f": _mean(scores), "baselines": letters},
        "answers": [
            {
                "id": _id(example),
                "true": list(one.rule_ids),
                "predicted": list(other.rule_ids) if found else None,
                "rouge_l": score,
                "answer": text,
            }
            for example, one, other, found, score, text in zip(
                examples, true, predicted, parsed, scores, texts, strict=True
            )
        ],
    }


def _baselines(true: list[Answer], fitted: list[Answer] | None) -> tuple[dict, dict]:
    """Micro scores of each trivial baseline, and ROUGE-L of the one training letter it would send to every bank."""
    scores, letters = {}, {}
    training = [answer.rule_ids for answer in fitted] if fitted else None
    for name, rules in baseline_answers([answer.rule_ids for answer in true], training).items():
        scores[name] = score_violations([a.rule_ids for a in true], [rules] * len(true))["micro"]
        letter = fixed_letter(rules, [(a.rule_ids, a.directive) for a in fitted]) if fitted else None
        if letter is not None:
            letters[name] = _mean(rouge_l([answer.directive for answer in true], [letter] * len(true)))
    return scores, letters


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) if scores else 0.0


def _id(example: dict) -> str | None:
    return example.get("id")
