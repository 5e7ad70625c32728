"""The GPU proof without a GPU: what it keeps, what it prints, and that its comparisons can fail."""

import json
import sys
from pathlib import Path

import pytest
import torch

import bench.gpu_planner
import bench.gpu_proof
import model.packed_attention
from bench.gpu_planner import planner_rows
from bench.gpu_proof import markdown, read_report, run_part
from bench.gpu_steps import PARTS, Step, make_steps, read_json, read_tests
from common.errors import UserError
from planner.cluster import cluster_of
from tests.gpu.parity import compare
from tests.gpu.resume import last_step
from tests.tiny import write_tiny_model

MACHINE = {"rehearsal": True, "card": "CPU", "gpus": 0, "torch": "2.13.0"}


def test_without_a_gpu_it_says_so(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_proof"])
    with pytest.raises(UserError, match="there is no GPU that torch can use here"):
        bench.gpu_proof.main()


def test_finished_steps_are_kept_and_failed_ones_are_done_again(tmp_path, capsys) -> None:
    """Two programs: one always works, one works from its second run on. Each leaves a mark for each of its runs."""
    good, shaky = (
        f"""
import json, pathlib, sys
marks = pathlib.Path({str(tmp_path)!r}, {name!r}); marks.write_text((marks.read_text() if marks.exists() else "") + "x")
if {name!r} == "shaky" and len(marks.read_text()) < 2: sys.exit("it broke")
pathlib.Path(sys.argv[1]).write_text(json.dumps({{"ok": True, "text": "fine"}}))
"""
        for name in ("good", "shaky")
    )
    steps = [
        Step(
            2,
            name,
            (sys.executable, "-c", program, str(tmp_path / f"{name}.json")),
            tmp_path / f"{name}.json",
            read_json,
        )
        for name, program in (("good", good), ("shaky", shaky))
    ]
    out = tmp_path / "proof.json"
    assert not run_part(2, steps, read_report(out, MACHINE), out, minutes=1)
    assert "FAILS shaky: it broke" in capsys.readouterr().out
    assert run_part(2, steps, read_report(out, MACHINE), out, minutes=1)
    assert run_part(2, steps, read_report(out, MACHINE), out, minutes=0)  # nothing is left to do
    assert ((tmp_path / "good").read_text(), (tmp_path / "shaky").read_text()) == ("x", "xx")
    assert "proves nothing about a GPU" in out.with_suffix(".md").read_text()
    with pytest.raises(UserError, match="another machine .torch differ"):
        read_report(out, MACHINE | {"torch": "2.11.0"})


def test_a_part_without_time_starts_nothing_and_says_what_is_left(tmp_path, capsys) -> None:
    step = Step(4, "kill", (sys.executable, "-c", "1"), tmp_path / "x.json", read_json)
    assert not run_part(4, [step], {"machine": MACHINE, "parts": {}}, tmp_path / "proof.json", minutes=-1)
    assert "no time left for kill" in capsys.readouterr().out


def test_every_part_has_steps_and_a_rehearsal_stays_on_the_cpu(tmp_path) -> None:
    full, rehearsal = (make_steps(tmp_path, rehearse, 2) for rehearse in (False, True))
    for steps in (full, rehearsal):
        assert {step.part for step in steps} == set(PARTS)
        assert len({(step.part, step.name) for step in steps}) == len(steps) == len({step.out for step in steps})
    assert any("cuda" in step.command for step in full) and not any("cuda" in step.command for step in rehearsal)


def test_failed_tests_are_named(tmp_path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase name="a"/><testcase name="b">'
        '<failure message="assert 1 == 2&#10;more"/></testcase><testcase name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    result = read_tests(report)
    assert result["text"] == "1 passed, 1 failed, 1 skipped; b: assert 1 == 2" and not result["ok"]


def test_the_planner_is_held_against_a_measured_rung(monkeypatch) -> None:
    monkeypatch.setattr(bench.gpu_planner, "_cluster", lambda device, peak: cluster_of(1, gpu="H100"))
    rung = {"name": "+ 12 bytes per parameter", "tokens_per_second": 1.0, "flops_per_second": 1e12, "memory_gib": 10.0}
    (row,) = planner_rows({"12N": rung, "eager": rung, "6N": {"text": "failed"}}, "cuda", 1e15)
    assert row["rung"] == "12N" and not row["in_range"] and row["planned_low"] > 1.0
    assert row["memory_error"] == pytest.approx(row["planned_gib"] / 10.0 - 1)
    report = {"machine": MACHINE, "parts": {"3": {"peak": {"ok": True, "text": "", "flops": 1e15}}}}
    report["parts"]["3"] |= {"12N": rung | {"ok": True, "text": ""}, "planner": {"ok": True, "text": "", "rows": [row]}}
    line = next(line for line in markdown(report).splitlines() if line.startswith("| + 12 bytes"))
    assert line.split(" | ")[2:4] == ["0.1%", "10.00"]


def test_parity_passes_and_fails_where_attention_leaks(tmp_path, monkeypatch) -> None:
    path, cpu = str(write_tiny_model(tmp_path / "model")), torch.device("cpu")
    good = compare("llama", path, [37, 5, 60], cpu)
    assert good["ok"] and good["fp32_loss"] == good["fp32_gradient"] == 0.0 and good["bf16_gradient"] < 0.1
    products = model.packed_attention.product_attention
    monkeypatch.setattr(
        model.packed_attention,
        "product_attention",
        lambda q, k, v, lengths, scale: products(q, k, v, (sum(lengths),), scale),
    )
    bad = compare("llama", path, [37, 5, 60], cpu)
    assert not bad["ok"] and not bad["bf16_isolated"] and bad["bf16_gradient"] > 2 * bad["eager_gradient"]


def test_the_last_logged_step_is_read_from_a_file_that_is_being_written(tmp_path) -> None:
    metrics = Path(tmp_path, "metrics.jsonl")
    assert last_step(metrics) == 0
    rows = [{"step": 3, "train/loss": 1.0}, {"step": 3, "validation/loss": 1.0}, {"step": 4, "train/loss": 1.0}]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "train/lo')
    assert last_step(metrics) == 4
