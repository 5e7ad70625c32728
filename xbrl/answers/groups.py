"""Scores of parts of a test: reports by the kind of their note, and minimal pairs."""

from collections.abc import Sequence

from xbrl.answers.baselines import micro_f1, note_f1


def score_kinds(examples: Sequence[dict], true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict:
    """Kind of note -> scores on the reports with such a note (field `kind`); {} if no report has one.

    `with a note` has all of them, `note alone` those in which the engine finds nothing (field `engine` is empty). `note_f1`
    is the F1 of the rules that notes of this kind decide, None if they decide none.
    """
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        if example.get("kind"):
            groups.setdefault(example["kind"], []).append(i)
            groups.setdefault("with a note", []).append(i)
            if not example.get("engine", True):
                groups.setdefault("note alone", []).append(i)
    return {
        name: {
            "n_reports": len(members),
            "n_violations": sum(len(set(true[i])) for i in members),
            "exact": sum(set(true[i]) == set(predicted[i]) for i in members) / len(members),
            "note_f1": note_f1(
                [examples[i] | {"violations": true[i]} for i in members], [predicted[i] for i in members]
            ),
            **micro_f1([predicted[i] for i in members], [true[i] for i in members]),
        }
        for name, members in sorted(
            groups.items(), key=lambda item: (item[0] in ("with a note", "note alone"), item[0])
        )
    }


def pairs_right(
    examples: Sequence[dict], true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> list[bool]:
    """For each minimal pair (two examples with the same field `pair`), whether both reports are right.

    A pair of which only one report is evaluated is left out.
    """
    members: dict[str, list[bool]] = {}
    for example, truth, one in zip(examples, true, predicted, strict=True):
        if example.get("pair"):
            members.setdefault(str(example["pair"]), []).append(set(truth) == set(one))
    return [all(right) for right in members.values() if len(right) == 2]
