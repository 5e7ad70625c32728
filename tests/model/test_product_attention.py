"""Attention by matrix products in bf16 against exact attention in float64, and the isolation of its documents."""

import pytest
import torch

from distributed.activation_checkpointing import checkpoint_activations
from model import product_attention
from tests.operators import OperatorHook

LENGTHS = (1, 127, 128, 129, 300, 600)  # blocks of 128 queries; probabilities are kept up to 512 tokens
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 24


def inputs(seed: int = 0, tokens: int = sum(LENGTHS), sharpness: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Transposed from `(1, tokens, heads, head_dim)`, as in the models.
    shapes = [(1, tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(torch.bfloat16).transpose(1, 2).detach().requires_grad_() for x in (q * sharpness, k, v)]


def attend(q, k, v, lengths=LENGTHS, scaling=0.3) -> torch.Tensor:
    return product_attention.product_attention(q, k, v, lengths, scaling)


def exact(q, k, v, lengths=LENGTHS, scaling=0.3) -> torch.Tensor:
    """Compute attention by its definition, in the dtype of the arguments."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    outputs = []
    for a, b, c in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True):
        scores = (a @ b.transpose(2, 3) * scaling).masked_fill(
            torch.ones(a.shape[2], a.shape[2]).triu(1) == 1, -torch.inf
        )
        outputs.append((scores.softmax(-1) @ c).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def gradients(function, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    output = function(*tensors)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16)
    return [output, *torch.autograd.grad(output, tensors, weights.to(output.dtype))]


def error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("sharpness, bound", [(1.0, 6e-3), (20.0, 1.5e-2)])
def test_output_and_gradients_are_exact_up_to_bf16(sharpness, bound) -> None:
    """bf16 rounds by up to 2^-9 = 2e-3. A sharp softmax gives nearly all weight to a single key, and gradients cancel there."""
    tensors = inputs(sharpness=sharpness)
    reference = gradients(exact, [x.detach().double().requires_grad_() for x in tensors])
    results = gradients(attend, tensors)
    errors = [error(a, b) for a, b in zip(results, reference, strict=True)]
    assert results[0].shape == (1, sum(LENGTHS), HEADS, HEAD_DIM)
    assert errors[0] < 3e-3 and errors[3] < 4e-3, errors
    assert max(errors) < bound, errors


def test_document_is_bitwise_independent_of_other_documents() -> None:
    """Changes the first documents, then removes them."""
    q, k, v = inputs()
    tensors = [x.detach().clone() for x in (q, k, v)]
    for x in tensors:
        x[:, :, : LENGTHS[0] + LENGTHS[1]] += 1.0
    changed = [x.detach().requires_grad_() for x in tensors]
    before, after = gradients(attend, [q, k, v]), gradients(attend, changed)
    first = LENGTHS[0] + LENGTHS[1]
    assert torch.equal(before[0][:, first:], after[0][:, first:])
    assert not torch.equal(before[0][:, :first], after[0][:, :first])
    for a, b in zip(before[1:], after[1:], strict=True):
        assert torch.equal(a[:, :, first:], b[:, :, first:])
    alone = attend(*(x[:, :, first + 128 :] for x in (q, k, v)), LENGTHS[3:])
    assert torch.equal(before[0][:, first + 128 :], alone)


def test_recomputed_probabilities_equal_kept_ones_bitwise(monkeypatch) -> None:
    kept = gradients(attend, inputs())
    monkeypatch.setattr(product_attention, "KEEP_PROBABILITIES", 0)
    again = gradients(attend, inputs())
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_little_is_computed_above_the_diagonal() -> None:
    """A document of 600 tokens: blocks of 128 queries see 128, 256, 384, 512 and the last 88 see 600 keys."""
    scores = []
    with OperatorHook(lambda func, _, out: func is torch.ops.aten.baddbmm.default and scores.append(out.numel())):
        with torch.no_grad():
            attend(*inputs(tokens=600), (600,))
    assert sum(scores) == HEADS * (128 * (128 + 256 + 384 + 512) + 88 * 600)


def test_activation_checkpointing_changes_no_bit() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v)

    layer = Layer()
    checkpoint_activations([layer], "selective")
    plain, checkpointed = gradients(attend, inputs()), gradients(layer, inputs())
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_gradients_are_exact_with_an_attention_sink() -> None:
    """With a sink and values with a common part, the gradients of the scores are small differences of large numbers."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 300, HEAD_DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    direction = torch.nn.functional.normalize(torch.randn(HEAD_DIM, generator=generator), dim=0)
    q += 8 * direction
    k[:, :, 0] += 6 * direction
    v += 10 * torch.randn(1, 1, 1, HEAD_DIM, generator=generator)
    tensors = [x.to(torch.bfloat16).detach().requires_grad_() for x in (q, k, v)]
    reference = gradients(lambda *x: exact(*x, lengths=(300,)), [x.detach().double().requires_grad_() for x in tensors])
    results = gradients(lambda *x: attend(*x, lengths=(300,)), tensors)
    errors = [error(a, b) for a, b in zip(results, reference, strict=True)]
    assert max(errors) < 0.05, errors
