"""The benchmark without other trainers: its examples, its arithmetic, and our own arm end to end."""

import itertools
import json
import math

import pytest

import scripts.bench.arms
from common.errors import UserError
from scripts.bench.arms import (
    ARMS,
    ArmRun,
    Benchmark,
    Setting,
    find_arm,
    read_run,
    summarize,
    table,
    write_examples,
)
from tests.in_memory import load_documents
from tests.processes import run_python
from tests.tiny import tiny_tokenizer, write_tiny_model


def run_of(rates: list[int], loss: float = 1.0, gib: float = 1.0) -> ArmRun:
    """Return a run whose steps take 1 s: a warm-up step of 9 tokens, then a step for each rate (tokens per second)."""
    steps = len(rates)
    return ArmRun([9.0] + [loss] * steps, [9, *rates], [1.0] * (1 + steps), memory_gib=gib, first_step_seconds=3.0)


def test_a_summary_has_medians_over_rounds() -> None:
    runs = [run_of([100, 140], 1.0, 1.0), run_of([90, 90], 2.0, 3.0), run_of([100, 100], 3.0, 2.0)]
    ours = summarize(runs, runs)
    assert isinstance(ours, dict)
    assert (ours["tokens_per_second"], ours["ours_is"], ours["spread"]) == (100.0, 1.0, pytest.approx((120 - 90) / 100))
    assert (ours["loss"], ours["memory_gib"], ours["first_step_seconds"]) == (2.0, 2.0, 3.0)
    slower = summarize([run_of([40, 60])], runs)
    assert isinstance(slower, dict) and slower["ours_is"] == 2.0 and slower["difference"] == 0.0
    far = summarize([run_of([40, 60], loss=0.9)], [run_of([40, 60], loss=0.8)])
    assert isinstance(far, dict) and far["difference"] == pytest.approx(0.1)  # 0.125 would be relative
    assert "TOO FAR" in table("parity", {"b": far}) and "TOO FAR" not in table("matched", {"b": far})
    assert summarize([*runs, ArmRun([], [], [], failed="exit code 3")], runs) == "failed: exit code 3"
    lines = table("matched", {"ours": ours, "b": slower, "c": "not here"}).splitlines()
    assert lines[1].split() == ["ours", "100", "30.0%", "1.00x", "2.00", "3.0", "s", "2.0000", "0.0e+00"]
    assert "2.00x" in lines[2] and lines[3].split(maxsplit=1) == ["c", "not here"]


def test_a_half_written_line_is_ignored(tmp_path) -> None:
    row = '{"step": 1, "train/loss": %s, "train/tokens": %s, "train/tokens_per_second": %s, "train/memory_gib": %s}\n'
    assert read_run(tmp_path, 2, 1).losses == []
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "start/total": 2.5}\n' + row % (3.0, 100, 50.0, 0.5) + row % (2.0, 300, 100.0, 0.7) + '{"train/lo'
    )
    read = read_run(tmp_path, 3, ranks=2)
    assert (read.losses, read.tokens, read.seconds) == ([3.0, 2.0], [100, 200], [2.0, 2.0])
    assert (read.memory_gib, read.first_step_seconds, read.tokens_per_second) == (1.4, 2.5, 100.0)
    # Steps that a fast arm did before it was killed do not count.
    assert read_run(tmp_path, 1, ranks=2).memory_gib == 1.0


