"""scripts/compare.py on stored results of six runs: all outputs, and mistakes in one sentence."""

import json
import re

from common.durable_files import write_json_lines
from tests.comparisons import answer_text, example, general, row, task, write_run
from tests.processes import run_python

RULES = [["LCR_MIN"], ["LR_MIN"], ["LCR_MIN", "LR_MIN"], []]


def answers(right):
    """Return answers to two reports of each of twelve banks, which are right for the first `right` reports."""
    said = [RULES[i % 4] if i < right else [] for i in range(24)]
    more = [{"rouge": 0.9, "text": answer_text(rules), "id": f"report {i}"} for i, rules in enumerate(said)]
    return [row(RULES[i % 4], said[i], f"bank {i // 2}", **more[i]) for i in range(24)]


def test_stored_results_are_compared(tmp_path):
    data, train = tmp_path / "test.jsonl", tmp_path / "train.jsonl"
    examples = [example(f"report {i}", f"bank {i // 2}", RULES[i % 4], f"LCR {60 + i}% of bank {i}") for i in range(24)]
    for path in (data, train):
        write_json_lines(path, examples)
    runs = {}
    rights = {"a-1": 8, "a-2": 9, "a-3": 9, "b-1": 24, "b-2": 22, "b-3": 24}
    for name, right in rights.items():
        rise, tokens = (0.05, 1000) if name[0] == "a" else (0.3, 2000)
        runs[name] = write_run(tmp_path / name, task(answers(right), task="xbrl.task"), general(rise), data, tokens)
    seeds = {arm: ",".join(str(path) for name, path in runs.items() if name[0] == arm) for arm in "ab"}
    arms = [f"lora={seeds['a']}", f"full={seeds['b']}"]
    files = ["--data", data, "--train", train, "--task", "xbrl.task", "--out", tmp_path / "out"]
    tested = ["--primary", "full", "lora", "f1", "--margin", "f1=0.05", "--metric", "xbrl.task"]
    done = run_python("scripts/compare.py", *arms, *files, *tested, "--worst", 3)
    assert done.returncode == 0, done.stderr
    assert "full is better than lora in F1: F1 0.986 less 0.531 is +0.455 (95% interval +" in done.stdout
    assert "general perplexity/byte: full 3." in done.stdout and " less lora " in done.stdout
    assert "\nexample report " in done.stdout and "\nreference:\n    Violations:" in done.stdout
    assert "warning: The arms were not trained on equal numbers of tokens: lora 1,000, full 2,000" in done.stdout

    out = tmp_path / "out"
    result = json.loads((out / "comparison.json").read_text())
    assert (result["examples"], result["clusters"], result["reference"]) == (24, 12, "lora")
    kinds = [row["kind"] for row in result["rows"]]
    assert kinds[:3] == ["arm", "arm", "base"] and kinds.count("baseline") == 6
    assert [row["name"] for row in result["rows"] if "per_label" in row] == ["lora", "full", "rule engine"]
    assert len(result["disagreements"]) == 3 and result["disagreements"][0]["question"].startswith("LCR ")
    for name in ("forgetting", "losses"):
        assert (out / f"{name}.png").stat().st_size > 5_000
    assert (out / "comparison.html").read_text().count("<img") == 2
    assert re.search(r"\| full \(3 seeds\) \|.* 0\.986 \(", (out / "comparison.md").read_text())
    assert result["primary"][0]["p_margin_holm"] > 0.9
    data.write_text(data.read_text() + "\n")
    refused = run_python("scripts/compare.py", *arms, *files)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert refused.stderr.startswith("error: ") and "was measured on other data" in refused.stderr
