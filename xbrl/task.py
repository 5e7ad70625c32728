"""The supervisor's task for the scripts (`--task xbrl.task`) and for the curves of a run (`eval.metric="xbrl.task"`)."""

from collections.abc import Iterable, Sequence

from eval.task import Task
from xbrl.answers.baselines import (
    ENGINE,
    add_baseline_options,
    baseline_results,
    read_baseline_options,
    set_default_splits,
)
from xbrl.answers.curves import scores
from xbrl.answers.scores import check_examples, score_answers
from xbrl.answers.tables import figures, one_answer, rule_lines
from xbrl.read.dpm import load_cells
from xbrl.read.render import NOTATION, form_texts


def _forms(modules: Sequence[str]) -> Iterable[str]:
    """Yield a text for each of the EBA's forms, or of those of modules such as COREP_LCR_DA."""
    return form_texts(load_cells(), tuple(modules))


TASK = Task(
    check=check_examples,
    score=score_answers,
    baselines=baseline_results,
    add_options=add_baseline_options,
    set_defaults=set_default_splits,
    read_options=read_baseline_options,
    figures=figures,
    more_lines=rule_lines,
    one_answer=one_answer,
    metric=scores,
    patterns=NOTATION,
    forms=_forms,
    example="report",
    cluster="bank",
    label="rule",
    engine=ENGINE,
)
