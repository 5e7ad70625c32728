"""The scores of the supervisor's answers that a run shows as curves: `eval.metric="xbrl.answers.curves:scores"`."""

from collections.abc import Sequence

from common.errors import UserError
from xbrl.answers.answer_reader import parse_answer, read_facts
from xbrl.answers.note_scores import score_notes
from xbrl.answers.scores import labelled, labels_of, micro_f1, note_f1, score_facts, true_answers

WHERE = "the validation data"


def scores(answers: Sequence[str], examples: Sequence[dict]) -> dict[str, float]:
    """`f1` of the violated rules, `fact_f1` of the findings with all their facts, `note_f1` of what notes say.

    `note_f1` is the F1 of kind and applies of the facts of notes (`note_scores.score_notes`) where answers state them, else
    that of the rules that notes decide; absent if notes decide nothing. All are as in `scores.score_answers`.

    Raises UserError, with the example, as `true_answers` does, or if no example has violations.
    """
    true = true_answers(examples, WHERE)
    if true is None:
        raise UserError(
            f"{WHERE} have no field `violations` and no answer of the form `Violations: ... Directive: ...`; set "
            "eval.metric=None, or make the data with scripts/make_reports.py"
        )
    read = [parse_answer(answer) for answer in answers]
    labels = [labels_of(answer) for answer in read]
    found = {
        "f1": micro_f1(labels, [answer.rule_ids for answer in true])["f1"],
        "fact_f1": score_facts(true, read)["f1"],
    }
    notes = None
    if any(read_facts(example["messages"][-1]["content"]) for example in examples):
        notes = score_notes(examples, [(read_facts(answer) or ([], 0))[0] for answer in answers])
    note = notes["decided_f1"] if notes else note_f1(labelled(examples, WHERE), labels)
    return found if note is None else found | {"note_f1": note}
