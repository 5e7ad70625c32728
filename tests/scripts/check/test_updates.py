"""The line *updates*, from three saved steps of torch's AdamW, with the run's own settings and with wrong settings."""

from pathlib import Path

import pytest
import torch

from distributed import checkpoint_directory
from distributed.checkpoint import Saver
from distributed.process_group import Ranks
from model.weights import tensors_of_checkpoint
from scripts.check.tensors import is_adamw
from scripts.check.updates import STEPS, Moved, checkpoint_of, judge_moves, measure_moves
from training.check_result import FAILS, OK

SETTINGS = {"learning_rate": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "memory": "16N"}
RATES = dict.fromkeys(range(1, STEPS + 1), 1e-3)
NAMES = ["layer.weight", "norm.weight"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, ranks) -> Path:
    """Train three steps at a rate of 1e-3, with weight decay on the matrix alone."""
    return three_steps(tmp_path_factory.mktemp("run"), ranks, 1e-3)


def three_steps(folder: Path, ranks: Ranks, peak_of_matrix: float, loses_rate: bool = False) -> Path:
    """Save three steps at a rate of 1e-3, with a peak rate of its own for the matrix, which the loop may lose."""
    random = torch.Generator().manual_seed(0)
    shapes = dict(zip(NAMES, ((64, 48), (48,)), strict=True))
    parameters = {
        name: torch.nn.Parameter(torch.randn(shape, generator=random).mul(0.1)) for name, shape in shapes.items()
    }
    matrix, vector = ({"params": [parameter]} for parameter in parameters.values())
    groups = [matrix | {"lr": peak_of_matrix}, vector | {"weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    saver = Saver(folder / "checkpoints", parameters, optimizer, ranks, keep_last=STEPS)
    if loses_rate:
        optimizer.param_groups[0]["lr"] = 1e-3
    for step in range(1, STEPS + 1):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=random).add(0.5)
        optimizer.step()
        saver.save({"step": step})
    return folder


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("nothing", None, "all 2 tensors moved 1.000 times as far"),
        ("rate", 5e-4, "2 times as far: set the rate in every group"),
        ("peak", 5e-4, "train/learning_rate is 0.001, more than optimizer.learning_rate=0.0005"),
        ("weight_decay", 0.3, "matrices shrink by a weight decay of 0.1, where 0.3 is expected"),
        ("betas", [0.9, 0.999], "the optimizer has other betas than optimizer.betas"),
        ("is_adamw", False, "all 2 trained tensors moved, and only that was checked"),
    ],
)
def test_a_wrong_rate_decay_or_beta_is_named(run, monkeypatch, key, value, words) -> None:
    settings = SETTINGS | ({key: value} if key in SETTINGS else {})
    if key == "is_adamw":
        monkeypatch.setattr("scripts.check.updates.is_adamw", lambda checkpoint: value)
    rates = dict.fromkeys(RATES, value) if key == "rate" else RATES
    peak = value if key == "peak" else 1e-3
    result = judge_moves(settings, rates, peak, measure_moves(run, settings, rates, NAMES))
    assert result.status == (OK if key in ("nothing", "is_adamw") else FAILS) and words in result.text, result.text


@pytest.mark.parametrize("loses_rate", [False, True])
def test_a_group_moves_at_its_own_rate(ranks, tmp_path, loses_rate) -> None:
    """A group may have its own rate, but the loop must not give all groups the same rate."""
    run = three_steps(tmp_path, ranks, 2e-4, loses_rate)
    result = judge_moves(SETTINGS, RATES, 1e-3, measure_moves(run, SETTINGS, RATES, NAMES))
    words = "layer.weight 5 times as far" if loses_rate else "all 2 tensors moved 1.000 times as far"
    assert result.status == (FAILS if loses_rate else OK) and words in result.text, result.text


def test_moments_of_zero_fail(run) -> None:
    moves = [Moved(name, True, True, 0, 1.0, torch.zeros(2, 3)) for name in NAMES]
    assert judge_moves(SETTINGS, RATES, 1e-3, moves).status == FAILS


def test_updates_of_other_optimizers_are_unknown(run, ranks, tmp_path) -> None:
    """NAdam's moments have the same names as AdamW's."""
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    optimizer = torch.optim.NAdam([parameter])
    optimizer.step()
    Saver(tmp_path / "checkpoints", {"weight": parameter}, optimizer, ranks).save({"step": 1})
    assert is_adamw(checkpoint_of(run, 1)) and not is_adamw(checkpoint_of(tmp_path, 1))


def test_the_checkpoint_index_is_read_once(run, monkeypatch) -> None:
    read, calls = checkpoint_directory.read_index, []
    monkeypatch.setattr(
        checkpoint_directory, "read_index", lambda *arguments: calls.append(arguments) or read(*arguments)
    )
    tensors = tensors_of_checkpoint(checkpoint_of(run, 1))
    assert [tensors.read(name).shape for name in NAMES] == [(64, 48), (48,)] and len(calls) == 1
