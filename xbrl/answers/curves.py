"""The scores of the supervisor's answers that a run shows as curves: `eval.metric="xbrl.answers.curves:scores"`."""

from collections.abc import Sequence

from common.errors import UserError
from xbrl.answers.answer_reader import parse_answer
from xbrl.answers.baselines import micro_f1
from xbrl.answers.facts import score_facts
from xbrl.answers.fields import check_scored_fields
from xbrl.answers.violations import labels_of, true_answers

WHERE = "the validation data"


def scores(answers: Sequence[str], examples: Sequence[dict]) -> dict[str, float]:
    """`f1` of the violated rules, and `fact_f1` of their facts, both micro-averaged as in `score.score_answers`.

    Raises UserError, with the example, as `violations.true_answers` and `fields.check_scored_fields` do, or if no example
    has violations.
    """
    check_scored_fields(examples, WHERE)
    true = true_answers(examples, WHERE)
    if true is None:
        raise UserError(
            f"{WHERE} have no field `violations` and no answer of the form `Violations: ... Directive: ...`; leave "
            "eval.metric out, or make the data with scripts/make_reports.py"
        )
    read = [parse_answer(answer) for answer in answers]
    f1 = micro_f1([labels_of(answer) for answer in read], [answer.rule_ids for answer in true])["f1"]
    return {"f1": f1, "fact_f1": score_facts(true, read)["f1"]}