def test_examples_have_the_lengths_of_the_setting(tmp_path) -> None:
    tokenizer, setting = tiny_tokenizer(), Setting(4, (100, 500), 2048, rows=8, micro_batch=4)
    for name in "ab":
        write_examples(tmp_path / name, tokenizer, 6, setting)
    for file in ("train.jsonl", "steps.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    steps = json.loads((tmp_path / "a" / "steps.json").read_text())
    assert sorted(i for step in steps for i in step) == list(range(24))
    assert all(step == sorted(step) and len(step) == 4 for step in steps)
    documents = load_documents((str(tmp_path / "a" / "train.jsonl"),), tokenizer, 2048, "error")
    lengths = documents.lengths.tolist()
    assert sorted(lengths) == [round(100 * 5 ** (i / 23)) for i in range(24)]  # evenly on a logarithmic scale
    ordered = sum(lengths[a] < lengths[b] for step in steps for a, b in itertools.pairwise(step))
    assert 3 < ordered < 15  # of 18 neighbours within a step: they are not sorted by length
    assert all(documents.get(i)[1].sum() == length - length // 2 for i, length in enumerate(lengths))


def test_rounds_alternate_and_failures_are_reported(tmp_path, monkeypatch, capsys) -> None:
    ran, path = [], write_tiny_model(tmp_path / "model")
    arms = tuple(find_arm(key) for key in ("ours", "ours-3", "trainer"))
    monkeypatch.setattr(
        scripts.bench.arms.importlib.util, "find_spec", lambda name: None if name == "accelerate" else 1
    )
    monkeypatch.setattr(scripts.bench.arms, "machine", lambda packages: "this machine")
    monkeypatch.setattr(scripts.bench.arms, "PARITY_STEPS", 3)
    second_loss, failed = 1.0, ""

    def run_arm(benchmark, arm, name: str, number: int) -> ArmRun:
        ran.append((name, number, arm.name))
        loss = second_loss if arm.ranks == 3 else 1.0
        return ArmRun([], [], [], failed=failed) if failed and arm.ranks == 3 else run_of([100, 100], loss)

    monkeypatch.setattr(scripts.bench.arms, "run_arm", run_arm)
    for second_loss, failed, good in ((1.0009, "", True), (1.0011, "", False), (1.0, "exit code 9", False)):
        ran.clear()
        report, passed = scripts.bench.arms.run_all(
            Benchmark(str(path), tmp_path, arms, ("parity", "matched"), rounds=2, steps=2)
        )
        assert passed == good, (second_loss, failed)
        names = ("ours", "ours, 3 ranks")
        assert ran == [("parity", 0, name) for name in names] + [("matched", i, name) for i in (0, 1) for name in names]
        assert report["matched"]["transformers.Trainer"] == "not installed: pip install -r requirements-bench.txt"
    printed = capsys.readouterr().out
    assert "round 2, matched, ours, 3 ranks: exit code 9" in printed and "failed: exit code 9" in printed
    assert "1.1e-03 TOO FAR\n" in printed and "9.0e-04\n" in printed and "\nmodel, this machine\n" in printed


def test_an_unknown_arm_is_one_sentence() -> None:
    assert find_arm("ours-16").ranks == 16 and find_arm("trl") is ARMS["trl"]
    for key in ("ours-1", "ours-x", "litgpt"):
        with pytest.raises(UserError, match=f"--arms: '{key}' is unknown; choose from ours, ours-2, "):
            find_arm(key)


@pytest.mark.slow
def test_our_arm_end_to_end(tmp_path) -> None:
    model, report = write_tiny_model(tmp_path / "model", vocab_size=300), tmp_path / "bench.json"
    options = ["--settings", "matched", "--arms", "ours", "--rounds", 1, "--steps", 2]
    done = run_python("scripts/bench.py", *options, "--work", tmp_path / "work", "--model", model, "--json", report)
    assert done.returncode == 0, done.stderr
    ours = json.loads(report.read_text())["matched"]["ours"]
    assert len(ours["runs"]) == 1 and len(ours["runs"][0]["losses"]) == 3 and ours["ours_is"] == 1.0
    keys = ("tokens_per_second", "memory_gib", "loss", "first_step_seconds")
    assert all(math.isfinite(ours[key]) and ours[key] > 0 for key in keys)
    assert not list((tmp_path / "work").rglob("export"))  # it was killed before it ended


@pytest.mark.slow
def test_mistakes_are_one_sentence(tmp_path) -> None:
    for options, sentence in (
        (("--model", tmp_path), "is not a model directory: it has no config.json"),
        (("--rounds", "0"), "--rounds must be 1 or more, not 0"),
    ):
        done = run_python("scripts/bench.py", *options)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and last.startswith("error: ") and sentence in last
