"""The work of the benchmark's settings: examples, order of the runs, estimate, and what the tables say about it."""

import dataclasses
import itertools
import json
from pathlib import Path

from bench import runner
from bench.arms import ARMS
from bench.estimate import RELATIVE_TIME, START_SECONDS, describe_work
from bench.measure import Run
from bench.report import describe_table, render_parity, render_setting
from bench.runner import Benchmark, plan_jobs, run_all
from bench.workload import Shape, Workload, make_workload
from data.examples import load_documents
from model.flops import Work
from tests.tiny import tiny_tokenizer

SHAPE = Shape(examples=4, lengths=(100, 500), sequence_length=500, rows=8, micro_batch=4)


def test_workload_is_deterministic_and_masked_and_follows_our_batch_plan(tmp_path):
    tokenizer = tiny_tokenizer()
    first = make_workload(tmp_path / "a", tokenizer, 3, SHAPE)
    again = make_workload(tmp_path / "b", tokenizer, 3, SHAPE)
    assert (
        first.jsonl.read_bytes() == again.jsonl.read_bytes() and first.tokens.read_bytes() == again.tokens.read_bytes()
    )
    assert sorted(i for step in first.steps for i in step) == list(range(12)) and first.steps == again.steps
    assert all(100 <= n <= 500 for n in first.lengths) and len(set(first.lengths)) > 6
    content = json.loads(first.tokens.read_text())
    documents = load_documents((str(first.jsonl),), tokenizer, 500, "error")
    for example, ids, flags in zip(content["examples"], documents.ids, documents.weights, strict=True):
        assert example["input_ids"] == ids.tolist()
        assert [label != -100 for label in example["labels"]] == flags.tolist()
        assert 0.2 < flags.mean() < 0.8  # the answer is a target, the question is not
        assert all(label in (-100, token) for label, token in zip(example["labels"], ids, strict=True))


def test_skewed_lengths_are_log_uniform_and_mixed_within_each_step(tmp_path):
    shape = dataclasses.replace(SHAPE, examples=8, lengths=(40, 4000), sequence_length=4096, skewed=True)
    found = make_workload(tmp_path, tiny_tokenizer(), 8, shape)
    lengths = sorted(found.lengths)
    for i, length in enumerate(lengths):  # one of each of 64 equal parts of the logarithmic scale, less at most a word
        assert 40 * 100 ** (i / 64) - 20 <= length <= round(40 * 100 ** ((i + 1) / 64))
    assert lengths[-1] / lengths[0] > 80
    assert [sorted(step) for step in found.steps] == [list(step) for step in found.steps]  # the order of the file ...
    ordered = sum(found.lengths[a] < found.lengths[b] for step in found.steps for a, b in itertools.pairwise(step))
    assert 14 < ordered < 42  # ... which is not sorted by length: 28 of 56 pairs are expected to ascend
    assert all(0 < targets < length for targets, length in zip(found.targets, found.lengths, strict=True))


def _benchmark(**values):
    defaults = {
        "model": "m", "device": "cpu", "dtype": "bf16", "directory": Path("d"), "environment": {"OMP_NUM_THREADS": "2"},
        "arms": ARMS, "settings": ("parity", "matched"), "rounds": 2, "warmup": 1, "steps": 2, "parity_steps": 5,
        "seconds": 15.0, "patience": 240.0, "timeout": 600.0, "flops": Work(6.0, 0.0, 0.0, ()),
    }  # fmt: skip
    return Benchmark(**(defaults | values))


def test_jobs_are_parity_once_and_then_rounds_without_arms_that_are_unavailable():
    arms = tuple(arm for arm in ARMS if arm.key in ("ours", "litgpt", "litgpt-completed"))
    benchmark = _benchmark(arms=arms, settings=("parity", "matched", "defaults"))
    missing = {arm.name: "" for arm in arms} | {"LitGPT full": "not here"}
    jobs = [(setting, number, arm.key) for setting, number, arm in plan_jobs(benchmark, missing)]
    assert jobs == [
        ("parity", 0, "ours"), ("parity", 0, "litgpt-completed"),
        ("matched", 0, "ours"), ("defaults", 0, "ours"), ("matched", 1, "ours"), ("defaults", 1, "ours"),
    ]  # fmt: skip


