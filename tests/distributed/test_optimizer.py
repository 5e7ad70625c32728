"""All values of optimizer.memory: AdamW's arithmetic, stochastic rounding, skipped steps, bytes, sharding, resume.

This file is also its own worker on 2 ranks (the last lines), which compare the update to that of 1 rank, given the same
gradients.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from common.errors import UserError
from distributed import low_memory as module
from distributed.checkpoint import Saver
from distributed.gradients import bytes_per_parameter, clip_gradients
from distributed.low_memory import make_code_maps
from distributed.optimizer import adamw, check_memory, parameter_dtype
from distributed.process_group import Ranks
from distributed.rounding import Noise, stochastic_round_
from distributed.sharding import local_shard
from tests.processes import ROOT, run_ranks

FORMS = ("16N", "14N", "12N", "8N", "6N")
BF16 = torch.bfloat16


def settings(memory: str, **changes) -> SimpleNamespace:
    values = {"memory": memory, "learning_rate": 2e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    return SimpleNamespace(**values | changes)


def gradient_dtype(memory: str) -> torch.dtype:
    return torch.float32 if memory in ("16N", "14N") else BF16


def some_parameters(memory: str, shapes=((33, 64), (64,), (5, 96), (7, 2, 32), (3, 10))) -> dict[str, nn.Parameter]:
    """Matrices that split into blocks of 64 and 96, a vector, a 3-d tensor, and a matrix whose rows (10) have no block size."""
    generator = torch.Generator().manual_seed(3)
    made = {f"p{i}": torch.randn(shape, generator=generator) * 0.02 for i, shape in enumerate(shapes)}
    return {name: nn.Parameter(value.to(BF16).to(parameter_dtype(memory))) for name, value in made.items()}


def take_step(parameters: dict, optimizer: torch.optim.Optimizer, step: int, memory: str) -> None:
    """One optimizer step as in the training loop, with gradients that depend only on `step`."""
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        grad = torch.randn(parameter.shape, generator=generator) * 1e-3
        grad = grad.to(gradient_dtype(memory))
        if isinstance(parameter, DTensor):
            grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
        parameter.grad = grad
    for group in optimizer.param_groups:
        group["noise_step"] = step
    optimizer.step()


def everything(parameters: dict, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of the weights, moments and step counts, gathered from all ranks."""
    found = {f"weight.{name}": p.detach() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        found |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in found.items()}


def assert_same_bits(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert not different


# --- Rounding and its noise ---


def test_a_weight_moves_at_a_learning_rate_of_1e_6(monkeypatch) -> None:
    def mean_move() -> float:
        weight = nn.Parameter(torch.ones(200, 500, dtype=BF16))
        optimizer = adamw({"w": weight}, settings("12N", learning_rate=1e-6, weight_decay=0.0), seed=0)
        for step in range(200):
            weight.grad = torch.full_like(weight, 0.01)
            optimizer.param_groups[0]["noise_step"] = step
            optimizer.step()
        return (1 - weight.detach().double()).mean().item() / (200 * 1e-6)

    # Below 1.0, bf16 numbers are 2^-8 apart. A step of 1e-6 moves a weight with probability 2.6e-4; over 20 million
    # tries the relative standard deviation of the mean is 1.4%.
    assert mean_move() == pytest.approx(1.0, abs=0.05)
    monkeypatch.setattr(module, "stochastic_round_", lambda value, *_: value)  # copy_ then rounds to nearest
    assert mean_move() == 0.0


def drift(memory: str) -> torch.Tensor:
    """How far 32,768 weights move in 318 steps at 2e-5, with gradients of many sizes whose noise is twice their mean."""
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(128, 256, generator=generator) * 0.02).to(BF16)
    size = 1e-4 * 10 ** (-3 * torch.rand(128, 256, generator=generator))
    sign = torch.randn(128, 256, generator=generator).sign()
    weight = nn.Parameter(start.to(parameter_dtype(memory), copy=True))
    optimizer = adamw({"w": weight}, settings(memory), seed=1)
    for step in range(318):
        grad = size * (0.5 * sign + torch.randn(128, 256, generator=generator))
        weight.grad = grad.to(gradient_dtype(memory))
        optimizer.param_groups[0]["noise_step"] = step
        optimizer.step()
    return weight.detach().double() - start.double()


