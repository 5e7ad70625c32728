"""ROUGE-L of letters against the best of their reference wordings, between what it would be at most and at least."""

from collections.abc import Sequence

from eval.rouge import best_rouge_l, ceiling, mean


def references_of(example: dict, letter: str) -> list[str]:
    """The reference wordings of an example: its field `references`, or else the letter of its own answer."""
    return list(dict.fromkeys(example.get("references") or [letter]))


def score_references(references: Sequence[Sequence[str]], letters: Sequence[str], fixed: str) -> dict:
    """`scores` of each letter, their mean `f`, and the bounds that give it a meaning.

    `ceiling`: a perfect answer in an unseen wording (`rouge.ceiling`), None with one reference each. `floor`: the mean score
    of `another report`, whose own letter is sent, and of one `fixed` letter for all. None where there is no other report.
    """
    scores = best_rouge_l(references, letters)
    others = [one[0] for one in [*references[1:], *references[:1]]]
    return {
        "scores": scores,
        "f": mean(scores),
        "ceiling": ceiling(references),
        "floor": {
            "another report": mean(best_rouge_l(references, others)) if len(references) > 1 else None,
            "fixed": mean(best_rouge_l(references, [fixed] * len(references))),
        },
    }
