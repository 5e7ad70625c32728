"""Named machines: what a name finds. test_command.py has the sentences for one that is not known."""

import pytest

from model.flops import CUDA_BF16_PEAKS
from scripts.plan.machines import GIB, GPU_NAMES, cluster_of, found_device, generic_device, named_device


def test_every_name_is_a_gpu_with_speeds():
    for name in GPU_NAMES:
        device = named_device(name)
        assert (device.kind, device.name) == ("cuda", name)
        assert 20 * GIB < device.memory < 270 * GIB
        assert device.flops in CUDA_BF16_PEAKS.values()
        assert 0.3e12 <= device.bandwidth <= 8e12
        assert 25e9 <= device.link <= 900e9
        assert 25e9 <= device.host_link <= 180e9
        assert 0.5 < device.sustained < 0.9
        assert 0.15 <= device.attention <= device.sustained
        assert 12.5e9 <= device.network <= 800e9


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("a100 80", "A100-80"),
        ("NVIDIA GeForce RTX 5090", "RTX-5090"),
        ("H100-SXM", "H100"),
        ("AMD Instinct MI300X", "MI300X"),
        ("rtx pro 6000", "RTX-PRO-6000"),
    ],
)
def test_gpu_is_found_by_any_name(name: str, known: str):
    assert named_device(name).name == known


def test_generic_card_has_assumed_speeds():
    assert generic_device(80).memory == int(79.1 * GIB)
    assert generic_device(40).memory == named_device("A100-40").memory
    assert generic_device(24).memory == int(22.0 * GIB)
    assert generic_device(16).memory == int(0.92 * 16 * GIB)
    assert generic_device(80).flops == named_device("A100-80").flops
    assert generic_device(141).bandwidth == named_device("H200").bandwidth
    assert generic_device(180).flops == generic_device(400).flops == named_device("B200").flops


def test_gpu_of_a_process_keeps_its_memory():
    known = found_device("NVIDIA H100 80GB HBM3", 70 * GIB, 5e14)
    assert (known.memory, known.flops, known.link) == (70 * GIB, 989.5e12, 450e9)
    unknown = found_device("NVIDIA T1000", 8 * GIB, 1e13)
    assert (unknown.memory, unknown.flops, unknown.link) == (8 * GIB, 1e13, 25e9)
    assert unknown.bandwidth == pytest.approx(1555e9 / 31.2)
    assert cluster_of(4, 2, unknown).device == unknown


def test_network_belongs_to_a_whole_node():
    assert cluster_of(8, 1, "H100").network == 0
    assert cluster_of(16, 2, "H100").network == 400e9
    assert cluster_of(16, 2, "A100-80").network == cluster_of(16, 2, generic_device(80)).network == 200e9
    assert cluster_of(16, 2, "L40S").network == 12.5e9
    assert cluster_of(16, 2, "H100", 800).network == 100e9
    assert cluster_of(16, 2, "H100").per_node == 8
