"""scripts/compare.py on stored results of three runs: all outputs, and mistakes in one sentence."""

import json

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.comparisons import answer_text, example, general, row, task, write_run
from tests.processes import run_python

RULES = [["LCR_MIN"], ["LR_MIN"], ["LCR_MIN", "LR_MIN"], []]


def answers(right):
    """Two reports of each of twelve banks; the answers to the first `right` reports are right."""
    found = []
    for i in range(24):
        true = RULES[i % 4]
        said = true if i < right else []
        found.append(row(true, said, f"bank {i // 2}", rouge=0.9, text=answer_text(said), id=f"report {i}"))
    return found


def test_stored_results_are_compared(tmp_path):
    data, train = tmp_path / "test.jsonl", tmp_path / "train.jsonl"
    examples = [example(f"report {i}", f"bank {i // 2}", RULES[i % 4], f"LCR {60 + i}% of bank {i}") for i in range(24)]
    for path in (data, train):
        path.write_text("".join(json.dumps(one) + "\n" for one in examples))
    runs = {}
    for name, right, rise in (("a", 8, 0.05), ("b-1", 24, 0.3), ("b-2", 22, 0.28)):
        runs[name] = write_run(
            tmp_path / name, task(answers(right)), general(rise), data, 1000 if name == "a" else 2000
        )
    arms = [f"lora={runs['a']}", f"full={runs['b-1']},{runs['b-2']}"]
    files = ["--data", data, "--train", train, "--out", tmp_path / "out"]
    done = run_python("scripts/compare.py", *arms, *files, "--worst", 3)
    assert done.returncode == 0, done.stderr
    assert "full finds violations better than lora: F1 0.979 against 0.500" in done.stdout
    assert "full predicts general text worse than lora" in done.stdout
    assert "warning: The arms were not trained on equal numbers of tokens: lora 1,000, full 2,000" in done.stdout

    out = tmp_path / "out"
    result = json.loads((out / "comparison.json").read_text())
    assert (result["examples"], result["clusters"], result["reference"]) == (24, 12, "lora")
    kinds = [row["kind"] for row in result["rows"]]
    assert kinds[:3] == ["arm", "arm", "base"] and kinds.count("engine") == 1 and kinds.count("baseline") == 5
    assert len(result["disagreements"]) == 3 and result["disagreements"][0]["report"].startswith("LCR ")
    for name in ("forgetting", "rules", "losses", "confusion"):
        assert (out / f"{name}.png").stat().st_size > 5_000
    assert (out / "comparison.html").read_text().count("<img") == 4
    assert "| full (2 seeds) | 0.979" in (out / "comparison.md").read_text()
    events = EventAccumulator(str(out / "tensorboard" / "01-full"))
    events.Reload()
    f1 = next(row for row in result["rows"] if row["name"] == "full")["metrics"]["f1"]["value"]
    assert abs(events.Scalars("compare/f1")[0].value - f1) < 1e-6
    images = EventAccumulator(str(out / "tensorboard" / "figures"))
    images.Reload()
    assert sorted(images.Tags()["images"]) == ["confusion", "forgetting", "losses", "rules"]

    data.write_text(data.read_text() + "\n")
    refused = run_python("scripts/compare.py", *arms, *files)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert refused.stderr.startswith("error: ") and "was measured on other data" in refused.stderr
