"""A single rank on a CPU: its weights are cast once per step, and its gradients are not copied to be reduced."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from configs.config import Model, Sharding
from distributed.sharding import before_micro_batch, gathering_strategy, make_mesh, parallelize, reshard

SIZE, LAYERS, MICRO_BATCHES = 48, 3, 4
WEIGHTS = LAYERS * SIZE * SIZE


@pytest.fixture(scope="module", autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Copies(TorchDispatchMode):
    """Counts the elements of whole weights or gradients that are copied: (dtype before, dtype after) -> elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[tuple[torch.dtype, torch.dtype], int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.add(args[0], out)
        if func is torch.ops.aten.copy_.default and args[0] is not args[1]:
            self.add(args[1], args[0])
        return out

    def add(self, source: torch.Tensor, target: torch.Tensor) -> None:
        key = source.dtype, target.dtype
        if source.numel() >= SIZE * SIZE:
            self.elements[key] = self.elements.get(key, 0) + source.numel()


def sharded(strategy: str, dtype: torch.dtype = torch.float32, reduce_dtype: str = "fp32") -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS))).to(dtype)
    settings = Sharding(strategy=strategy, reduce_dtype=reduce_dtype)
    mesh = make_mesh("cpu", 1, 1, settings)
    parallelize(model, list(model), [], mesh, torch.bfloat16, Model(path=""), settings)
    return model, gathering_strategy(settings, mesh)


def step(model: nn.Module, strategy: str) -> list[torch.Tensor]:
    """The gradients of MICRO_BATCHES micro-batches."""
    generator = torch.Generator().manual_seed(1)
    for number in range(1, MICRO_BATCHES + 1):
        before_micro_batch(model, strategy, number == MICRO_BATCHES)
        model(torch.randn(7, SIZE, generator=generator).to(torch.bfloat16)).float().square().sum().backward()
    found = [parameter.grad.to_local().clone() for parameter in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("strategy, casts", [("full", 1), ("grad_op", 1), ("hybrid", 2 * MICRO_BATCHES)])
def test_weights_are_cast_once_per_step(strategy, casts) -> None:
    """`hybrid` frees the copy after each use, and casts for each forward and each backward."""
    model, effective = sharded(strategy)
    step(model, effective)
    with Copies() as copies:
        step(model, effective)
    assert copies.elements[torch.float32, torch.bfloat16] == casts * WEIGHTS
    # No gradient is copied in fp32: the buffer that it is cast into is the gradient.
    assert (torch.float32, torch.float32) not in copies.elements
    assert all(parameter.device_mesh.size() == 1 for parameter in model.parameters())  # shards again after the step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduce_dtype", ["fp32", "bf16"])
def test_gradients_are_those_without_fsdp_to_the_bit(dtype, reduce_dtype) -> None:
    """The gradient of each micro-batch is bf16, and they are added up in the dtype of the weights."""
    model, effective = sharded("full", dtype, reduce_dtype)
    plain = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)))
    for ours, theirs in zip(plain, model, strict=True):
        ours.weight = nn.Parameter(theirs.weight.to_local().detach().to(torch.bfloat16))
    for _ in range(2):  # the second step uses the buffers of the first
        generator, expected = torch.Generator().manual_seed(1), [torch.zeros(SIZE, SIZE, dtype=dtype) for _ in plain]
        for _ in range(MICRO_BATCHES):
            copied = copy.deepcopy(plain)
            copied(torch.randn(7, SIZE, generator=generator).to(torch.bfloat16)).float().square().sum().backward()
            for total, layer in zip(expected, copied, strict=True):
                total += layer.weight.grad.to(dtype)
        assert all(torch.equal(a, b) for a, b in zip(step(model, effective), expected, strict=True))


def test_an_unfinished_step_leaves_nothing_behind() -> None:
    model, effective = sharded("full")
    expected = step(model, effective)
    before_micro_batch(model, effective, is_last=False)
    model(torch.ones(2, SIZE, dtype=torch.bfloat16)).sum().backward()
    reshard(model)
    model.zero_grad()  # of the shards
    assert all(torch.equal(a, b) for a, b in zip(step(model, effective), expected, strict=True))


@pytest.mark.parametrize("strategy", ["full", "grad_op", "hybrid", "none"])
def test_only_a_single_cpu_rank_under_full_is_special(strategy) -> None:
    class Mesh:
        def __init__(self, size: int, device_type: str) -> None:
            self.device_type, self._size = device_type, size

        def size(self) -> int:
            return self._size

    for size, device_type in ((1, "cpu"), (2, "cpu"), (1, "cuda"), (2, "cuda")):
        special = strategy == "full" and (size, device_type) == (1, "cpu")
        assert gathering_strategy(Sharding(strategy=strategy), Mesh(size, device_type)) == (
            "grad_op" if special else strategy
        )
