"""The benchmark without other trainers: arithmetic, watching of processes, and our own arm end to end."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.arms import ARMS
from bench.ladder import render as render_ladder
from bench.measure import Run, watch
from bench.table import has_enough_steps, parity_difference, render, run_result, summarize
from model.flops import Work, step_flops
from tests.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.beside


def _row(step, seconds, lengths, targets, loss=1.0, memory=0.5):
    return {
        "step": step,
        "seconds": seconds,
        "lengths": lengths,
        "targets": targets,
        "loss": loss,
        "memory_gib": memory,
    }


def test_result_excludes_warmup_and_counts_real_tokens():
    rows = [_row(1, 100.0, [10], 5, 9.0), _row(2, 2.0, [10, 30], 10, 8.0), _row(3, 4.0, [20], 5, 7.0)]
    run = Run(rows, first_step_seconds=3.0, peak_rss_gib=1.5)
    work = Work(per_token=6.0, per_target=60.0, per_pair=12.0, windows=((None, 2),))
    found = run_result(run, 1, lambda lengths, targets: step_flops(work, lengths, targets), on_cuda=False)
    assert found.tokens_per_second == pytest.approx(60 / 6)
    pairs = 10 * 11 / 2 + 30 * 31 / 2 + 20 * 21 / 2
    assert found.flops_per_second == pytest.approx((6 * 60 + 60 * 15 + 2 * 12 * pairs) / 6)
    assert (found.memory_gib, found.first_step_seconds, found.losses) == (1.5, 3.0, (9.0, 8.0, 7.0))
    assert run_result(run, 1, lambda *_: 0.0, on_cuda=True).memory_gib == 0.5


def test_summary_has_medians_spread_and_mfu():
    runs = [
        Run([_row(1, 1.0, [n], 1, loss), _row(2, 1.0, [n], 1, loss + 1)], first_step_seconds=s, peak_rss_gib=g)
        for n, loss, s, g in ((100, 1.0, 3.0, 1.0), (120, 2.0, 5.0, 3.0), (90, 3.0, 4.0, 2.0))
    ]
    results = [run_result(run, 0, lambda lengths, _: 7.0 * sum(lengths), on_cuda=False) for run in runs]
    found = summarize(results, peak=1400.0, loss_step=1)
    assert found.tokens_per_second == 100.0
    assert found.spread == pytest.approx((120 - 90) / 100)
    assert found.mfu == pytest.approx(0.5)
    assert (found.memory_gib, found.first_step_seconds, found.loss, found.loss_step) == (2.0, 4.0, 2.0, 1)
    assert summarize(results, peak=1400.0, loss_step=8).loss_step == 2  # the runs have only two steps


def test_has_enough_steps():
    rows = [_row(i, 4.0, [1], 1) for i in range(1, 5)]
    assert not has_enough_steps(rows[:3], warmup=2, steps=2, seconds=math.inf)
    assert has_enough_steps(rows, warmup=2, steps=2, seconds=math.inf)
    assert has_enough_steps(rows, warmup=2, steps=6, seconds=8.0)
    assert not has_enough_steps(rows, warmup=2, steps=6, seconds=8.1)
    assert has_enough_steps(rows[:3], warmup=2, steps=6, seconds=1.0)  # a single one is enough only if it is very long
    assert not has_enough_steps(rows[:3], warmup=2, steps=6, seconds=1.1)


def test_parity_difference_is_absolute_below_one_and_relative_above():
    assert parity_difference([4.0, 0.5], [4.004, 0.5005]) == pytest.approx(1e-3)
    assert parity_difference([0.5], [0.502]) == pytest.approx(2e-3)
    assert math.isnan(parity_difference([1.0, 2.0], [1.0]))


def test_render_compares_with_ours_and_shows_reasons():
    results = [run_result(Run([_row(1, 1.0, [n], 1)], 1.0, 1.0), 0, lambda *_: 1.0, False) for n in (100, 50)]
    ours, other = (summarize([result], 1.0, 1) for result in results)
    text = render("matched", {"ours": ours, "b": other, "c": "not here"}, "ours")
    assert "1.00x" in text.splitlines()[2] and "2.00x" in text.splitlines()[3]
    assert text.splitlines()[4].split(maxsplit=1) == ["c", "not here"]


PARENT = """
import json, subprocess, sys, time
memory = bytearray(200 * 2**20)
grown = "import time; memory = bytearray(200 * 2**20); print(flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", grown], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
with open(sys.argv[1], "w") as file:
    rows = [json.dumps({"step": step, "pid": child.pid}) for step in range(1, 6)]
    print(*rows, sep=chr(10), file=file, flush=True)
