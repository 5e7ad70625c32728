"""How much each micro-batch counts in the first moment, on gradients and a checkpoint that are made up."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from preflight.shares import MATRICES, choose, find_shares, write_sample

MICRO_BATCHES = [0, 0, 1, 2]  # of four documents
NAMES = [f"model.layers.{i}.up.weight" for i in range(MATRICES)]


@pytest.fixture
def gradients(tmp_path) -> list[dict[str, torch.Tensor]]:
    """Of each document, for each matrix; the sample of them is written to `tmp_path`."""
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.zeros(64, 32)) for name in NAMES}
    common = torch.randn(64, 32)  # documents resemble each other
    gradients = [{name: common + torch.randn(64, 32) for name in NAMES} for _ in MICRO_BATCHES]
    sample = choose(parameters, len(gradients))
    assert sample.elements(parameters) == MATRICES * 64 * 32
    for document in gradients:
        for name, parameter in parameters.items():
            parameter.grad = document[name] + (0 if parameter.grad is None else parameter.grad)
        sample.take(parameters)
    write_sample(tmp_path / "sample", sample, MICRO_BATCHES)
    return gradients


def write_moments(
    path: Path, gradients: list[dict[str, torch.Tensor]], factors: list[float], noise: float = 0.0
) -> None:
    """A checkpoint whose moments are 0.1 times the gradients with these factors."""
    moments = {
        f"exp_avg.{name}": 0.1 * sum(f * g[name] for f, g in zip(factors, gradients, strict=True))
        + 0.1 * noise * torch.randn(64, 32)
        for name in NAMES
    }
    dcp.save(moments, checkpoint_id=path, no_dist=True)


@pytest.mark.parametrize("factors", [(1, 1, 1), (0.5, 0.5, 0.5), (0.97, 0.94, 1.1), (1, 1, 0), (2, 1, 1)])
def test_shares_are_found_exactly(tmp_path, gradients, factors) -> None:
    write_moments(tmp_path / "step", gradients, [factors[i] for i in MICRO_BATCHES])
    shares = find_shares(tmp_path / "sample", tmp_path / "step", 0.1)
    assert shares is not None and shares.residual < 1e-6
    assert list(shares.micro_batches.values()) == pytest.approx(factors, abs=1e-5)


def test_noise_covers_what_rounding_does(tmp_path, gradients) -> None:
    write_moments(tmp_path / "step", gradients, [1.0] * 4, noise=0.1)
    shares = find_shares(tmp_path / "sample", tmp_path / "step", 0.1)
    assert shares is not None and 0.01 < shares.residual < 0.05
    for number, share in shares.micro_batches.items():
        assert abs(share - 1) < shares.noise[number] < 0.2


def test_documents_that_are_equal_cannot_be_told_apart(tmp_path, gradients) -> None:
    parameters = {name: nn.Parameter(torch.zeros(64, 32)) for name in NAMES}
    sample = choose(parameters, 2)
    for count in (1, 2):
        for name, parameter in parameters.items():
            parameter.grad = count * gradients[0][name]
        sample.take(parameters)
    write_sample(tmp_path / "equal", sample, [0, 1])
    write_moments(tmp_path / "step", [gradients[0], gradients[0]], [1.0, 1.0])
    shares = find_shares(tmp_path / "equal", tmp_path / "step", 0.1)
    assert shares is not None and list(shares.micro_batches.values()) == pytest.approx([1, 1], abs=1e-4)


def test_a_checkpoint_without_these_moments(tmp_path, gradients) -> None:
    dcp.save({"exp_avg_codes.x": torch.zeros(3)}, checkpoint_id=tmp_path / "step", no_dist=True)
    assert find_shares(tmp_path / "sample", tmp_path / "step", 0.1) is None
