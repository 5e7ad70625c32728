"""Tables of the supervisor's task."""

import copy

from eval.report import compare
from eval.task import full_report
from tests.eval.tables import cells
from xbrl.answers.baselines import COMPOSED
from xbrl.answers.tables import figures
from xbrl.task import TASK

RESULT = {
    **{"model": "runs/x/export", "data": "test.jsonl", "data_sha256": "ab", "n_examples": 2, "n_in_file": 2},
    **{"dtype": "bfloat16", "seconds": 12.3, "max_new_tokens": 80, "cut_short": 1},
    "violations": {
        **{"n_reports": 2, "n_violations": 3, "exact": 0.5, "macro_f1": 0.4, "void_lines": 3, "void_true_lines": 2},
        **{"note_f1": 0.45, "baselines_fitted_on": "9 training examples", "pairs": {"n": 2, "right": 0.5}},
        **{"unparsable": {"n": 1, "share": 0.5}, "contradictions": {"n": 4, "lines": 30}},
        "micro": {"precision": 0.75, "recall": 0.5, "f1": 0.6},
        "kinds": {"pledged": {"f1": 0.25, "n_reports": 4, "exact": 0.75, "note_f1": 0.5}},
        "per_rule": {"LCR_MIN": {"precision": 1.0, "recall": 0.25, "f1": 0.4, "n_true": 4, "n_predicted": 1}},
        "baselines": {
            "always clean": {"f1": 0.0},
            COMPOSED: {"f1": 0.41, "note_f1": 0.125, "notes": {"n": 5, "decided_f1": 0.55, "amount_f1": 0.35}},
        },
    },
    "notes": {
        **{"n": 5, "n_said": 4, "n_matched": 3, "f1": 0.2, "amount_f1": 0.4, "decided_f1": 0.8},
        "right": {"applies": 1.0, "amount": 0.5, "who": 0.25, "since": 0.75, "quote": 0.125},
        "kinds": {"pledged": {"n": 2, "decided_f1": 0.6, "f1": 0.1}},
        "languages": {"de": {"n": 1, "decided_f1": 0.3, "f1": 0.0}},
        "pairs": {"n": 4, "right": 0.25},
    },
    "facts": {"f1": 0.3, "n_true": 5, "n_named": 4, "right": {"where": 1.0, "value": 0.5, "limit": 0.5, "legal": 0.25}},
    "rouge_l": {"of": "directive", "n": 2, "f": 0.321, "baselines": {}},
    "loss": {"mean": 1.2345, "targets": 1234},
    "answers": [
        {"id": "a", "true": [], "predicted": [], "rouge_l": 1.0, "answer": "clean"},
        {"id": "b", "true": ["LCR_MIN"], "predicted": [], "rouge_l": 0.0, "answer": "breach"},
    ],
}


def test_the_table_has_every_figure_with_its_n():
    text, n = full_report(TASK, RESULT, None, 0), "3 violations in 2 reports"
    for name, *rest in (
        ("violations F1 (micro)", "0.600", "0.000 to 0.793", n),  # Wilson: F1 is 0 in the one that says something
        ("baseline: engine + note words", "0.410", n),
        ("unparsable answers", "50.0%", "2 reports"),
        ("directive ROUGE-L (F)", "0.321", "0.095 to 0.905", "2 directives, words of a-z and 0-9"),
        ("F1, mean over rules (macro)", "0.400", "1 rules, true or predicted"),
        ("void lines in other answers", "3", "2 reports"),
        ("verdicts that contradict their own figures", "4", "30 lines"),
        ("true lines that cannot be read", "2", "left out of the facts"),
        ("F1, notes: pledged", "0.250", "4 reports, 75.0% right, of rules decided by notes 0.500"),
        ("facts of notes, F1: kind and applies", "0.800", "5 facts, 4 stated"),
        ("quote right", "12.5%", "3 facts whose kind is named"),
        ("de", "0.300", "1 facts, all right 0.000"),
        ("notes of minimal pairs right", "25.0%", "4 pairs"),
        ("minimal pairs right", "50.0%", "2 pairs"),
        ("facts F1: all of a finding right", "0.300", "5 findings"),
        ("article right", "25.0%", "4 findings whose rule is named, of 5"),
        ("validation loss (nats/token)", "1.234", "1,234 response tokens"),
        ("answers cut short", "1", "at 80 tokens (as given)"),
        ("LCR_MIN", "1.000", "0.250", "0.400", "4", "1"),
    ):
        assert cells(text, name) == [name, *rest]
    assert cells(text, "F1 of rules decided by notes")[:2] == ["F1 of rules decided by notes", "0.450"]
    lines = [line.split() for line in text.splitlines() if "engine + note words" in line]
    assert [line[5] for line in lines] == ["0.410", "0.125", "0.550"]
    assert "fitted on 9 training examples" in text
    lines = [line for line in text.splitlines() if line.endswith(" reports")]
    assert len(lines) > 3 and len({line.index(line.split("  ")[-1].strip(), 40) for line in lines}) == 1


def test_compare_shows_both_results_and_the_change():
    after = copy.deepcopy(RESULT)
    after["violations"]["micro"]["f1"] = 0.9
    before = {key: value for key, value in RESULT.items() if key != "loss"}
    text = compare(before, after, figures)
    assert cells(text, "before") == ["before", "after", "change", "95% interval", "N"]
    # The change comes from the answers, which are the same in both results, not from the F1 changed above.
    f1 = ["violations F1 (micro)", "0.600", "0.900", "+0.0000", "+0.0000 to +0.0000", "3 violations in 2 reports"]
    assert cells(text, "violations F1") == f1
    assert cells(text, "validation loss")[1:3] == ["-", "1.234"]
