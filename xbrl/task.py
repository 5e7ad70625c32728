"""The supervisor's task for the scripts (`--task xbrl.task`) and for the curves of a run (`eval.metric="xbrl.task"`)."""

from eval.task import Task
from xbrl.answers.baselines import (
    ENGINE,
    add_baseline_options,
    baseline_results,
    read_baseline_options,
    set_default_splits,
)
from xbrl.answers.curves import scores
from xbrl.answers.scores import score_answers, true_answers
from xbrl.answers.tables import figures, rule_lines
from xbrl.read.dpm import load_cells
from xbrl.read.render import NOTATION, form_texts

TASK = Task(
    check=true_answers,
    score=score_answers,
    baselines=baseline_results,
    add_options=add_baseline_options,
    set_defaults=set_default_splits,
    read_options=read_baseline_options,
    figures=figures,
    more_lines=rule_lines,
    metric=scores,
    patterns=NOTATION,
    forms=lambda modules: form_texts(load_cells(), tuple(modules)),  # all modules, or some such as COREP_LCR_DA
    example="report",
    cluster="bank",
    label="rule",
    main_baseline=ENGINE,
)
