"""Updates that the weights' dtype loses, against numbers worked out by hand, and planted faults."""

import dataclasses

import pytest
import torch

from configs.config import Optimizer
from distributed import optimizer
from preflight.model import load_packed, packed_losses
from preflight.precision import (
    Part,
    check_movement,
    check_precision,
    check_updates,
    lost_share,
    realised_share,
    sum_of_rates,
    ulp,
)
from preflight.reference import compute, load_reference
from preflight.result import FAILS, OK, WARNING
from tests.preflight.tiny_run import read, tiny_config


def part(rows: int = 64, columns: int = 256, size: float = 0.02) -> Part:
    """Weights of one magnitude with random signs, gradients far above eps."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(rows, columns, generator=generator).sign()
    return Part(size * signs, torch.randn(rows, columns, generator=generator) + 0.01)


def settings(rate: float, memory: str = "16N") -> Optimizer:
    return Optimizer(learning_rate=rate, memory=memory, weight_decay=0.0)


def test_ulp_is_the_gap_to_the_next_number() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        values = torch.tensor([0.02, 1.0, 1.5, -3.0, 2.0**-20, 0.999], dtype=dtype)
        away = torch.nextafter(values.abs(), torch.full_like(values, torch.inf))
        assert torch.equal(ulp(values.float(), dtype), (away.float() - values.abs().float()))


@pytest.mark.parametrize("rate, share", [(1e-3, 0.0), (2e-5, 1.0), (5e-5, 1.0), (7e-5, 0.0)])
def test_bf16_loses_what_is_less_than_half_a_gap(rate, share) -> None:
    """0.02 lies between 2^-6 and 2^-5, so its gap is 2^-13 = 1.22e-4, and half of it 6.1e-5."""
    assert lost_share([part()], settings(rate), 1.0, torch.bfloat16) == share
    assert lost_share([part()], settings(rate), 1.0, torch.float32) == 0.0


@pytest.mark.parametrize("memory", ["16N", "14N", "12N", "8N"])
def test_every_optimizer_realises_its_step_at_a_rate_that_bf16_would_lose(memory) -> None:
    realised, noise = realised_share([part(512, 512)], settings(2e-5, memory), 3.0, seed=0)
    assert abs(realised - 1) < max(4 * noise, 0.001) and noise < 0.01
    result = check_updates([part(512, 512)], settings(2e-5, memory), 3.0, 0)
    assert result.status == OK and result.figures["lost_in_bf16"] == 1.0


def test_rounding_to_nearest_instead_of_stochastically_fails(monkeypatch) -> None:
    def nearest(value, noise, stream, first):
        return value.copy_(value.bfloat16().float())

    monkeypatch.setattr(optimizer, "stochastic_round_", nearest)
    result = check_updates([part(512, 512)], settings(2e-5, "12N"), 1.0, 0)
    assert result.status == FAILS and result.figures["realised"] == 0.0
    assert "only 0.0% of the intended update arrives" in result.text and "would lose 100.0%" in result.text


def test_an_optimizer_that_moves_half_as_far_fails(monkeypatch) -> None:
    exact = torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *a, **k: exact(*a, **k | {"lr": k["lr"] / 2}))
    result = check_updates([part(512, 512)], settings(1e-3, "12N"), 1.0, 0)
    assert result.status == FAILS and result.figures["realised"] == pytest.approx(0.5, abs=0.01)


def test_a_rate_that_not_even_fp32_holds_fails() -> None:
    result = check_updates([part()], settings(1e-10), 1.0, 0)
    assert result.status == FAILS and "not even fp32 holds it" in result.text


@pytest.mark.parametrize(
    "rate, memory, status",
    [(1e-3, "16N", OK), (1e-3, "12N", OK), (1e-7, "16N", FAILS), (1e-7, "8N", FAILS), (2e-6, "12N", WARNING)],
)
def test_a_run_that_cannot_leave_its_bf16_numbers_fails(rate, memory, status) -> None:
    """100 steps at a constant 1e-7 move a weight by 1e-5, below half of the gap of 1.22e-4."""
    given = dataclasses.replace(settings(rate, memory), min_lr_ratio=1.0)
    result = check_movement([part()], given, 100, 0, torch.bfloat16)
    assert result.figures["sum_of_rates"] == pytest.approx(100 * rate)
    assert result.figures["signal"] == pytest.approx((100 * rate * 2**13) ** 0.5)
    assert result.status == status, result.text


def test_fp32_weights_computed_in_fp32_are_not_measured_by_bf16() -> None:
    assert check_movement([part()], settings(1e-7), 100, 0, torch.float32).status == OK


def test_the_rates_of_a_run_add_up() -> None:
    from train import learning_rate

    given = Optimizer(learning_rate=3e-4, min_lr_ratio=0.1)
    exact = sum(learning_rate(step, 400, 20, 3e-4, 0.1) for step in range(400))
    assert sum_of_rates(given, 400, 20) == pytest.approx(exact, rel=0.01)


def test_the_whole_check_on_a_model_and_on_weights_that_are_not_finite(tmp_path) -> None:
    run = read(tiny_config(tmp_path))
    documents, _ = packed_losses(run, load_packed(run))
    reference = load_reference(run, documents)
    compute(reference, 60.0)
    found = {result.name: result for result in check_precision(run, reference)}
    assert [result.status for result in found.values()] == [OK] * 4, found
    assert found["updates"].figures["realised"] == pytest.approx(1, abs=1e-3)
    with torch.no_grad():
        next(reference.model.parameters())[3, 3] = torch.nan
    found = {result.name: result for result in check_precision(run, reference)}
    assert found["finite"].status == FAILS and "embed_tokens" in found["finite"].text and "updates" not in found
