"""The scores of the supervisor's answers that a run shows as curves."""

from collections.abc import Sequence

from xbrl.answers.answer_reader import parse_answer
from xbrl.answers.baselines import micro_f1
from xbrl.answers.facts import score_facts
from xbrl.answers.fields import check_scored_fields
from xbrl.answers.violations import labels_of, true_answers


def f1_scores(examples: Sequence[dict], answers: Sequence[str], where: str) -> dict[str, float] | None:
    """`f1` of the violated rules, and `fact_f1` of their facts, both micro-averaged as in `score.score_answers`.

    None if no example has violations (another task). Raises UserError, with the file `where`, as `violations.true_answers`
    and `fields.check_scored_fields` do.
    """
    check_scored_fields(examples, where)
    true = true_answers(examples, where)
    if true is None:
        return None
    read = [parse_answer(answer) for answer in answers]
    f1 = micro_f1([labels_of(answer) for answer in read], [answer.rule_ids for answer in true])["f1"]
    return {"f1": f1, "fact_f1": score_facts(true, read)["f1"]}