@pytest.mark.slow
def test_bf16_weights_drift_as_far_as_fp32_weights(monkeypatch) -> None:
    exact = drift("16N")

    def share(moved: torch.Tensor) -> float:
        return ((moved * exact).sum() / exact.square().sum()).item()

    assert share(drift("14N")) == pytest.approx(1.0, abs=0.01)
    assert share(drift("12N")) == pytest.approx(1.0, abs=0.01)
    assert share(drift("6N")) == pytest.approx(1.0, abs=0.03)  # the error of 8-bit moments
    monkeypatch.setattr(module, "stochastic_round_", lambda value, *_: value)
    assert share(drift("12N")) < 0.5


def test_bf16_moments_decay_although_a_step_is_below_half_a_gap() -> None:
    """With beta2 = 0.999, exp_avg_sq shrinks by a quarter of half the gap: rounding to nearest would leave it unchanged."""
    weight = nn.Parameter(torch.zeros(256, 256, dtype=BF16))
    optimizer = adamw({"w": weight}, settings("8N", betas=(0.9, 0.999)), seed=0)
    moment = optimizer.state[weight]["exp_avg_sq"]
    moment.fill_(1.0)
    for step in range(100):
        weight.grad = torch.zeros_like(weight)
        optimizer.param_groups[0]["noise_step"] = step
        optimizer.step()
    assert moment.double().mean().item() == pytest.approx(0.999**100, rel=2e-3)


def test_the_noise_is_uniform_and_depends_on_element_step_tensor_and_seed() -> None:
    count, cpu = 2**18, torch.device("cpu")
    base = Noise(0, 0, cpu).bits(0, 0, count)
    assert base.dtype == torch.int32 and base.min() >= 0 and base.max() < 2**16
    # The standard deviation of the mean of 2^18 uniform numbers is 37.
    assert base.double().mean().item() == pytest.approx(32767.5, abs=185)
    assert base.double().var().item() == pytest.approx(2**32 / 12, rel=0.01)
    assert torch.bincount(base >> 8, minlength=256).double().sub(1024).abs().max() < 5 * 32  # 5 standard deviations
    for bit in range(16):
        assert ((base >> bit) & 1).double().mean().item() == pytest.approx(0.5, abs=0.005)

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return abs(torch.corrcoef(torch.stack([a, b]).double())[0, 1].item())

    for lag in (1, 2, 3, 16, 576, 4095, 4096, 4097, 8192, 40960):  # a row has 4,096 elements
        assert correlation(base[:-lag], base[lag:]) < 0.01
    others = {
        "step": Noise(0, 1, cpu).bits(0, 0, count),
        "tensor": Noise(0, 0, cpu).bits(1, 0, count),
        "negative stream": Noise(0, 0, cpu).bits(-1, 0, count),
        "seed": Noise(1, 0, cpu).bits(0, 0, count),
        "step and tensor": Noise(0, 1, cpu).bits(1, 0, count),
        "elements after 2^24": Noise(0, 0, cpu).bits(0, 2**24, count),
        "elements after 2^31": Noise(0, 0, cpu).bits(0, 2**31, count),
    }
    for other in others.values():
        assert correlation(base, other) < 0.01
    assert (
        len({tuple(Noise(s, n, cpu).bits(t, 0, 4).tolist()) for s in range(8) for t in range(8) for n in range(8)})
        == 512
    )


def test_sums_of_rounding_errors_spread_as_those_of_independent_noise() -> None:
    """Over rows, columns and everything, in 400 steps: the noise of elements in one column or row is uncorrelated."""
    sums = []
    for step in range(400):
        bits = Noise(7, step, torch.device("cpu")).bits(0, 0, 64 * 4096).double().view(64, 4096) - 32767.5
        sums.append(
            torch.stack([bits[:, 5].sum() / 8, bits[9].sum() / 64, bits.sum() / 512, (bits[3] * bits[4]).sum()])
        )
    found = torch.stack(sums)
    deviation = 2**16 / 12**0.5
    # The relative standard deviation of a variance of 400 numbers is 7%.
    torch.testing.assert_close(found[:, :3].std(0) / deviation, torch.ones(3).double(), rtol=0.12, atol=0)
    assert abs(found[:, 3].mean()) / deviation**2 / 64 < 4 / 400**0.5  # no correlation of two rows


def test_the_noise_of_an_element_does_not_depend_on_the_split() -> None:
    noise = Noise(5, 7, torch.device("cpu"))
    whole = noise.bits(6, 0, 20_000).clone()
    for first, last in ((0, 1), (1, 2), (1, 1000), (333, 778), (4095, 4097), (4096, 12288), (5000, 19_998)):
        assert torch.equal(noise.bits(6, first, last - first), whole[first:last])
    far = 2**32 - 5000  # the factors change at multiples of 2^24
    whole = noise.bits(6, far, 12_000).clone()
    assert torch.equal(noise.bits(6, far + 3, 20), whole[3:23])
    assert torch.equal(noise.bits(6, far + 4990, 5000), whole[4990:9990])


