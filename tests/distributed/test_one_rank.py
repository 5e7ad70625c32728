"""A single rank on a CPU casts its weights once per step, and has the gradients of a model without FSDP."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from configs.config import Model, Sharding
from data.batches import collate
from distributed import sharding
from distributed.sharding import before_micro_batch, decoder_layers, gathering_strategy, make_mesh, parallelize
from model.architectures import read_model_config
from model.language_model import build_on_meta, load_for_evaluation, load_weights
from tests.losses import loss_of
from tests.model.test_equivalence import documents
from tests.operators import OperatorHook
from tests.tiny import write_tiny_model

SIZE, LAYERS, MICRO_BATCHES = 48, 3, 4
WEIGHTS = LAYERS * SIZE * SIZE


pytestmark = pytest.mark.usefixtures("ranks")


def cast_elements(func: object, args: tuple, out: torch.Tensor) -> int:
    """Return how many elements of whole weights an operator casts from fp32 to bf16."""
    is_copy, is_cast = func is torch.ops.aten.copy_.default, func is torch.ops.aten._to_copy.default
    source, target = (args[1], args[0]) if is_copy else (args[0], out)
    if not (is_copy or is_cast) or source.numel() < SIZE * SIZE:
        return 0
    return source.numel() * ((source.dtype, target.dtype) == (torch.float32, torch.bfloat16))


def sharded(strategy: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS))).to(dtype)
    settings = Sharding(strategy=strategy, reduce_dtype="bf16")
    mesh = make_mesh("cpu", 1, settings)
    parallelize(model, list(model), [], mesh, torch.bfloat16, Model(path=""), settings)
    return model, gathering_strategy(settings, mesh)


def step(model: nn.Module, strategy: str) -> list[torch.Tensor]:
    """Return the summed gradients of MICRO_BATCHES micro-batches."""
    generator = torch.Generator().manual_seed(1)
    for number in range(1, MICRO_BATCHES + 1):
        before_micro_batch(model, strategy, number == MICRO_BATCHES)
        model(torch.randn(7, SIZE, generator=generator).to(torch.bfloat16)).float().square().sum().backward()
    gradients = [parameter.grad.to_local().clone() for parameter in model.parameters()]
    model.zero_grad()
    return gradients


def test_model_copy_has_as_many_ranks_as_shards(monkeypatch) -> None:
    def fake_mesh(device: str, shape: tuple[int, ...], mesh_dim_names: tuple[str, ...]) -> SimpleNamespace:
        return SimpleNamespace(sizes=dict(zip(mesh_dim_names, shape, strict=True)), get_all_groups=list)

    monkeypatch.setattr(sharding, "init_device_mesh", fake_mesh)
    assert make_mesh("cpu", 8, Sharding(strategy="hybrid", shard_size=4)).sizes == {"replicate": 2, "shard": 4}


@pytest.mark.parametrize("strategy, casts", [("full", 1), ("grad_op", 1), ("hybrid", 2 * MICRO_BATCHES)])
def test_weights_are_cast_once_per_step(strategy, casts) -> None:
    """`hybrid` frees the cast weights after each use, so it casts for each forward and each backward."""
    model, effective = sharded(strategy)
    step(model, effective)
    counts = []
    with OperatorHook(lambda *seen: counts.append(cast_elements(*seen))):
        step(model, effective)
    assert sum(counts) == casts * WEIGHTS
    assert all(parameter.device_mesh.size() == 1 for parameter in model.parameters())  # shards again after the step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_without_fsdp_to_the_bit(dtype) -> None:
    """The gradient of each micro-batch is bf16, and the sum has the dtype of the weights."""
    model, effective = sharded("full", dtype)
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


@pytest.mark.parametrize("family", ["olmo2", "ernie4_5"])
def test_bf16_loss_with_fp32_rope_equals_unsharded(tmp_path, family) -> None:
    path, cpu, settings = str(write_tiny_model(tmp_path / "model", family)), torch.device("cpu"), Sharding()
    config = read_model_config(path)
    model, mesh = build_on_meta(config), make_mesh("cpu", 1, settings)
    layers = decoder_layers(model)
    parallelize(model, layers, model.extra_fsdp_units(), mesh, torch.bfloat16, Model(path), settings)
    load_weights(model, path, cpu)
    batch = collate((0, 1), documents([200, 50]))
    plain = load_for_evaluation(config, path, torch.bfloat16, cpu)
    assert loss_of(model, batch).item() == loss_of(plain, batch).item()


def test_frozen_model_equals_unsharded(tmp_path) -> None:
    """The frozen teacher of a distillation."""
    path, cpu, settings = str(write_tiny_model(tmp_path / "model")), torch.device("cpu"), Sharding()
    config = read_model_config(path)
    model = build_on_meta(config).requires_grad_(False)
    mesh, units = make_mesh("cpu", 1, settings), model.extra_fsdp_units()
    parallelize(model, decoder_layers(model), units, mesh, torch.float32, Model(path), settings)
    load_weights(model, path, cpu)
    batch = collate((0, 1), documents([200, 50]))
    plain = load_for_evaluation(config, path, torch.float32, cpu)
    with torch.no_grad():
        assert loss_of(model, batch).item() == loss_of(plain, batch).item()
