"""The experiments as a whole on a tiny model: every list runs to its end and is not run again, and the report comes out.

A training of seed 0 and the first command of each kind run for real, so that the scripts have accepted every option; the others leave a
copy of the file that one of their kind has left.
"""

import json
import shutil
from pathlib import Path

import pytest

from experiment import commands, drawn, knowledge, pareto, settle
from experiment.commands import keep, left_of, restore, run_commands
from tests.forked_jobs import Ended, start_forked
from tests.tiny import write_chat_file, write_tiny_model

pytestmark = pytest.mark.slow
ANSWERS = (
    "Violations:\nLCR_MIN | LCR | 75.2% | min 100% | CRR Art. 412(1)\nDirective:\nThe bank shall restore its LCR.",
    "Violations:\nnone\nDirective:\nNo measures.",
)


class Machine:
    """Runs what is new, and copies the rest."""

    def __init__(self, monkeypatch) -> None:
        self.real, self.names, self.done = [], [], {}
        monkeypatch.setattr(commands, "start", self.start)

    def run(self, experiment, kept: Path | None = None) -> None:
        self.listed = experiment.commands
        on_change = (lambda: keep(experiment.commands(), experiment.out(), kept)) if kept else lambda: None
        run_commands(experiment.commands, experiment.out(), on_change=on_change)
        assert not left_of(experiment.commands())

    def start(self, script, options, log, processes, slot, parallel) -> Ended:
        command = next(one for one in self.listed() if (one.script, one.options) == (script, options))
        self.names.append(command.name)
        if command.kind not in self.done or (script == "train.py" and command.name.endswith("-s0/train")):
            self.real.append(command.name)
            self.done.setdefault(command.kind, command.output)
            return start_forked(script, options, log)
        before, after = self.done[command.kind], command.output
        after.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(before, after)
        if script == "train.py":
            shutil.copy(before.parents[1] / "metrics.jsonl", after.parents[1])
        return Ended(0)