def test_stochastic_rounding_keeps_bf16_values_and_rounds_others_to_a_neighbour() -> None:
    noise = Noise(0, 0, torch.device("cpu"))
    exact = torch.randn(10_000).to(BF16).float()
    exact[:4] = torch.tensor([0.0, -0.0, float("inf"), -3.0e38])
    exact = exact.to(BF16).float()
    assert torch.equal(stochastic_round_(exact.clone(), noise, 0, 1).view(torch.int32), exact.view(torch.int32))
    value = torch.full((100_000,), -(1 + 0.3 * 2**-7))
    rounded = stochastic_round_(value.clone(), noise, 0, 0)
    assert set(rounded.unique().tolist()) == {-1.0, -(1 + 2**-7)}
    assert (rounded != -1.0).double().mean().item() == pytest.approx(0.3, abs=0.01)


# --- The update ---


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.4, 0.999)])
def test_before_rounding_the_update_is_that_of_torch_adamw_to_the_bit(betas, monkeypatch) -> None:
    unrounded = {}

    def record(value: torch.Tensor, noise: Noise, stream: int, first: int) -> torch.Tensor:
        unrounded[first] = value.clone()
        return value

    monkeypatch.setattr(module, "stochastic_round_", record)
    monkeypatch.setitem(module.CHUNK, "cpu", 1000)  # several chunks; the last is smaller
    weight = nn.Parameter(torch.randn(50, 64).to(BF16))
    twin = nn.Parameter(weight.detach().float())
    options = {"learning_rate": 1e-3, "betas": betas, "weight_decay": 0.5}
    ours = adamw({"w": weight}, settings("14N", **options), seed=0)
    theirs = adamw({"w": twin}, settings("16N", **options), seed=0)
    for step in range(5):
        twin.grad = torch.randn(50, 64) * 10 ** torch.randint(-9, 1, (50, 1)).float()  # small enough that eps matters
        weight.grad = twin.grad.clone() * 3
        twin.grad = weight.grad.clone()
        twin.data.copy_(weight.data)  # start each step from equal weights, so that rounding does not accumulate
        for group in [*ours.param_groups, *theirs.param_groups]:
            group["noise_step"], group["lr"] = step, 1e-3 * (step + 1)
        before = weight.grad.clone()
        ours.step()
        assert torch.equal(weight.grad, before)
        theirs.step()
        moved = torch.cat([unrounded[first] for first in sorted(unrounded)]).view(50, 64)
        assert len(unrounded) == 4 and torch.equal(moved, twin)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(ours.state[weight][key], theirs.state[twin][key])
        unrounded.clear()


@pytest.mark.parametrize("memory", ["12N", "8N", "6N"])
def test_an_element_gets_the_same_bits_wherever_a_shard_ends(memory) -> None:
    """The first rows alone, as on a rank that has only these. A row of 10 does not fill registers, one of 96 does."""
    for columns in (10, 96, 33):
        states = []
        for rows in (40, 7):
            generator = torch.Generator().manual_seed(0)
            weight = nn.Parameter(torch.randn(40, columns, generator=generator)[:rows].to(BF16))
            optimizer = adamw({"w": weight}, settings(memory, learning_rate=1e-3), seed=0)
            for step in range(6):
                weight.grad = (torch.randn(40, columns, generator=generator)[:rows] * 1e-3).to(BF16)
                optimizer.param_groups[0]["noise_step"] = step
                optimizer.step()
            states.append({key: value[:7] for key, value in optimizer.state[weight].items() if key != "step"})
            states[-1]["weight"] = weight.detach()[:7]
        assert_same_bits(*states)


def test_weight_decay_applies_to_matrices_and_not_to_vectors() -> None:
    parameters = {"m": nn.Parameter(torch.ones(4, 64, dtype=BF16)), "v": nn.Parameter(torch.ones(64, dtype=BF16))}
    optimizer = adamw(parameters, settings("12N", learning_rate=0.5, weight_decay=0.5), seed=0)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["noise_step"] = 0
    optimizer.step()
    assert torch.equal(parameters["m"].detach(), torch.full((4, 64), 0.75, dtype=BF16))
    assert torch.equal(parameters["v"].detach(), torch.ones(64, dtype=BF16))


