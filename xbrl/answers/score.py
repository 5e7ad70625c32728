"""Score a model's answers to bank reports: violations, facts, letters, measures, and baselines beside them."""

from collections.abc import Sequence

from eval.asked_examples import UNREADABLE, report_of
from eval.rouge import best_rouge_l, mean, score_whole_answers
from xbrl.answers.answer_reader import Answer, parse_answer
from xbrl.answers.baselines import baseline_predictions, micro_f1, nearest_letters, note_f1
from xbrl.answers.demanded_measures import score_measures
from xbrl.answers.facts import facts_of, score_facts, true_facts
from xbrl.answers.fields import check_scored_fields
from xbrl.answers.groups import pairs_right, score_kinds
from xbrl.answers.letters import score_letters
from xbrl.answers.references import references_of, score_references
from xbrl.answers.violations import baseline_answers, labels_of, score_violations, true_answers


def score_answers(
    examples: Sequence[dict], texts: Sequence[str], where: str, training: Sequence[dict] | None, train_where: str = ""
) -> dict:
    """Score `texts`, the model's answers to `examples` (conversations that end with the assistant's message).

    An answer that cannot be read has an empty letter, and names the label `UNREADABLE`, which is never true. The baselines
    are fitted on `training`, the training split, if given. Examples of another task, without violations, are scored by
    `rouge.score_whole_answers` instead.

    Raises `UserError` as `violations.true_answers` and `fields.check_scored_fields` do; it names the file `where` or
    `train_where`.
    """
    check_scored_fields(examples, where)
    check_scored_fields(training or (), train_where)
    true = true_answers(examples, where)
    if true is None:
        return score_whole_answers(examples, texts)
    read = [parse_answer(text) for text in texts]
    letters = [answer.directive if answer else "" for answer in read]
    true_rules, labels = [answer.rule_ids for answer in true], [labels_of(answer) for answer in read]
    fitted_on = true_answers(training, train_where) if training else None
    references = [references_of(example, truth.directive) for example, truth in zip(examples, true, strict=True)]
    fixed = (fitted_on or true)[0].directive
    rouge = score_references(references, letters, fixed)
    scores = rouge.pop("scores")
    pairs = pairs_right(examples, true_rules, labels)
    baselines, letter_baselines = _score_baselines(examples, true, references, training, fitted_on)
    return {
        "violations": score_violations(true_rules, labels)
        | {
            "unparsable": {"n": read.count(None), "share": read.count(None) / len(read)},
            "void_lines": sum(answer.void for answer in read if answer),
            "void_true_lines": sum(truth.void for truth in true),
            "baselines": baselines,
            "baselines_fitted_on": (
                f"{len(fitted_on)} training examples" if fitted_on else "the evaluated file itself"
            ),
            "kinds": score_kinds(examples, true_rules, labels),
            "pairs": {"n": len(pairs), "right": mean(pairs)},
        },
        "facts": score_facts(true, read),
        "letters": score_letters(examples, true, letters),
        "measures": score_measures(examples, letters),
        "rouge_l": {"of": "directive", "n": len(scores), **rouge, "baselines": letter_baselines},
        "answers": [
            _row(example, truth, answer, text) | {"rouge_l": score}
            for example, truth, answer, text, score in zip(examples, true, read, texts, scores, strict=True)
        ],
    }


def _row(example: dict, truth: Answer, answer: Answer | None, text: str) -> dict:
    """One answer in the result: what it says, and what intervals and tables need of its example."""
    facts, claimed = true_facts(truth), facts_of(answer)
    return {
        "id": example.get("id"),
        "cluster": example.get("bank"),
        "true": list(truth.rule_ids),
        "predicted": list(answer.rule_ids) if answer else None,
        "unreadable": UNREADABLE in labels_of(answer),
        "facts": [len(facts & claimed), len(facts), len(claimed)],  # right, true, claimed
        **{key: example[key] for key in ("kind", "pair") if example.get(key)},
        "answer": text,
    }


def fixed_letter(rule_ids: Sequence[str], training: Sequence[Answer]) -> str | None:
    """The letter that a trivial baseline sends to every bank.

    It is the letter of the first training answer with exactly `rule_ids`; None if there is none.
    """
    return next((answer.directive for answer in training if set(answer.rule_ids) == set(rule_ids)), None)


def _score_baselines(
    examples: Sequence[dict],
    true: Sequence[Answer],
    references: Sequence[Sequence[str]],
    training: Sequence[dict] | None,
    fitted_on: Sequence[Answer] | None,
) -> tuple[dict, dict]:
    """(baseline -> micro scores of the violations, letter that is sent -> mean ROUGE-L)."""
    violation_scores, letter_scores = {}, {}
    training_rules = [answer.rule_ids for answer in fitted_on] if fitted_on else None
    true_rules = [answer.rule_ids for answer in true]
    for name, rules in baseline_answers(true_rules, training_rules).items():
        violation_scores[name] = micro_f1([rules] * len(true), true_rules)
        letter = fixed_letter(rules, fitted_on) if fitted_on else None
        if letter is not None:
            letter_scores[f"the letter of {name}"] = mean(best_rouge_l(references, [letter] * len(true)))
    if training and fitted_on:
        known = [one | {"violations": truth.rule_ids} for one, truth in zip(training, fitted_on, strict=True)]
        labelled = [one | {"violations": rules} for one, rules in zip(examples, true_rules, strict=True)]
        for name, predicted in baseline_predictions(known, examples).items():
            violation_scores[name] = micro_f1(predicted, true_rules) | {"note_f1": note_f1(labelled, predicted)}
        pairs = [(report_of(one), truth.directive) for one, truth in zip(training, fitted_on, strict=True)]
        nearest = nearest_letters(pairs, [report_of(example) for example in examples])
        letter_scores["the letter of the nearest report"] = mean(best_rouge_l(references, nearest))
    return violation_scores, letter_scores
