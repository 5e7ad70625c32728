"""The scores of the supervisor's task that a run shows as curves."""

from collections.abc import Sequence

from xbrl.answers.answer_reader import read_facts
from xbrl.answers.note_scores import score_notes
from xbrl.answers.scores import labelled, labels_of, micro_f1, note_f1, read_answer, score_facts, true_answers

WHERE = "the validation data"


def scores(answers: Sequence[str], examples: Sequence[dict]) -> dict[str, float]:
    """Return `f1` of the violated rules, `fact_f1` of the findings that answers list, and `note_f1` of the notes.

    `note_f1` is the F1 of kind and applies of the facts of notes (`note_scores.score_notes`) if answers state such facts, else
    the F1 of the rules that notes decide; it is missing if notes decide nothing. All are computed as in `scores.score_answers`.

    Raise UserError, which names the example, as `true_answers` does.
    """
    true = true_answers(examples, WHERE)
    read = [read_answer(answer, example) for answer, example in zip(answers, examples, strict=True)]
    labels = [labels_of(answer) for answer in read]
    f1 = micro_f1(labels, [answer.rule_ids for answer in true])["f1"]
    values = {"f1": f1}
    if any(answer.claims for answer in true):
        values["fact_f1"] = score_facts(true, read)["f1"]
    notes = None
    if any(read_facts(example["messages"][-1]["content"]) for example in examples):
        notes = score_notes(examples, [(read_facts(answer) or ([], 0))[0] for answer in answers])
    value = notes["decided_f1"] if notes else note_f1(labelled(examples, WHERE), labels)
    return values if value is None else values | {"note_f1": value}