time.sleep(600)
"""


def test_process_tree_is_watched_and_killed(tmp_path):
    rows, log = tmp_path / "rows.jsonl", tmp_path / "log"
    command = [sys.executable, "-c", PARENT, str(rows)]
    run = watch(command, dict(os.environ), rows, json.loads, lambda found: len(found) >= 3, log, timeout=60)
    assert [row["step"] for row in run.rows] == [1, 2, 3] and not run.failed  # the other two rows are dropped
    assert 0.4 < run.peak_rss_gib < 2  # both processes
    assert 0 < run.first_step_seconds < 60
    ps = ["ps", "-o", "stat=", "-p", str(run.rows[0]["pid"])]
    states = {subprocess.run(ps, capture_output=True, text=True).stdout.strip()[:1] for _ in range(50)}
    assert states & {"", "Z"}  # gone, or a zombie that init has not reaped yet


def test_failed_arm_reports_its_exit_code(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit(3)"]
    run = watch(command, dict(os.environ), tmp_path / "rows", json.loads, bool, tmp_path / "log", timeout=60)
    assert run.failed.startswith("exit code 3, 0 steps")


def test_our_arm_end_to_end_and_a_trainer_that_is_not_installed(tmp_path):
    model = write_tiny_model(tmp_path / "model", vocab_size=300)
    report = tmp_path / "bench.json"
    arguments = (
        "--settings matched,skewed --arms ours,litgpt --rounds 1 --warmup 1 --steps 2 --lengths 100,500 "
        f"--skewed-lengths 40,400 --threads 1 --work {tmp_path / 'work'}"
    )
    # Hides LitGPT, whether it is installed or not.
    hide = "import sys, runpy; sys.modules['litgpt'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [
        sys.executable,
        "-c",
        hide,
        "scripts/bench.py",
        *arguments.split(),
        "--model",
        str(model),
        "--json",
        str(report),
    ]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    for setting in ("matched", "skewed"):
        found = json.loads(report.read_text())[setting]
        missing = "not installed: pip install -r requirements-bench.txt"
        assert found.get("LitGPT full") == (missing if setting == "matched" else None)  # it has no skewed
        ours = found["ours"]
        assert ours["loss_step"] == 3 and ours["rounds"] == 1 and len(ours["results"][0]["losses"]) == 3
        keys = ("tokens_per_second", "mfu", "memory_gib", "loss", "first_step_seconds")
        assert all(math.isfinite(ours[key]) and ours[key] > 0 for key in keys) and ours["mfu"] < 1
    assert "pip install -r requirements-bench.txt" in answer.stdout
    assert answer.stdout.startswith("matched: 1 runs of 3 steps, each run 24 examples of ")


def test_missing_model_is_reported_in_one_sentence(tmp_path):
    command = [sys.executable, "scripts/bench.py", "--model", str(tmp_path)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    last = answer.stderr.strip().splitlines()[-1]  # torchao may print warnings before it
    assert answer.returncode == 2 and last.startswith("error: ") and "fetch_base_model.py" in last


def test_ladder_rungs_compute_the_same_loss(tmp_path):
    lines = {}
    for key in ("eager", "checkpointing"):
        out = tmp_path / f"{key}.json"
        code = (
            "import dataclasses, json, sys; from bench import ladder;"
            "rung = dataclasses.replace(ladder.RUNGS[sys.argv[1]], compiled=False);"
            "open(sys.argv[2], 'w').write(json.dumps(ladder.run_rung(rung)))"
        )
        subprocess.run([sys.executable, "-c", code, key, str(out)], cwd=ROOT, check=True, timeout=300)
        lines[key] = json.loads(out.read_text())
    assert lines["eager"]["loss"] == pytest.approx(lines["checkpointing"]["loss"], rel=2e-3)
    assert abs(lines["eager"]["loss"] - math.log(512)) < 0.1  # random weights predict almost uniformly
    text = render_ladder([lines["eager"], {"name": "x", "failed": "no such thing"}], peak=1e12)
    assert "1.00x" in text and "no such thing" in text


def test_arm_names_are_unique():
    assert len({arm.key for arm in ARMS}) == len({arm.name for arm in ARMS}) == len(ARMS)
