"""The chunked loss alone: rounding of its gradients, memory, sampled labels, mistakes in `token_losses`."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model.loss
from common.errors import UserError
from common.random_bits import hash64_tensor, sample_labels
from model.loss import HeadSettings, chunked, lend_weight, negative_log_likelihood
from tests.losses import head_of, targets_of
from tests.operators import OperatorHook

TARGETS, VOCABULARY, WIDTH = 200, 600, 32
DIVISOR = 1237  # not a power of two: a gradient that is rounded and then scaled is rounded twice


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "expected_divisor, chunk, in_pieces",
    [(DIVISOR, 1024, False), (1, 1024, False), (1, 1024, True), (DIVISOR, 40, False), (1, 40, True)],
)
def test_bf16_gradients_are_as_exact_as_one_product(monkeypatch, expected_divisor, chunk, in_pieces) -> None:
    """Compares with fp64 for the same bf16 inputs. Rounding the product of each chunk would give 1.25 times the error."""
    monkeypatch.setattr(model.loss, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(model.loss, "HEAD_ROWS", 256)
    calls = []
    product = model.loss._product
    monkeypatch.setattr(model.loss, "_product", lambda a, b, exact: calls.append(exact) or product(a, b, exact))
    for seed in range(3):
        torch.manual_seed(seed)
        hidden, weight = torch.randn(TARGETS, WIDTH).bfloat16(), (0.3 * torch.randn(VOCABULARY, WIDTH)).bfloat16()
        ids = torch.randint(0, VOCABULARY, (TARGETS,))
        gradients = []
        for dtype in (torch.float64, torch.bfloat16):
            pair = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight)]
            logits = F.linear(*pair).to(torch.promote_types(dtype, torch.float32))
            (F.cross_entropy(logits, ids, reduction="sum") / DIVISOR).backward()
            gradients.append([tensor.grad for tensor in pair])
        exact, naive = gradients
        weight.requires_grad_()
        head, pieces = head_of(weight), []
        if in_pieces:
            head.add_gradient = lambda rows, n, factor, to=pieces: to.append(rows([(0, n)]).float() * factor)
        batch = targets_of(ids, divisor=expected_divisor)
        (chunked(head, hidden, batch, negative_log_likelihood) / DIVISOR).backward()
        gradient = pieces[0] if in_pieces else weight.grad
        assert gradient.dtype == (torch.float32 if in_pieces else torch.bfloat16)
        assert relative_error(gradient, exact[1]) <= 1.01 * relative_error(naive[1], exact[1])
    # The exact product takes twice as long on a CPU. A single chunk needs it only if the loop does not divide by the divisor.
    assert (True in calls) == (chunk == 40 or (expected_divisor == 1 and not in_pieces))


def is_whole(_: object, args: tuple, out: object) -> bool:
    """Return whether an operator returned a new tensor at least as large as the head's weight."""
    before = {argument.data_ptr() for argument in args if isinstance(argument, torch.Tensor)}
    return isinstance(out, torch.Tensor) and out.data_ptr() not in before and out.numel() >= VOCABULARY * WIDTH


