"""Score answers to bank reports: rules, the facts of each finding, the facts of notes, letters, and the baselines."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from common.errors import UserError
from eval.asked_examples import UNREADABLE, report_of
from eval.rouge import mean, rouge_l
from xbrl.answers.answer_reader import Answer, Claim, letter_in, parse_answer, read_facts
from xbrl.answers.composed import printed_report, rules_that_follow
from xbrl.answers.note_scores import note_of, score_notes, true_facts

FIELDS = ("where", "value", "limit", "legal")  # the parts of a finding, besides its rule
Rules = Sequence[str]


def score_answers(
    texts: Sequence[str],
    examples: Sequence[dict],
    where: str,
    training: Sequence[dict] | None = None,
    train_where: str = "",
    *,
    validation: Sequence[dict] = (),
    probe: str | None = None,
) -> dict:
    """Score `texts`, the model's answers to `examples` (conversations that end with the assistant's message).

    An answer that cannot be read has an empty letter, and predicts the rule `UNREADABLE`, which is never true. The baselines are
    fitted on `training`, the training split, if given; `validation` and `probe` go to `baselines.baseline_predictions`.

    Raise UserError as `true_answers` does; it names the file `where` or `train_where`.
    """
    from xbrl.answers.baselines import score_baselines  # which imports this module

    true = true_answers(examples, where)
    read = [read_answer(text, example) for text, example in zip(texts, examples, strict=True)]
    has_letters = any(truth.directive for truth in true)
    letters = [answer.directive if answer else "" for answer in read]
    labels = [labels_of(answer) for answer in read]
    known, fitted_on = labelled(examples, where), labelled(training or (), train_where)
    rouge = rouge_l([truth.directive for truth in true], letters)
    pairs = pairs_right(known, labels)
    answer_notes = [read_facts(text) or ([], 0) for text in texts]
    states_notes = any(read_facts(example["messages"][-1]["content"]) for example in examples)
    void = sum(answer.void for answer in read if answer)
    void += sum(lines for _, lines in answer_notes)
    claims = [claim for answer in read if answer for claim in answer.claims]
    return {
        "violations": score_violations([truth.rule_ids for truth in true], labels)
        | {
            "unparsable": {"n": read.count(None), "share": read.count(None) / len(read)},
            "void_lines": void,
            "void_true_lines": sum(truth.void for truth in true),
            "contradictions": {"n": sum(claim.contradicts_itself for claim in claims), "lines": len(claims)},
            "baselines": score_baselines(fitted_on, known, validation, probe),
            "baselines_fitted_on": (f"{len(fitted_on)} training examples" if fitted_on else "the evaluated file itself")
            + (f", tuned on {len(validation)} of validation" if fitted_on and validation else ""),
            "note_f1": note_f1(known, labels),
            "kinds": score_kinds(known, labels),
            "pairs": {"n": len(pairs), "right": mean(pairs)},
        },
        "notes": score_notes(examples, [facts for facts, _ in answer_notes]) if states_notes else None,
        "facts": score_facts(true, read) if any(truth.claims for truth in true) else None,
        **({"rouge_l": {"of": "directive", "n": len(rouge), "f": mean(rouge), "baselines": {}}} if has_letters else {}),
        "answers": [
            _row(example, truth, answer, text) | ({"rouge_l": score} if has_letters else {})
            for example, truth, answer, text, score in zip(examples, true, read, texts, rouge, strict=True)
        ],
    }


def _row(example: dict, truth: Answer, answer: Answer | None, text: str) -> dict:
    """Return one answer of the result: its content, and the fields of its example for intervals and tables."""
    facts, claimed = facts_of(truth) - {_WRONG}, facts_of(answer)
    return {
        "id": example.get("id"),
        "cluster": example.get("bank"),
        "true": list(truth.rule_ids),
        "predicted": list(answer.rule_ids) if answer else None,
        "unreadable": UNREADABLE in labels_of(answer),
        **(
            {"facts": [len(facts & claimed), len(facts), len(claimed)]} if truth.directive else {}
        ),  # right, true, claimed
        **{key: example[key] for key in ("kind", "pair") if example.get(key)},
        "answer": text,
    }


def labelled(examples: Sequence[dict], where: str) -> list[dict]:
    """Return the examples with the field `violations`, from `true_answers`."""
    true = true_answers(examples, where)
    return [example | {"violations": list(answer.rule_ids)} for example, answer in zip(examples, true, strict=True)]


def true_answers(examples: Sequence[dict], where: str) -> list[Answer]:
    """Return the true violations of each example, their facts, and the directive.

    Violations come from the example's field `violations`, or else from the assistant's last message; facts from that message.

    Raise UserError as `check_scored_fields` does, and for the first example without violations; it names the file `where`.
    """
    check_scored_fields(examples, where)
    answers = []
    for number, example in enumerate(examples, 1):
        if (answer := _true_answer(example)) is None:
            raise UserError(
                f"{where}, example {example.get('id', number)}: neither a field `violations` nor an answer of the form "
                "`Violations: ... Directive: ...`; add it or remove the example, or leave out the task xbrl.task"
            )
        answers.append(answer)
    return answers


def _true_answer(example: dict) -> Answer | None:
    message = example["messages"][-1]["content"]
    parsed = read_answer(message, example)
    if "violations" not in example:
        return parsed
    rules = tuple(example["violations"])
    if parsed:
        return Answer(rules, parsed.directive, parsed.claims, parsed.void)
    return Answer(rules, letter_in(message) or message)


def read_answer(text: str, example: dict) -> Answer | None:
    """Read an answer to `example`. If the example's own answer states facts alone, the rules compute the violations.

    Return None if the answer cannot be read.
    """
    reference = example["messages"][-1]["content"]
    if parse_answer(reference) or read_facts(reference) is None:
        return parse_answer(text)
    if (stated := read_facts(text)) is None:
        return None
    facts, void = stated
    report = report_of(example)
    rules = rules_that_follow(printed_report(report), note_of(report), facts, example.get("engine", ()))
    return Answer(tuple(rules), "", (), void)


def labels_of(answer: Answer | None) -> tuple[str, ...]:
    """Return the rules that an answer predicts, with `UNREADABLE` if the answer or any line cannot be read.

    `UNREADABLE` is a false positive, so that garbage costs on a clean report as well.
    """
    rules = answer.rule_ids if answer else ()
    return (*rules, UNREADABLE) if answer is None or answer.void else rules


def micro_f1(predicted: Sequence[Iterable], true: Sequence[Iterable]) -> dict[str, float]:
    """Return micro-averaged precision, recall and F1 of the items of each report, such as its rules; 0 if undefined."""
    pairs = [(set(guess), set(truth)) for guess, truth in zip(predicted, true, strict=True)]
    right = sum(len(guess & truth) for guess, truth in pairs)
    n_predicted, n_true = sum(len(guess) for guess, _ in pairs), sum(len(truth) for _, truth in pairs)
    return {
        "precision": right / n_predicted if n_predicted else 0.0,
        "recall": right / n_true if n_true else 0.0,
        "f1": 2 * right / (n_predicted + n_true) if n_predicted + n_true else 0.0,
    }


def score_violations(true: Sequence[Rules], predicted: Sequence[Rules]) -> dict:
    """Score (report, rule) pairs. `true` and `predicted` have the rules of each report. An undefined ratio is 0.

    `micro` counts every predicted rule, so invented rules and `UNREADABLE` lower its precision. `macro_f1` is the mean F1 of the
    rules that are true or predicted: an invented rule counts with 0. `UNREADABLE` is no rule.
    """
    per_rule = {}
    for rule in sorted({rule for rules in [*true, *predicted] for rule in rules}):
        truth, guesses = ([{rule} & set(rules) for rules in reports] for reports in (true, predicted))
        counts = {"n_true": sum(map(len, truth)), "n_predicted": sum(map(len, guesses))}
        per_rule[rule] = micro_f1(guesses, truth) | counts
    return {
        "n_reports": len(true),
        "n_violations": sum(len(set(rules)) for rules in true),
        "micro": micro_f1(predicted, true),
        "macro_f1": mean([scores["f1"] for rule, scores in per_rule.items() if rule != UNREADABLE]),
        "exact": mean([set(truth) == set(guess) for truth, guess in zip(true, predicted, strict=True)]),
        "per_rule": per_rule,
    }


def decided_by_notes(examples: Sequence[dict]) -> list[frozenset[str]]:
    """Return for each example the rules that its note decides; none without a note, or without the field `engine`.

    A note decides the rules on which the truth and the engine differ in any example with a note of the same kind.
    """
    rules: dict[str, frozenset[str]] = {}
    for example in examples:
        if example.get("kind") and "engine" in example:
            decided = frozenset(example["violations"]) ^ frozenset(example["engine"])
            rules[example["kind"]] = rules.get(example["kind"], frozenset()) | decided
    return [rules.get(example.get("kind", ""), frozenset()) for example in examples]


def note_f1(examples: Sequence[dict], predicted: Sequence[Iterable[str]]) -> float | None:
    """Return the F1 of the rules that notes decide (`decided_by_notes`); None if they decide nothing."""
    decided = decided_by_notes(examples)
    if not any(decided):
        return None
    true = [rules & set(example["violations"]) for rules, example in zip(decided, examples, strict=True)]
    return micro_f1([rules & set(guess) for rules, guess in zip(decided, predicted, strict=True)], true)["f1"]


def score_kinds(examples: Sequence[dict], predicted: Sequence[Rules]) -> dict[str, dict]:
    """Return kind of note -> scores on the reports with such a note (field `kind`); `with a note` covers all kinds.

    `note_f1` is the F1 of the rules that notes of this kind decide; None if they decide no rule.
    """
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        for kind in (example["kind"], "with a note") if example.get("kind") else ():
            groups.setdefault(kind, []).append(i)
    scores = {}
    for kind, members in sorted(groups.items(), key=lambda item: (item[0] == "with a note", item[0])):
        part, guesses = [examples[i] for i in members], [predicted[i] for i in members]
        of_kind = score_violations([example["violations"] for example in part], guesses)
        scores[kind] = {name: of_kind[name] for name in ("n_reports", "n_violations", "exact")}
        scores[kind] |= {"note_f1": note_f1(part, guesses), **of_kind["micro"]}
    return scores


def pairs_right(examples: Sequence[dict], predicted: Sequence[Rules]) -> list[bool]:
    """Return for each minimal pair (two examples with the same field `pair`) whether the rules of both reports are right.

    A pair is left out if only one of its reports is evaluated.
    """
    members: dict[str, list[bool]] = {}
    for example, rules in zip(examples, predicted, strict=True):
        if example.get("pair"):
            members.setdefault(str(example["pair"]), []).append(set(example["violations"]) == set(rules))
    return [all(right) for right in members.values() if len(right) == 2]


_WRONG = Claim(UNREADABLE, "", "", "", "", frozenset())


def facts_of(answer: Answer | None) -> frozenset[Claim]:
    """Return the claims of an answer, and the wrong claim `_WRONG` if the whole answer or any line cannot be read."""
    claims = frozenset(answer.claims if answer else ())
    return claims | {_WRONG} if answer is None or answer.void else claims


def score_facts(true: Sequence[Answer], answers: Sequence[Answer | None]) -> dict:
    """Score findings, micro-averaged, that are right in every field, and each field on its own.

    `right`: of the true findings whose rule the answer names, the fraction whose value (and so on) is right. `n_true` counts the
    true findings, `n_named` the ones whose rule is named. True lines that cannot be read are left out.
    """
    pairs = [(facts_of(truth) - {_WRONG}, facts_of(answer)) for truth, answer in zip(true, answers, strict=True)]
    named = [(claim, best) for claims, claimed in pairs for claim in claims if (best := _closest(claim, claimed))]
    return micro_f1([claimed for _, claimed in pairs], [facts for facts, _ in pairs]) | {
        "n_true": sum(len(claims) for claims, _ in pairs),
        "n_named": len(named),
        "right": {field: mean([_same(field, claim, best) for claim, best in named]) for field in FIELDS},
    }


def _closest(claim: Claim, predicted: Iterable[Claim]) -> Claim | None:
    """Return the predicted claim on the same rule that agrees in the most fields; None without one."""
    candidates = [guess for guess in predicted if guess.rule == claim.rule]
    return max(candidates, key=lambda guess: sum(_same(field, claim, guess) for field in FIELDS), default=None)


def _same(field: str, claim: Claim, guess: Claim) -> bool:
    if field == "limit":
        return (claim.relation, claim.limit) == (guess.relation, guess.limit)
    return getattr(claim, field) == getattr(guess, field)


def _list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


_RULES = ("a list of ids of rules", _list_of(str))
_TEXT = ("a text", lambda value: isinstance(value, (str, int, type(None))))
_FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # field of an example -> its form in words, and its test
    "violations": _RULES,
    "engine": _RULES,
    "kind": _TEXT,
    "pair": _TEXT,
    "bank": _TEXT,
    "note": _TEXT,
}


def check_scored_fields(examples: Sequence[dict], where: str) -> None:
    """Raise UserError, with the file `where` and the example, for the first malformed field.

    Without this check, a text in place of a list would be scored letter by letter.
    """
    for i, example in enumerate(examples, 1):
        for name, (form, has_form) in _FORMS.items():
            if name in example and not has_form(example[name]):
                shown = f"{example[name]!r:.60}"
                raise UserError(f"{where}, example {example.get('id', i)}: `{name}` must be {form}, not {shown}")
        true_facts(example, where)