def test_every_update_has_its_own_noise_and_a_number_of_the_host_counts_it() -> None:
    parameters = some_parameters("12N")
    optimizer = adamw(parameters, settings("12N"), seed=0)
    for _ in range(3):
        optimizer.step()
    assert [group["noise_step"] for group in optimizer.param_groups] == [3] * len(optimizer.param_groups)


# --- Memory ---


@pytest.mark.parametrize(
    ("memory", "total"), [("16N", 16), ("14N", 14), ("12N", 12), ("8N", 8), ("6N", 6 + 2 * 4 / 192)]
)
def test_a_matrix_takes_as_many_bytes_as_the_name_says(memory, total) -> None:
    parameters = some_parameters(memory, shapes=((10, 576), (20, 192)))
    optimizer = adamw(parameters, settings(memory), seed=0)
    take_step(parameters, optimizer, 0, memory)
    measured = bytes_per_parameter(optimizer)
    assert measured["total"] == pytest.approx(total, abs=1e-12)
    assert measured["total"] == sum(measured[part] for part in ("weights", "gradients", "moments"))
    assert measured["gradients"] == (4 if memory in ("16N", "14N") else 2)
    optimizer.zero_grad()
    assert (
        bytes_per_parameter(optimizer) == measured
    )  # a gradient that is not there will have the dtype of its parameter


def test_8_bit_moments_are_close_to_fp32_even_for_tiny_squares() -> None:
    """Gradients of 1e-7: their squares are below 1e-12, the smallest scale of torchao."""
    weight, twin = (nn.Parameter(torch.zeros(16, 256, dtype=BF16)) for _ in range(2))
    small, exact = (adamw({"w": p}, settings(m), 0) for p, m in ((weight, "6N"), (twin, "12N")))
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        grad = (torch.randn(16, 256, generator=generator) * 1e-7).to(BF16)
        for parameter, optimizer in ((weight, small), (twin, exact)):
            parameter.grad = grad.clone()
            optimizer.param_groups[0]["noise_step"] = step
            optimizer.step()
    state = small.state[weight]
    root = small.code_maps["exp_avg_sq"].values[state["exp_avg_sq_codes"].int()] * state["exp_avg_sq_scale"]
    torch.testing.assert_close(root, exact.state[twin]["exp_avg_sq"].sqrt(), rtol=0.1, atol=1e-9)


def test_the_code_of_a_number_is_that_of_the_nearest_value() -> None:
    numbers = torch.rand(10**5, generator=torch.Generator().manual_seed(0)) ** torch.arange(10**5).remainder(30).add(1)
    for key, code_map in make_code_maps(torch.device("cpu")).items():
        midpoints = (code_map.values[1:] + code_map.values[:-1]) / 2
        edges = [midpoints, midpoints.nextafter(torch.tensor(2.0)), midpoints.nextafter(torch.tensor(-2.0))]
        signed = [numbers, -numbers] if key == "exp_avg" else [numbers]
        tried = torch.cat([*edges, *signed, torch.tensor([0.0, -0.0, 1.0, -1.0])])
        codes = code_map.encode(tried.clone())
        assert codes.dtype == torch.uint8
        assert torch.equal(codes.long(), torch.bucketize(tried, midpoints, right=True))


def test_6n_needs_torchao_and_14n_needs_grad_dtype(monkeypatch) -> None:
    for memory in ("16N", "14N", "12N", "8N", "6N"):
        check_memory(memory)
    monkeypatch.setitem(sys.modules, "torchao.optim.quant_utils", None)
    with pytest.raises(UserError, match="6N.*pip install torchao"):
        check_memory("6N")
    monkeypatch.setattr(torch, "Tensor", object)  # an older torch, without Tensor.grad_dtype
    with pytest.raises(UserError, match="14N.*choose 12N or 16N"):
        check_memory("14N")


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_clipping_scales_all_gradients_to_the_norm_and_leaves_smaller_ones(dtype) -> None:
    exact = torch.randn(100_000, dtype=torch.float64).to(dtype)
    parameter = nn.Parameter(torch.zeros(100_000, dtype=dtype))
    parameter.grad = exact.clone()
    clip_gradients([parameter], 1.0, 0.9)
    assert torch.equal(parameter.grad, exact)
    clip_gradients([parameter], 1.0, 1.7)
    assert torch.equal(parameter.grad, (exact.float() / 1.7).to(dtype))  # the factor itself is not rounded to bf16