def patch(monkeypatch, module, **values) -> None:
    for name, value in values.items():
        monkeypatch.setattr(module, name, value)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def report_of(experiment) -> list[list[str]]:
    text, values = experiment.report()
    json.dumps(values)
    assert (experiment.out() / f"{experiment.__name__.rpartition('.')[2]}.png").stat().st_size > 5_000
    return [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def elsewhere_the_same(tmp_path, monkeypatch, module, experiment) -> None:
    """With what was kept of a finished experiment alone, nothing is left on another machine, and the report is the same."""
    text, _ = experiment.report()
    assert not [
        path for path in (tmp_path / "kept").rglob("*") if "export" in path.parts[:-1] and path.name != "export.json"
    ]
    patch(monkeypatch, module, OUT=tmp_path / "elsewhere")
    restore(tmp_path / "kept", tmp_path / "elsewhere")
    assert not left_of(experiment.commands()) and experiment.report()[0] == text


def test_settle_and_pareto_share_their_runs_and_report(tmp_path, monkeypatch) -> None:
    out, model = tmp_path / "drawn", write_tiny_model(tmp_path / "model")
    settings = ("model.compute_dtype=fp32", f"data.cache={tmp_path / 'tokens'}", "batch.global_examples=4")
    patch(monkeypatch, drawn, OUT=out, BASE=str(model), SETTINGS=settings, DRAWN=8, TUNING_SEEDS=(100,), EXTENSIONS=0)
    patch(monkeypatch, drawn, RATES={"full": (1e-2,), "lora8": (1e-2,)})
    patch(monkeypatch, settle, SEEDS={"full": 3, "lora8": 3}, SHARED=2)
    patch(monkeypatch, pareto, SEEDS=2, ALPHAS=("1", "0.75"), PILOTS={"anchored self-replay": (1.0, 4.0)})
    patch(monkeypatch, pareto, ARMS=("plain", "low rate", "anchored self-replay"))
    for split, count in (("train", 12), ("validation", 2), ("test", 4)):
        rows = [
            {
                "id": f"{split}-{i}",
                "messages": [
                    {"role": "user", "content": f"LCR {i}% of the bank"},
                    {"role": "assistant", "content": ANSWERS[i % 2]},
                ],
            }
            for i in range(count)
        ]
        write_lines(out / "pool" / f"{split}.jsonl", rows)
    (out / "pool" / "dataset.json").write_text("{}")
    for path in pareto.texts():
        path.parent.mkdir(exist_ok=True)
        write_chat_file(path, 12)

    machine = Machine(monkeypatch)
    machine.run(settle)
    rows = report_of(settle)
    assert ["full", "0.01", "0.000", "chosen, at the edge of the grid"] in rows
    assert [row[:2] for row in rows if row[0] in ("full", "lora8")][-2:] == [["full", "3"], ["lora8", "3"]]
    assert rows[-1][0] == "F1: full less lora8, Welch"
    kept = [path.parent.name for path in out.glob("*/checkpoints")]
    assert kept == [f"full-lr0.01-s{seed}" for seed in range(1)]  # the others are copies, or nobody needs them

    before = len(machine.names)
    machine.run(pareto, tmp_path / "kept")
    assert "full-lr0.01-s0/train" not in machine.names[before:]
    assert "plain-s0/a0.75" in machine.real and not list(out.glob("*/checkpoints"))
    rows = report_of(pareto)
    assert [row[0] for row in rows if row[-1] == "chosen"] == ["anchored self-replay"]
    assert [row[1] for row in rows if "alpha" in row[0] and "less" not in row[0]] == ["2"] * 6
    assert [row[0].partition(",")[0] for row in rows[-3:]] == [
        "F1: anchored self-replay",
        "F1: low rate",
        "KL: low rate",
    ]
    before = len(machine.names)
    machine.run(settle)
    machine.run(pareto)
    assert len(machine.names) == before
    elsewhere_the_same(tmp_path, monkeypatch, drawn, pareto)


def test_knowledge_measures_bits_and_recall_of_every_arm(tmp_path, monkeypatch) -> None:
    model, form = write_tiny_model(tmp_path / "model"), "C {0}.00 Form {0}\nRows:\n"
    settings = ("model.compute_dtype=fp32", f"data.cache={tmp_path / 'tokens'}", "data.sequence_length=256")
    patch(monkeypatch, knowledge, OUT=tmp_path / "knowledge", BASE=str(model), SETTINGS=settings, EXTENSIONS=0)
    patch(monkeypatch, knowledge, TOKENS=4000, STEP=300, EVERY=1, ROWS=10, COPIES=3, HELD_OUT=3)
    patch(monkeypatch, knowledge, ARMS={name: knowledge.ARMS[name] for name in ("full", "rank 1, q and v")})
    patch(monkeypatch, knowledge, RATES={"full": (1e-3, 1e-2), "rank 1, q and v": (1e-3,)})
    for split, numbers in (("train", range(10, 40)), ("validation", range(40, 44)), ("test", range(44, 48))):
        rows = [
            {
                "text": form.format(number)
                + "".join(f"  r00{row}0 Item {row * number} | c0010\n" for row in range(1, 6)),
                "kind": "table",
                "tables": [],
                "source": "the test",
            }
            for number in numbers
        ]
        write_lines(tmp_path / "knowledge" / "cpt" / f"{split}.jsonl", rows)
    (tmp_path / "knowledge" / "cpt" / "dataset.json").write_text("{}")

    machine = Machine(monkeypatch)
    machine.run(knowledge)
    drawn_lines = [json.loads(line)["text"] for line in knowledge.draw(1).read_text().splitlines()]
    (title, asked), *_ = knowledge.forms()
    for code, label in asked:
        assert sum(text.startswith(title) and f"{code} {label}" in text for text in drawn_lines) >= 3
    assert len(knowledge.file_of("recall").read_text().splitlines()) == 10 * 4
    found = knowledge.values()
    assert {len(of_seeds) for arms in found.values() for of_seeds in arms.values()} == {3}
    assert set(found["recall"]) == {"full", "rank 1, q and v", "full, new tokens"}
    first, last = (found[f"bits per byte, {share}"]["full"][0] for share in ("10%", "100%"))
    assert last < first
    scores = json.loads(knowledge.scores_of("base", "test").read_text())
    bits = scores["loss"]["mean"] * knowledge.tokens_per_byte("base") / 0.6931
    assert bits == pytest.approx(
        knowledge.curve_of(knowledge.run_of("full", 0))[0] * bits / scores["loss"]["mean"], rel=5e-3
    )
    rows = report_of(knowledge)
    assert [row[8] for row in rows[-3:]] == ["not run", "not run", rows[-1][8]] and rows[-1][8] != "not run"
    before = len(machine.names)
    machine.run(knowledge, tmp_path / "kept")
    assert len(machine.names) == before
    elsewhere_the_same(tmp_path, monkeypatch, knowledge, knowledge)
