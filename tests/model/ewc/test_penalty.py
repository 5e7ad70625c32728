"""The gradient and the metrics of the EWC penalty against autograd, and rounding in bf16."""

import pytest
import torch

from model.ewc import Anchor, Penalty, in_dtype
from model.language_model import PackedLanguageModel, parameter_names
from tests.model.ewc.tiny_ewc import load


def model_away_from_anchor(path, dtype: torch.dtype = torch.float32) -> tuple[PackedLanguageModel, Anchor]:
    """A model that differs from its reference and has gradients, and an anchor with a wide range of Fisher values."""
    model = load(path).to(dtype)
    parameters, generator = parameter_names(model), torch.Generator().manual_seed(1)
    reference = {n: p.detach().clone() for n, p in parameters.items()}
    fisher = {n: torch.exp(3 * torch.randn(p.shape, generator=generator)) for n, p in parameters.items()}
    with torch.no_grad():
        for p in parameters.values():
            p += (0.05 * torch.randn(p.shape, generator=generator)).to(dtype)
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return model, Anchor(fisher, reference, {})


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_gradient_is_that_of_the_penalty(path, ranks, dtype, tolerance) -> None:
    """With bf16 only the Fisher diagonal is rounded; a reference that bf16 cannot represent exactly stays fp32."""
    model, anchor = model_away_from_anchor(path)
    parameters = parameter_names(model)
    before = {n: p.grad.clone() for n, p in parameters.items()}
    terms = {n: (30.0 / 2 * anchor.fisher[n] * (p - anchor.reference[n]) ** 2).sum() for n, p in parameters.items()}
    pull = dict(zip(parameters, torch.autograd.grad(sum(terms.values()), parameters.values()), strict=True))

    penalty = Penalty(30.0, parameters, in_dtype(anchor, dtype, ranks))
    assert {f.dtype for f in penalty.anchor.fisher.values()} == {dtype}
    penalty.add_gradient(0)
    for name, parameter in parameters.items():
        wrong = (parameter.grad - before[name] - pull[name]).abs()
        assert (wrong <= tolerance * pull[name].abs() + 1e-6 * (before[name].abs() + pull[name].abs())).all(), name

    row = penalty.curves()
    of_layer = [n for n in parameters if n.startswith("model.layers.1.")]
    for curve, names in (("", list(parameters)), ("/layers.01", of_layer)):
        expected = {
            "penalty": float(sum(terms[n] for n in names)),
            "grad_norm": sum(float(pull[n].square().sum()) for n in names) ** 0.5,
            "drift": sum(float((parameters[n] - anchor.reference[n]).square().sum()) for n in names) ** 0.5,
        }
        found = {what: row[f"ewc/{what}{curve}"] for what in expected}
        assert found == pytest.approx(expected, rel=max(1e-5, tolerance / 4))
    groups = ("embed_tokens", "layers.00", "layers.01", "norm")  # the head is tied, so it is not a group
    assert {key.rpartition("/")[2] for key in row if key.count("/") == 2} == set(groups)
    assert sum(row[f"ewc/penalty/{group}"] for group in groups) == pytest.approx(row["ewc/penalty"])
    # Bytes per parameter. The norms of the reference are ones, which bf16 represents exactly.
    sizes = {n: 8 if dtype == torch.float32 else 4 if "norm" in n else 6 for n in parameters}
    assert penalty.num_bytes() == sum(p.numel() * sizes[n] for n, p in parameters.items())


def test_small_penalty_gradient_is_not_lost_in_a_bf16_gradient(path, ranks) -> None:
    """A thousandth of the gradient is less than half of its last bit, so rounding to nearest would always lose it."""
    model, anchor = model_away_from_anchor(path, torch.bfloat16)
    parameters = parameter_names(model)
    for name, parameter in parameters.items():
        parameter.data.copy_(anchor.reference[name].float() + 0.5)
        anchor.fisher[name] = 0.5 / (parameter.float() - anchor.reference[name].float())
    anchor = in_dtype(anchor, torch.bfloat16, ranks)
    penalty, total, steps = Penalty(2.0**-9, parameters, anchor), 0.0, 50
    for step in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        penalty.add_gradient(step, measure=False)
        total += sum(float((p.grad.float() - 1).sum()) for p in parameters.values())
    count = sum(p.numel() for p in parameters.values())
    assert total / steps / count == pytest.approx(2.0**-10, rel=0.02)
    first = {n: p.grad.clone() for n, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    penalty.add_gradient(steps - 1)
    assert all(torch.equal(p.grad, first[n]) for n, p in parameters.items())  # rounding is a function of the step