def test_work_is_described_with_its_tokens_and_time():
    shape = dataclasses.replace(SHAPE, examples=2)
    workload = Workload(Path("a"), Path("b"), (10, 30, 20, 40, 50, 60), (1,) * 6, ((0, 1), (2, 3), (4, 5)), shape)
    arms = tuple(arm for arm in ARMS if arm.key in ("ours", "trainer"))
    benchmark = _benchmark(arms=arms, settings=("matched",), steps=1, patience=1e6, flops=Work(1e12, 0.0, 0.0, ()))
    jobs = plan_jobs(benchmark, {arm.name: "" for arm in arms})
    text = describe_work(benchmark, jobs, {"matched": workload}, peak=1e12)
    seconds = 2 * (2 * START_SECONDS + 100 * (1 + RELATIVE_TIME["trainer"]) * (1.5 + 1.6))
    assert text.splitlines() == [
        "matched: 4 runs of 2 steps, each run 4 examples of 10 to 40 tokens, 100 together",
        f"about {seconds / 60:.0f} min at the measured peak of 1.00 TFLOP/s",
    ]
    impatient = dataclasses.replace(benchmark, patience=400.0)  # the trainer is expected to run once
    once = describe_work(impatient, jobs, {"matched": workload}, peak=1e12).splitlines()[1]
    less = seconds - START_SECONDS - 100 * RELATIVE_TIME["trainer"] * 3.1
    assert once == f"about {less / 60:.0f} min at the measured peak of 1.00 TFLOP/s"


def test_an_arm_that_exceeds_the_patience_is_not_run_again(tmp_path, monkeypatch):
    arms, ran = tuple(arm for arm in ARMS if arm.key in ("ours", "ours-2")), []
    times = iter([0.0, 5.0, 0.0, 1.0, 0.0, 1.0])  # start and end of each run: only the first exceeds the patience
    monkeypatch.setattr(runner, "run_arm", lambda b, arm, setting, w, number: ran.append((arm.key, number)) or Run())
    monkeypatch.setattr(runner, "measure_peak", lambda benchmark: 2.0)
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(times))
    benchmark = _benchmark(arms=arms, settings=("matched",), directory=tmp_path, patience=4.0)
    missing = {arm.name: "" for arm in arms}
    found = run_all(benchmark, plan_jobs(benchmark, missing), {"matched": None}, missing, peak=1.0)
    assert ran == [("ours", 0), ("ours-2", 0), ("ours-2", 1)]
    assert {name: len(runs) for name, runs in found.runs["matched"].items()} == {"ours": 1, "ours, 2 ranks": 2}
    assert found.peaks == [1.0, 2.0, 2.0]


def test_every_table_names_processor_dtype_and_the_versions_of_its_arms():
    shape = dataclasses.replace(SHAPE, examples=2)
    workload = Workload(Path("a"), Path("b"), (10, 30), (1, 1), ((0, 1),), shape)
    machine = {
        "processor": "P with AVX2", "threads": 2, "model": "M", "rounds": 2,
        "versions": {"torch": "2.1", "transformers": "5.2", "trl": "1.1", "litgpt": "0.5", "ai2-olmo-core": "3.0"},
    }  # fmt: skip
    arms = tuple(arm for arm in ARMS if arm.key in ("ours", "litgpt", "olmo-core"))
    text = describe_table(_benchmark(arms=arms), "matched", machine, workload)
    assert text.splitlines() == [
        "P with AVX2, 2 threads; M, bf16 products over fp32 weights",
        "2 examples per step, 10 to 30 tokens each; rounds: 2",
        "torch 2.1, transformers 5.2, litgpt 0.5, ai2-olmo-core 3.0",
    ]
    assert describe_table(_benchmark(arms=arms), "parity", machine, workload).splitlines()[0].endswith("; M, fp32")
    assert "olmo" not in describe_table(_benchmark(arms=arms), "defaults", machine, workload)  # it has no defaults
    measured = render_setting("matched", {"ours": "not here"}, text, "bf16", [1e12, 3e12, 2e12])
    assert measured.splitlines()[-4:] == [
        *text.splitlines(),
        "peak in bf16 3.00 TFLOP/s, the largest of 1.00, 3.00, 2.00",
    ]
    assert render_parity(_benchmark(arms=arms), [], text).splitlines()[-3:] == text.splitlines()
