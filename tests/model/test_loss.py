"""The chunked loss on its own: rounding of its gradients, memory, copies of a head, and mistakes in `token_losses`."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import model.loss
from common.errors import UserError
from model.loss import HeadSettings, chunked, lend_weight, negative_log_likelihood
from tests.losses import head_of, loss_sum, targets_of

TARGETS, VOCABULARY, WIDTH = 200, 600, 32
DIVISOR = 1237  # not a power of two, so that a gradient which is rounded before it is scaled is rounded twice


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("chunk", [1024, 40])
@pytest.mark.parametrize("expected_divisor", [DIVISOR, 1])
def test_gradients_in_bf16_are_as_exact_as_those_of_one_product(
    monkeypatch, expected_divisor, chunk, in_pieces
) -> None:
    """Against fp64, for the same bf16 inputs. Chunks whose products are rounded one by one have 1.25 times the error."""
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
            pair = [one.to(dtype, copy=True).requires_grad_() for one in (hidden, weight)]
            logits = F.linear(*pair).to(torch.promote_types(dtype, torch.float32))
            (F.cross_entropy(logits, ids, reduction="sum") / DIVISOR).backward()
            gradients.append([one.grad for one in pair])
        exact, naive = gradients
        weight.requires_grad_()
        head, pieces = head_of(weight), []
        if in_pieces:
            head.add_gradient = lambda rows, n, factor, to=pieces: to.append(rows([(0, n)]).float() * factor)
        batch = targets_of(ids, divisor=expected_divisor)
        (chunked(head, hidden, batch, negative_log_likelihood) / DIVISOR).backward()
        found = pieces[0] if in_pieces else weight.grad
        assert found.dtype == (torch.float32 if in_pieces else torch.bfloat16)
        assert relative_error(found, exact[1]) <= 1.01 * relative_error(naive[1], exact[1])
    # The exact product takes twice as long on a CPU: one chunk needs it only if the loop divides by another number.
    assert (True in calls) == (chunk == 40 or (expected_divisor == 1 and not in_pieces))


def test_gradients_in_fp32_are_the_sum_over_chunks_to_the_bit(monkeypatch) -> None:
    monkeypatch.setattr(model.loss, "CHUNK_TOKENS", 40)
    torch.manual_seed(0)
    hidden, weight = torch.randn(TARGETS, WIDTH), torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    ids = torch.randint(0, VOCABULARY, (TARGETS,))
    loss_sum(hidden, weight, ids).backward()
    expected = torch.zeros(VOCABULARY, WIDTH)
    for start in range(0, TARGETS, 40):
        rows = hidden[start : start + 40]
        logits = F.linear(rows, weight.detach()).requires_grad_()
        F.cross_entropy(logits, ids[start : start + 40], reduction="sum").backward()
        expected += logits.grad.T @ rows
    assert torch.equal(weight.grad, expected)


class Whole(TorchDispatchMode):
    """Counts the tensors of the shape of the head's weight that operations make."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        before = {one.data_ptr() for one in args if isinstance(one, torch.Tensor)}
        is_new = isinstance(out, torch.Tensor) and out.data_ptr() not in before
        self.count += is_new and out.numel() >= VOCABULARY * WIDTH
        return out


def test_a_gradient_that_is_reduced_in_pieces_is_never_whole(monkeypatch) -> None:
    """As many targets as a chunk and twice the width: one chunk of bf16, whose product is multiplied row by row."""
    monkeypatch.setattr(model.loss, "CHUNK_TOKENS", 10)
    hidden, weight = torch.randn(10, WIDTH).bfloat16(), torch.randn(VOCABULARY, WIDTH).bfloat16().requires_grad_()
    sizes = []
    for in_pieces in (True, False):
        head = head_of(weight)
        if in_pieces:
            head.add_gradient = lambda rows, n, factor: sizes.extend(len(rows([(i, i + 50)])) for i in range(0, n, 50))
        with Whole() as whole:
            chunked(head, hidden, targets_of(torch.arange(10)), negative_log_likelihood).backward()
        assert bool(whole.count) != in_pieces
    assert sizes == [50] * (VOCABULARY // 50)


def test_a_copied_head_lends_its_own_weight() -> None:
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    lend_weight(head, HeadSettings())
    copied = copy.deepcopy(head)
    chunked(copied, torch.randn(3, WIDTH), targets_of(torch.arange(3)), negative_log_likelihood).backward()
    assert head.weight.grad is None and copied.weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_losses_of_another_dtype_are_added_in_fp32(dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, WIDTH), torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    ids = torch.arange(9)
    loss = chunked(head_of(weight), hidden, targets_of(ids), lambda *pair: negative_log_likelihood(*pair).to(dtype))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loss_sum(hidden, weight, ids).item(), rel=1e-2)
    assert weight.grad.abs().max() > 0


def masked(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits[:, 0] = -torch.inf
    return negative_log_likelihood(logits, targets)


def scaled(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return negative_log_likelihood(logits.mul_(0.5), targets)


def without_grad(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return negative_log_likelihood(logits, targets)


OF_ANOTHER = torch.ones(4, requires_grad=True)


@pytest.mark.parametrize(
    "losses, words",
    [
        (masked, "changes its logits in place"),
        (scaled, "changes its logits in place"),
        (without_grad, "without a gradient"),
        (lambda logits, targets: negative_log_likelihood(logits, targets).detach(), "without a gradient"),
        (lambda logits, targets: OF_ANOTHER * 2, "without a gradient"),
        (lambda logits, targets: logits, r"the shape \(4, 600\); it must return one loss per target, a tensor \(4,\)"),
        (lambda logits, targets: F.cross_entropy(logits, targets), r"the shape \(\); it must"),
        (lambda logits, targets: None, "the type NoneType; it must"),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_mistake_in_token_losses_is_named(losses: Callable, words: str, scale: float) -> None:
    """Also where the logits are not the leaf that autograd starts from."""
    hidden, weight = torch.randn(4, WIDTH), torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    with pytest.raises(UserError, match=f"^token_losses in train.py .*{words}"):
        chunked(head_of(weight, HeadSettings(scale=scale)), hidden, targets_of(torch.arange(4)), losses)


def test_logits_changed_in_place_are_named_in_an_evaluation_too() -> None:
    with torch.no_grad(), pytest.raises(UserError, match="changes its logits in place"):
        chunked(head_of(torch.randn(9, WIDTH)), torch.randn(4, WIDTH), targets_of(torch.arange(4)), scaled)


def test_an_error_inside_of_token_losses_stays_what_it_is() -> None:
    def broken(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits @ targets

    with pytest.raises(RuntimeError, match="size mismatch"):
        chunked(head_of(torch.randn(9, WIDTH)), torch.randn(4, WIDTH), targets_of(torch.arange(4)), broken)