# --- Sharded ---


def sharded(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for name, p in parameters.items()}


@pytest.mark.parametrize("memory", FORMS)
def test_a_checkpoint_resumes_bitwise_and_not_with_another_memory(memory, tmp_path, ranks) -> None:
    parameters = sharded(some_parameters(memory))
    optimizer = adamw(parameters, settings(memory, learning_rate=1e-3), seed=0)
    for step in range(3):
        take_step(parameters, optimizer, step, memory)
    Saver(tmp_path, parameters, optimizer, ranks).save({"step": 3})
    resumed = sharded({name: nn.Parameter(torch.zeros_like(p)) for name, p in some_parameters(memory).items()})
    other = adamw(resumed, settings(memory, learning_rate=1e-3), seed=0)
    Saver(tmp_path, resumed, other, ranks).load(tmp_path / "step-000003")
    assert_same_bits(everything(resumed, other), everything(parameters, optimizer))
    for step in range(3, 5):
        take_step(parameters, optimizer, step, memory)
        take_step(resumed, other, step, memory)
    assert_same_bits(everything(resumed, other), everything(parameters, optimizer))
    for form in FORMS:
        if {form, memory} == {"14N", "12N"} or form == memory:
            continue  # these two differ only in their gradients, which are not in a checkpoint
        strangers = sharded(some_parameters(form))
        with pytest.raises(
            UserError, match=r"does not fit this run: .* optimizer.memory and register\(\) of the checkpoint"
        ):
            Saver(tmp_path, strangers, adamw(strangers, settings(form), 0), ranks).load(tmp_path / "step-000003")


def test_14n_accumulates_micro_batches_in_fp32_with_fsdp(ranks) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=False, dtype=BF16)
    fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32))
    parameters = dict(layer.named_parameters())
    optimizer = adamw(parameters, settings("14N"), seed=0)
    for _ in range(2):  # the second time after zero_grad
        exact = torch.zeros(32, 64)
        for _ in range(8):
            inputs = torch.randn(4, 64, dtype=BF16)
            layer(inputs).sum().backward()
            exact += (torch.ones(32, 4, dtype=BF16) @ inputs).float()
        gradient = parameters["weight"].grad.full_tensor()
        assert gradient.dtype == torch.float32 and torch.equal(gradient, exact)
        assert not torch.equal(gradient, gradient.to(BF16).float())
        optimizer.zero_grad()


def work(out: Path, name: str) -> None:
    """Four steps with 12N and with 6N. Every rank writes the state and its first rows; a checkpoint."""
    for memory in ("12N", "6N"):
        parameters = sharded(some_parameters(memory))
        optimizer = adamw(parameters, settings(memory, learning_rate=1e-3), seed=4)
        for step in range(4):
            take_step(parameters, optimizer, step, memory)
        rows = [local_shard(p)[1] for p in parameters.values()]
        found = everything(parameters, optimizer)
        torch.save((found, rows), out / f"{name}.{memory}.rank{dist.get_rank()}.pt")
        me = Ranks(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"), dist.group.WORLD)
        Saver(out / f"{name}.{memory}", parameters, optimizer, me).save({"step": 4})
    # HSDP with all ranks on one node: a rank has the same rows.
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()))
    hybrid = [distribute_tensor(p.detach(), mesh, [Replicate(), Shard(0)]) for p in some_parameters("12N").values()]
    assert [local_shard(p)[1] for p in hybrid] == rows


@pytest.mark.slow
def test_one_and_two_ranks_give_the_same_bits(tmp_path, ranks) -> None:
    done = run_ranks(2, __file__, tmp_path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    work(tmp_path, "one")
    for memory in ("12N", "6N"):
        alone, first_rows = torch.load(tmp_path / f"one.{memory}.rank0.pt")
        assert first_rows == [0, 0, 0, 0, 0]
        for rank, expected in ((0, [0, 0, 0, 0, 0]), (1, [17, 32, 3, 4, 2])):
            shared, first_rows = torch.load(tmp_path / f"two.{memory}.rank{rank}.pt")
            assert first_rows == expected
            assert_same_bits(shared, alone)
        resumed = sharded(some_parameters(memory))
        optimizer = adamw(resumed, settings(memory), seed=4)
        Saver(tmp_path, resumed, optimizer, ranks).load(tmp_path / f"two.{memory}" / "step-000004")
        assert_same_bits(everything(resumed, optimizer), alone)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    work(Path(sys.argv[1]), "two")
    dist.destroy_process_group()
