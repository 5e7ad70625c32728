"""The benchmark without other trainers: its examples, its arithmetic, the processes it watches, and our own arm end to end."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest

import tools.bench
from data.examples import load_documents
from model.flops import Work
from tests.processes import run_python
from tests.tiny import tiny_tokenizer, write_tiny_model
from tools.bench import (
    ARMS,
    Benchmark,
    Run,
    Shape,
    Workload,
    make_workload,
    parity_difference,
    render,
    summarize,
    watch,
)

SHAPE = Shape(examples=4, lengths=(100, 500), sequence_length=500, rows=8, micro_batch=4)


def benchmark(**values) -> Benchmark:
    usual = {"model": "m", "device": "cpu", "dtype": "bf16", "directory": Path("d"), "threads": 1, "arms": ARMS}
    usual |= {"settings": ("parity", "matched"), "rounds": 2, "warmup": 1, "steps": 2, "parity_steps": 5}
    return Benchmark(**(usual | {"seconds": 60.0, "timeout": 60.0} | values))


def run_of(rates: list[float], loss: float = 1.0, gib: float = 1.0) -> Run:
    """A step of 1 s and 9 tokens as warm-up, and then one per rate, in tokens of a second."""
    rows = [{"step": 1, "loss": 9.0, "seconds": 1.0, "lengths": [9], "targets": 1, "memory_gib": 0.5}]
    rows += [rows[0] | {"step": 2 + i, "loss": loss, "lengths": [n], "targets": 0} for i, n in enumerate(rates)]
    return Run(rows, first_step_seconds=3.0, peak_rss_gib=gib)


def test_a_summary_has_medians_over_rounds_without_warm_up() -> None:
    work = Work(per_token=7.0, per_target=0.0, per_pair=0.0, windows=())
    runs = [run_of([100, 140], 1.0, 1.0), run_of([90, 90], 2.0, 3.0), run_of([100, 100], 3.0, 2.0)]
    found = summarize(benchmark(), runs, work, peak=1400.0)
    assert (found["tokens_per_second"], found["mfu"]) == (100.0, pytest.approx(0.5))
    assert found["spread"] == pytest.approx((120 - 90) / 100)
    assert (found["loss"], found["loss_step"], found["memory_gib"], found["first_step_seconds"]) == (2.0, 3, 2.0, 3.0)
    assert summarize(benchmark(device="cuda"), runs, work, 1.0)["memory_gib"] == 0.5
    assert summarize(benchmark(), [*runs, Run(failed="exit code 3")], work, 1.0) == "failed: exit code 3"
    table = render("matched", {"ours": found, "b": found | {"tokens_per_second": 50.0}, "c": "not here"}).splitlines()
    assert "1.00x" in table[2] and "2.00x" in table[3] and table[4].split(maxsplit=1) == ["c", "not here"]


def test_parity_difference_is_absolute_below_one_and_relative_above() -> None:
    assert parity_difference([4.0, 0.5], [4.004, 0.5005]) == pytest.approx(1e-3)
    assert parity_difference([0.5], [0.502]) == pytest.approx(2e-3)
    assert math.isnan(parity_difference([1.0, 2.0], [1.0]))


@pytest.mark.parametrize("skewed", [False, True])
def test_the_examples_have_the_asked_lengths_and_the_targets_and_steps_of_our_data(tmp_path, skewed) -> None:
    tokenizer, shape = tiny_tokenizer(), Shape(4, (100, 2000 if skewed else 500), 2048, 8, 4, skewed)
    first, again = (make_workload(tmp_path / name, tokenizer, 6, shape) for name in "ab")
    assert (
        first.jsonl.read_bytes() == again.jsonl.read_bytes() and first.tokens.read_bytes() == again.tokens.read_bytes()
    )
    assert sorted(i for step in first.steps for i in step) == list(range(24)) and first.steps == again.steps
    low, high = shape.lengths
    for i, length in enumerate(
        sorted(first.lengths)
    ):  # one of each of 24 equal parts of the scale, less at most two words
        edges = [low * (high / low) ** (k / 24) if skewed else low + (high - low) * k / 24 for k in (i, i + 1)]
        assert edges[0] - 40 <= length <= round(edges[1])
    ordered = sum(first.lengths[a] < first.lengths[b] for step in first.steps for a, b in itertools.pairwise(step))
    assert 3 < ordered < 15  # of 18 neighbours within a step: the order is not that of the lengths
    content = json.loads(first.tokens.read_text())
    documents = load_documents((str(first.jsonl),), tokenizer, 2048, "error")
    for example, ids, flags in zip(content["examples"], documents.ids, documents.weights, strict=True):
        assert example["input_ids"] == ids.tolist() and 0.2 < flags.mean() < 0.8
        assert example["labels"] == [token if flag else -100 for token, flag in zip(ids.tolist(), flags, strict=True)]


PARENT = """
import json, subprocess, sys, time
memory = bytearray(200 * 2**20)
grown = "import time; memory = bytearray(200 * 2**20); print(flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", grown], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
with open(sys.argv[1], "w") as file:
    print(*(json.dumps({"step": step, "pid": child.pid}) for step in range(1, 6)), sep=chr(10), file=file, flush=True)
