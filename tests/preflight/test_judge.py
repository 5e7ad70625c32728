"""What is made of the runs of a check: exports that transformers cannot read, rows that are missing or run away."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from preflight import judge
from preflight.compare import read_rows
from preflight.result import FAILS, OK, SKIPPED, WARNING
from tests.tiny import write_tiny_model


@pytest.fixture
def context(tmp_path) -> SimpleNamespace:
    """A context whose straight run has exported a tiny model."""
    write_tiny_model(tmp_path / "straight" / "export")
    config = SimpleNamespace(model=SimpleNamespace(compute_dtype="fp32"), lora=SimpleNamespace(rank=0))
    return SimpleNamespace(scratch=tmp_path, config=config)


def change_export(context: SimpleNamespace, change) -> None:
    path = context.scratch / "straight" / "export" / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize("free", [2**40, 0])
def test_an_export_is_read_whole_or_by_its_shapes(context, monkeypatch, free) -> None:
    monkeypatch.setattr(judge, "free_bytes", lambda device, ranks: free)
    result = judge.judge_export(context)
    assert (result.status, result.figures["problems"]) == (OK, [])
    assert result.figures["parameters"] == 98_624
    change_export(context, lambda weights: weights.pop("model.norm.weight"))
    result = judge.judge_export(context)
    assert result.status == FAILS and "model.norm.weight" in result.text


def test_an_export_that_is_not_finite_fails(context) -> None:
    change_export(context, lambda weights: weights["model.norm.weight"].fill_(torch.inf))
    result = judge.judge_export(context)
    assert result.status == FAILS and "not finite: model.norm.weight" in result.text


def write_steps(run: Path, losses: list[float]) -> None:
    rows = [{"step": i, judge.LOSS: loss, judge.NORM: 1.0} for i, loss in enumerate(losses, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "losses, status",
    [([3.0, 2.0, 4.4], OK), ([3.0, 2.0, 4.6], WARNING), ([3.0, float("nan"), 2.0], FAILS), ([], FAILS)],
)
def test_three_steps_are_finite_and_do_not_run_away(context, losses, status) -> None:
    write_steps(context.scratch / "straight", losses)
    assert judge.judge_steps(context, 1.0).status == status


def test_a_step_that_is_logged_twice_is_not_a_step(context) -> None:
    run = context.scratch / "straight"
    write_steps(run, [3.0, 2.0, 1.0])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, judge.LOSS: 2.0, judge.NORM: 1.0}) + '\n{"step": 3, "train')
    assert sorted(read_rows(run, judge.LOSS)) == [1, 2, 3]
    assert judge.judge_steps(context, 1.0).status == FAILS


def test_a_reference_that_is_not_complete_judges_nothing(context) -> None:
    write_steps(context.scratch / "straight", [3.0])
    whole = {"loss": 3.0, "grad_norm": 1.1, "documents": 4, "of_documents": 4, "complete": True}
    assert judge.judge_first(context, whole, judge.LOSS).status == OK
    assert judge.judge_first(context, whole, judge.NORM).status == FAILS
    part = whole | {"documents": 2, "complete": False}
    result = judge.judge_first(context, part, judge.NORM)
    assert result.status == SKIPPED and "2 of the 4 documents" in result.text
    assert judge.judge_first(context, None, judge.NORM).status == SKIPPED
    shutil.rmtree(context.scratch / "straight")
    assert judge.judge_first(context, whole, judge.NORM).status == SKIPPED
