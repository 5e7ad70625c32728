"""Score the facts of the violations: rule, cell or counterparty, value, limit and article, compared as numbers and articles."""

from collections.abc import Sequence

from eval.asked_examples import UNREADABLE
from xbrl.answers.answer_reader import Answer, Claim
from xbrl.answers.baselines import micro_f1

FIELDS = ("where", "value", "limit", "legal")


def facts_of(answer: Answer | None) -> frozenset[Claim | str]:
    """The claims of an answer, each with all of its facts; checks of requirements that are met are left out.

    An answer that cannot be read, in whole or in a line, also has the wrong claim `UNREADABLE`.
    """
    if answer is None:
        return frozenset({UNREADABLE})
    claims = frozenset(claim for claim in answer.claims if claim.state != "met")
    return claims | {UNREADABLE} if answer.void else claims


def true_facts(truth: Answer) -> frozenset[Claim | str]:
    """The facts of an example. Lines of its own answer that cannot be read are left out (and counted by `score_answers`)."""
    return facts_of(truth) - {UNREADABLE}


def score_facts(true: Sequence[Answer], answers: Sequence[Answer | None]) -> dict:
    """Micro-averaged scores over claims that are right in every field, and each field on its own.

    `right`: for the true claims whose rule the answer names, the share whose value (and so on) is right. `n_true` counts the
    true claims, `n_named` those whose rule is named.
    """
    pairs = [(true_facts(truth), facts_of(answer)) for truth, answer in zip(true, answers, strict=True)]
    named = [
        (claim, best)
        for claims, predicted in pairs
        for claim in claims
        if isinstance(claim, Claim) and (best := _closest(claim, predicted))
    ]
    return micro_f1([claimed for _, claimed in pairs], [facts for facts, _ in pairs]) | {
        "n_true": sum(len(claims) for claims, _ in pairs),
        "n_named": len(named),
        "right": {
            field: sum(_same(field, claim, best) for claim, best in named) / len(named) if named else 0.0
            for field in FIELDS
        },
    }


def _closest(claim: Claim, predicted: frozenset[Claim | str]) -> Claim | None:
    """The predicted claim on the same rule that agrees in the most fields."""
    same = [
        other
        for other in predicted
        if isinstance(other, Claim) and (other.rule, other.state) == (claim.rule, claim.state)
    ]
    return max(same, key=lambda other: sum(_same(field, claim, other) for field in FIELDS), default=None)


def _same(field: str, one: Claim, other: Claim) -> bool:
    if field == "limit":
        return (one.relation, one.limit) == (other.relation, other.limit)
    return getattr(one, field) == getattr(other, field)