time.sleep(600)
"""


def test_all_processes_of_a_run_are_measured_and_killed(tmp_path) -> None:
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", PARENT, str(rows)]
    run = watch(command, tmp_path / "log", 1, rows, json.loads, lambda found: len(found) >= 3, timeout=60)
    assert [row["step"] for row in run.rows] == [1, 2, 3] and not run.failed  # the other two rows are dropped
    assert 0.4 < run.peak_rss_gib < 2  # both processes
    with pytest.raises(OSError):  # gone, or a zombie that init has not reaped yet
        if Path(f"/proc/{run.rows[0]['pid']}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            raise ProcessLookupError
    failed = watch(
        [sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", 1, tmp_path / "x", json.loads, bool, 60
    )
    assert failed.failed.startswith("exit code 3, 0 steps")


def test_rounds_alternate_and_a_run_that_fails_is_a_line_and_an_exit_code(tmp_path, monkeypatch, capsys) -> None:
    ran, path = [], write_tiny_model(tmp_path / "model")
    arms = tuple(arm for arm in ARMS if arm.key in ("ours", "ours-2", "trainer"))
    monkeypatch.setattr(tools.bench, "measured_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(tools.bench.importlib.util, "find_spec", lambda name: None if name == "accelerate" else 1)
    monkeypatch.setattr(tools.bench, "versions", lambda packages: {"torch": "2.1"})

    def run_arm(benchmark, arm, setting, workload: Workload, number: int) -> Run:
        ran.append((setting, number, arm.key))
        loss = 1.1 if arm.key == "ours-2" and benchmark.steps == 1 else 1.0
        return (
            Run(failed="exit code 9")
            if benchmark.rounds == 3
            else run_of([100] * (benchmark.num_steps(setting) - 1), loss)
        )

    monkeypatch.setattr(tools.bench, "run_arm", run_arm)
    shapes = {"parity": SHAPE, "matched": SHAPE}
    for changed, good in (({}, True), ({"steps": 1}, False), ({"rounds": 3}, False)):
        ran.clear()
        report, passed = tools.bench.run_all(
            benchmark(model=str(path), directory=tmp_path, arms=arms, **changed), shapes
        )
        assert passed == good, changed
        rounds = range(changed.get("rounds", 2))
        assert ran[:2] == [("parity", 0, "ours"), ("parity", 0, "ours-2")]
        assert ran[2:] == [("matched", number, key) for number in rounds for key in ("ours", "ours-2")]
        assert report["matched"]["transformers.Trainer"] == "not installed: pip install -r requirements-bench.txt"
    printed = capsys.readouterr().out
    assert "ours, 2 ranks                        1.0e-01  DIFFERS" in printed and "failed: exit code 9" in printed
    assert "matched: 4 runs of 3 steps, " in printed and "4 examples per step, " in printed and "\ntorch 2.1" in printed


@pytest.mark.slow
def test_our_arm_end_to_end(tmp_path) -> None:
    model, report = write_tiny_model(tmp_path / "model", vocab_size=300), tmp_path / "bench.json"
    options = ["--settings", "skewed", "--arms", "ours", "--rounds", 1, "--warmup", 1, "--steps", 2, "--threads", 1]
    options += ["--skewed-lengths", "40,400", "--work", tmp_path / "work", "--model", model, "--json", report]
    done = run_python("scripts/bench.py", *options)
    assert done.returncode == 0, done.stderr
    ours = json.loads(report.read_text())["skewed"]["ours"]
    assert ours["loss_step"] == 3 and len(ours["runs"]) == 1
    keys = ("tokens_per_second", "mfu", "memory_gib", "loss", "first_step_seconds")
    assert all(math.isfinite(ours[key]) and ours[key] > 0 for key in keys) and ours["mfu"] < 1
    assert done.stdout.startswith("skewed: 1 runs of 3 steps, ")


@pytest.mark.slow
def test_mistakes_are_one_sentence(tmp_path) -> None:
    for options, sentence in (
        (("--model", tmp_path), "fetch_base_model.py"),
        (("--rounds", "0"), "--rounds must be 1 or more, not 0"),
    ):
        done = run_python("scripts/bench.py", *options)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2 and last.startswith("error: ") and sentence in last
