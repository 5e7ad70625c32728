"""Tables of the regulator's task."""

import copy

from eval.regulator.report import compare, one_answer, table
from tests.eval.tables import cells

RESULT = {
    "model": "runs/x/export",
    "data": "test.jsonl",
    "data_sha256": "ab",
    "n_examples": 2,
    "general_source": None,
    "dtype": "bfloat16",
    "seconds": 12.3,
    "max_new_tokens": 80,
    "cut_short": 1,
    "violations": {
        "n_reports": 2,
        "n_violations": 3,
        "micro": {"precision": 0.75, "recall": 0.5, "f1": 0.6},
        "exact": 0.5,
        "unparsable": {"n": 1, "share": 0.5},
        "per_rule": {"LCR_MIN": {"precision": 1.0, "recall": 0.25, "f1": 0.4, "n_true": 4, "n_predicted": 1}},
        "baselines": {"always clean": {"f1": 0.0}, "flag everything": {"f1": 0.41}},
        "baselines_fitted_on": "9 training examples",
    },
    "rouge_l": {"of": "directive", "n": 2, "f": 0.321, "baselines": {"always clean": 0.2}},
    "loss": {"mean": 1.2345, "targets": 1234},
    "answers": [
        {"id": "a", "true": [], "predicted": [], "rouge_l": 1.0, "answer": "clean"},
        {"id": "b", "true": ["LCR_MIN"], "predicted": [], "rouge_l": 0.0, "answer": "breach"},
    ],
}


def test_the_table_has_every_figure_with_its_n():
    text = table(RESULT)
    assert cells(text, "violations F1") == ["violations F1 (micro)", "0.600", "3 violations in 2 reports"]
    assert cells(text, "trivial: flag everything") == ["trivial: flag everything", "0.410", "3 violations in 2 reports"]
    assert cells(text, "unparsable") == ["unparsable answers", "50.0%", "2 reports"]
    assert cells(text, "directive ROUGE-L") == ["directive ROUGE-L (F)", "0.321", "2 directives"]
    assert cells(text, "validation loss") == ["validation loss (nats/token)", "1.234", "1,234 response tokens"]
    assert cells(text, "answers cut short") == ["answers cut short", "1", "at 80 tokens"]
    assert cells(text, "LCR_MIN") == ["LCR_MIN", "1.000", "0.250", "0.400", "4", "1"]
    assert "fitted on 9 training examples" in text
    assert "general" not in text


def test_columns_are_aligned():
    lines = [line for line in table(RESULT).splitlines() if line.endswith(" reports")]
    assert len(lines) > 3
    assert len({line.index(line.split("  ")[-1].strip(), 40) for line in lines}) == 1


def test_compare_shows_both_results_and_the_change():
    after = copy.deepcopy(RESULT)
    after["violations"]["micro"]["f1"] = 0.9
    after["general"] = {"perplexity": 11.5, "perplexity_per_byte": 1.8, "tokens": 8756}
    text = compare(RESULT, after)
    assert cells(text, "before") == ["before", "after", "change", "95% interval", "N"]
    # The change comes from the answers, which are the same in both results, not from the F1 changed above.
    f1 = ["violations F1 (micro)", "0.600", "0.900", "+0.0000", "+0.0000 to +0.0000", "3 violations in 2 reports"]
    assert cells(text, "violations F1") == f1
    assert cells(text, "general text: perplexity per token")[1:3] == ["-", "11.5"]


def test_one_answer_prefers_reports_with_violations():
    assert one_answer(RESULT) == "answer to example b (true violations: LCR_MIN):\nbreach"
    clean = {**RESULT, "answers": RESULT["answers"][:1]}
    assert one_answer(clean, 3) == "answer to example a (true violations: none):\nclean"
