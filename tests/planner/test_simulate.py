"""A simulated step holds the bytes of a real one, and its figures follow from the shapes at any number of ranks."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from configs.config import LoRA
from planner.cluster import Cluster, Device
from planner.live_bytes import LiveBytes
from planner.memory import activations_of, device_memory
from planner.shape import named_config, shape_of, shape_of_run
from planner.simulate import Simulated, simulate
from planner.workload import Load
from tests.planner.real_steps import LENGTHS, Case, real_step

TOKENS = sum(LENGTHS)


def cluster(kind: str, ranks: int, nodes: int = 1) -> Cluster:
    return Cluster(Device("a device", kind, 80 * 2**30, 1e15, 3e12, 4e11), ranks, nodes)


def simulated(case: Case, kind: str = "cuda", ranks: int = 2, micro_batches: int = 2) -> Simulated:
    return simulate(case.shape, case.config, cluster(kind, ranks), Load(LENGTHS, TOKENS), micro_batches)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(checkpointing="full", tied=True, memory="14N"),
        Case("grad_op", checkpointing="selective"),
        Case("none", memory="12N"),
        Case("hybrid", checkpointing="full"),
    ],
    ids=str,
)
def test_a_simulated_step_holds_the_bytes_of_a_real_one(case) -> None:
    """Its peak is that of torch's own record of the allocations of a real step, but for the ids of the micro-batch."""
    expected, found = real_step(case, 4), simulated(case, "cpu", 4)
    assert found.parameters == expected["parameters"]
    assert found.optimizer == expected["optimizer"]
    if case.memory != "12N":  # at the peak, the sums of the first micro-batch are not yet gradients in bf16
        assert found.gradients == expected["gradients"]
    if case.checkpointing == "none":
        assert found.saved_activations == pytest.approx(expected["saved"], rel=0.005)
    assert found.peak == pytest.approx(expected["peak"], rel=1e-3)
    parts = dataclasses.asdict(found)
    names = ("parameters", "gradients", "gathered", "activations", "optimizer", "reduction", "logits")
    assert found.peak == sum(parts[name] for name in names)
    assert found.host == 0


def test_checkpointing_keeps_the_inputs_of_layers_and_offload_moves_them_to_the_host() -> None:
    """Exact, from two depths: a layer keeps its input, bf16 `(tokens, hidden size)`, and nothing else."""
    layer_input = TOKENS * 256 * 2
    full = [simulated(Case(checkpointing="full", layers=layers), micro_batches=1) for layers in (2, 4)]
    assert full[1].saved_activations - full[0].saved_activations == 2 * layer_input
    offload = [simulated(Case(checkpointing="offload", layers=layers), micro_batches=1) for layers in (2, 4)]
    assert offload[1].saved_activations == offload[0].saved_activations
    assert full[1].saved_activations - offload[1].saved_activations == 4 * layer_input
    assert layer_input <= offload[1].host <= 4 * layer_input  # at the peak; backward gives one after the other back


def test_a_step_with_lora_has_gradients_of_the_adapters_alone() -> None:
    """And its peak is that of the plan."""
    case = Case(checkpointing="full")
    config = dataclasses.replace(case.config, lora=LoRA(rank=8))
    shape, load = shape_of_run(config, case.shape.config), Load(LENGTHS, TOKENS)
    found, planned = (
        simulate(shape, config, cluster("cuda", 2), load),
        device_memory(shape, config, cluster("cuda", 2), load),
    )
    assert (found.parameters, found.gradients) == (planned.parameters, planned.gradients)
    assert 0 < found.gradients < 0.2 * simulated(case).gradients
    assert found.peak == pytest.approx(planned.tensors, rel=0.01)