def test_gradient_reduced_in_pieces_is_never_whole(monkeypatch) -> None:
    """With as many targets as a chunk, the gradient is a single bf16 product, which is computed rows by rows."""
    monkeypatch.setattr(model.loss, "CHUNK_TOKENS", 10)
    hidden, weight = torch.randn(10, WIDTH).bfloat16(), torch.randn(VOCABULARY, WIDTH).bfloat16().requires_grad_()
    sizes = []
    for in_pieces in (True, False):
        head = head_of(weight)
        if in_pieces:
            head.add_gradient = lambda rows, n, factor: sizes.extend(len(rows([(i, i + 50)])) for i in range(0, n, 50))
        whole = []
        with OperatorHook(lambda *seen, to=whole: to.append(is_whole(*seen))):
            chunked(head, hidden, targets_of(torch.arange(10)), negative_log_likelihood).backward()
        assert any(whole) != in_pieces
    assert sizes == [50] * (VOCABULARY // 50)


def test_without_autograd_only_the_losses_are_computed(monkeypatch) -> None:
    """The losses of a trained head are bitwise equal to training's. The gradients would take twice the time of the losses."""
    monkeypatch.setattr(model.loss, "CHUNK_TOKENS", 40)
    calls, product = [], model.loss._product
    monkeypatch.setattr(model.loss, "_product", lambda a, b, exact: calls.append(exact) or product(a, b, exact))
    torch.manual_seed(0)
    hidden, weight = torch.randn(TARGETS, WIDTH), torch.randn(VOCABULARY, WIDTH).requires_grad_()
    batch = targets_of(torch.randint(0, VOCABULARY, (TARGETS,)))

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert logits.requires_grad == torch.is_grad_enabled() == is_training
        return negative_log_likelihood(logits, targets)

    is_training = False
    with torch.no_grad():
        evaluated = chunked(head_of(weight), hidden, batch, loss)
    assert not calls and not evaluated.requires_grad
    is_training = True
    assert torch.equal(evaluated, chunked(head_of(weight), hidden, batch, loss))
    assert len(calls) == 2 * 5


def test_a_second_derivative_is_refused() -> None:
    hidden = torch.randn(5, WIDTH, requires_grad=True)
    batch = targets_of(torch.arange(5))
    loss = chunked(head_of(torch.randn(VOCABULARY, WIDTH)), hidden, batch, negative_log_likelihood) / 5
    with pytest.raises(UserError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_a_copied_head_lends_its_own_weight() -> None:
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    lend_weight(head, HeadSettings())
    copied = copy.deepcopy(head)
    chunked(copied, torch.randn(3, WIDTH), targets_of(torch.arange(3)), negative_log_likelihood).backward()
    assert head.weight.grad is None and copied.weight.grad.abs().max() > 0


def without_grad(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return negative_log_likelihood(logits, targets)


@pytest.mark.parametrize(
    "losses, words",
    [
        (without_grad, "without a gradient"),
        (lambda logits, targets: negative_log_likelihood(logits, targets).detach(), "without a gradient"),
        (lambda logits, targets: logits, r"the shape \(4, 600\); it must return one loss per target, a tensor \(4,\)"),
        (lambda logits, targets: None, "the type NoneType; it must"),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_mistake_in_token_losses_is_named(losses: Callable, words: str, scale: float) -> None:
    """Also if the logits are not the leaf from which autograd starts."""
    hidden, weight = torch.randn(4, WIDTH), torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    with pytest.raises(UserError, match=f"^token_losses in train.py .*{words}"):
        chunked(head_of(weight, HeadSettings(scale=scale)), hidden, targets_of(torch.arange(4)), losses)


def test_error_inside_token_losses_is_not_changed() -> None:
    def broken(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits @ targets

    with pytest.raises(RuntimeError, match="size mismatch"):
        chunked(head_of(torch.randn(9, WIDTH)), torch.randn(4, WIDTH), targets_of(torch.arange(4)), broken)


def test_labels_are_sampled_from_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, -9.0]])
    keys = hash64_tensor(3, torch.arange(100_000))
    counts = torch.bincount(sample_labels(logits.expand(len(keys), -1), keys), minlength=5)
    expected = logits.softmax(-1)[0] * len(keys)
    assert ((counts - expected).abs() < 4 * expected.sqrt() + 1).all(), (counts, expected)
    # Labels at other positions, of other documents or with other seeds are independent.
    draws = [
        sample_labels(torch.zeros(2000, 64), hash64_tensor(seed, torch.full((2000,), d), torch.arange(p, p + 2000)))
        for seed, d, p in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 2000))
    ]
    for i in range(4):
        for j in range(i):
            assert (draws[i] == draws[j]).float().mean() < 0.04  # 1/64 by chance
