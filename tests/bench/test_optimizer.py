"""The benchmark of the optimizers: the bytes of each form, ratios, and a table that fits 100 columns."""

import math

import pytest
import torch

from bench import optimizer


def test_the_table_has_the_bytes_that_a_pass_moves_and_ratios_to_16n(monkeypatch) -> None:
    monkeypatch.setattr(optimizer, "SHAPES", {(64, 576): 2, (576,): 3})
    monkeypatch.setattr(optimizer, "STEPS", 1)
    best = optimizer.measure_all(1, torch.device("cpu"))
    assert set(best) == {(form, shape) for form in optimizer.FORMS for shape in optimizer.SHAPES}
    # Weights and moments are read and written, gradients are read; vectors keep fp32 moments in 6N.
    per_matrix = {form: best[form, (64, 576)][2] / (2 * 64 * 576) for form in optimizer.FORMS}
    assert per_matrix == pytest.approx({"16N": 28, "14N": 24, "12N": 22, "8N": 14, "6N": 10 + 2 * 8 / 192})
    assert best["6N", (576,)][2] / (3 * 576) == 22
    assert all(math.isfinite(step) and step > 0 and norm > 0 for step, norm, _ in best.values())


def test_the_columns_of_the_table() -> None:
    shapes = optimizer.SHAPES
    total = sum(count * math.prod(shape) for shape, count in shapes.items())
    assert total == 134_515_008  # SmolLM2-135M
    best = {
        (form, shape): (
            1e-9 * factor * count * math.prod(shape),
            0.5e-9 * count * math.prod(shape),
            20.0 * count * math.prod(shape),
        )
        for factor, form in enumerate(optimizer.FORMS, 1)
        for shape, count in shapes.items()
    }
    head, *lines = optimizer.table(best)
    assert max(map(len, [head, *lines])) <= 100 and len({*map(len, [head, *lines])}) == 1
    assert lines[2].split() == ["12N", "20.0", "3.00", "6.7", "3.00", "0.50", "|", *["3.00"] * 5]