def test_attention_is_that_of_the_cluster_s_device() -> None:
    """torch's varlen kernel keeps fp32 log-sum-exps; on a CPU matrix products keep probabilities of short documents."""
    cuda, cpu = (simulated(Case(), kind, micro_batches=1) for kind in ("cuda", "cpu"))
    assert cuda.saved_activations != cpu.saved_activations
    shape, config, load = Case().shape, Case().config, Load(LENGTHS, TOKENS)
    for kind, found in (("cuda", cuda), ("cpu", cpu)):
        expected = activations_of(shape, config, cluster(kind, 2), load.lengths).saved
        assert found.saved_activations == pytest.approx(expected, rel=0.01)


def test_a_single_gpu_gathers_unit_by_unit_and_a_single_cpu_keeps_its_copy() -> None:
    shape = Case().shape
    whole = 2 * shape.num_parameters
    assert simulated(Case(), "cuda", 1, 1).gathered < whole == simulated(Case(), "cpu", 1, 1).gathered


def test_offloaded_parameters_gradients_and_moments_are_in_host_memory() -> None:
    """The sharded tensors leave the device and nothing else does."""
    case = Case(memory="14N", cpu_offload=True)
    on_device, on_host = simulated(dataclasses.replace(case, cpu_offload=False)), simulated(case)
    assert (on_host.parameters, on_host.gradients, on_host.optimizer) == (0, 0, 0)
    assert on_host.host == on_device.parameters + on_device.gradients + on_device.optimizer
    assert on_host.peak == on_device.peak - on_host.host


def test_shards_of_many_ranks_and_gradients_of_the_first_micro_batch() -> None:
    """Rank 0 holds ceil(rows / 64) rows of each parameter; a step of one micro-batch has no gradients yet at its peak."""
    rows = sum(-(-one[0] // 64) * torch.Size(one[1:]).numel() for unit in Case().shape.units for one in unit.shapes)
    two, one = (simulated(Case(), "cuda", 64, micro_batches) for micro_batches in (2, 1))
    assert (two.parameters, two.gradients, two.optimizer) == (4 * rows, 4 * rows, 8 * rows)
    assert one.gradients == 0
    assert one.peak == pytest.approx(two.peak - two.gradients, abs=8)  # the loss of the first micro-batch


@pytest.mark.slow
@pytest.mark.parametrize("ranks, checkpointing", [(8, "none"), (64, "full")])
def test_both_engines_agree_on_a_model_of_a_billion_parameters(ranks, checkpointing) -> None:
    """Activations within 1%, the peak within 5%."""
    shape = shape_of("1B", named_config("1B"))
    case = Case(checkpointing=checkpointing)
    load = Load((4096,), 4096)
    found = simulate(shape, case.config, cluster("cuda", ranks, ranks // 8), load)
    computed = device_memory(shape, case.config, cluster("cuda", ranks, ranks // 8), load)
    saved = activations_of(shape, case.config, cluster("cuda", ranks), load.lengths).saved
    assert found.saved_activations == pytest.approx(saved, rel=0.01)
    assert found.peak == pytest.approx(computed.tensors, rel=0.05)


def test_a_simulation_leaves_nothing_behind_and_refuses_to_run_beside_a_process_group() -> None:
    resize = torch.UntypedStorage.resize_
    simulated(Case(layers=2), micro_batches=1)
    assert not dist.is_initialized()
    assert torch.UntypedStorage.resize_ is resize
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="already has one"):
            simulated(Case(layers=2))
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_live_bytes_counts_each_storage_once_while_it_lives() -> None:
    with LiveBytes() as live:
        first = torch.ones(1000)
        view = first[10:].view(-1, 2)
        del first
        assert live.now == {"activations": 4000}
        with live.making("gathered"):
            second = view + 1
        assert live.now == {"activations": 4000, "gathered": 3960}
        live.set_kind(second, "gradients")
        del view
        second.untyped_storage().resize_(0)
        third = torch.ones(10, dtype=torch.bfloat16)
    assert live.now == {"activations": 20, "gathered": 0, "gradients": 0}
    assert live.peak == {"activations": 4000, "gathered": 3960}
    live.ignore("gathered")
    assert live.total(live.peak) == 4000
    del third
