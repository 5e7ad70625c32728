"""The FLOPs of MFU agree with torch's own counter, and the windows with the windows that the layers request."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.batches import collate
from model import flops, packed_attention
from model.architectures import read_model_config
from model.flops import Work, count_work, data_sheet_peak, document_costs, find_peak, layer_windows, step_flops
from model.language_model import build_on_meta
from tests.losses import loss_of
from tests.model.test_equivalence import documents, load
from tests.tiny import write_tiny_model


# A family for each kind of attention, of MLP and of experts.
@pytest.mark.parametrize("family", ["llama_biased", "gemma2", "cohere2", "phi3", "qwen2_moe", "gpt_oss", "starcoder2"])
def test_flops_and_windows_agree_with_torch(tmp_path, monkeypatch, family) -> None:
    path = write_tiny_model(tmp_path / "model", family=family, tied=False)
    config = read_model_config(str(path))
    calls, attend = [], packed_attention._document

    def recorded(q, k, v, settings) -> torch.Tensor:
        calls.append((settings.window, q.shape[1] * q.shape[3]))
        return attend(q, k, v, settings)

    monkeypatch.setattr(packed_attention, "_document", recorded)
    packed = load(path)
    source = documents([30, 50])
    with FlopCounterMode(display=False) as counter:
        loss_of(packed, collate((0, 1), source))
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    work = count_work(build_on_meta(config), config)
    # Only forward ran, a third of the layers' FLOPs. The head computes all but the gradient of its weight in forward.
    expected = work.per_token / 3 * 80 + work.per_target * source.targets.sum() * 2 / 3
    # torch counts no grouped products: of 6 experts each token has 2, whose matrices have 3 x 64 x 32 elements.
    expected -= 2 * 2 * 3 * 64 * 32 * 80 * sum(p.dim() == 3 for p in packed.parameters()) / 2
    assert sum(n for op, n in counted.items() if op in ("aten.mm", "aten.addmm")) == expected
    windows = [(window, work.per_pair / 12) for window in layer_windows(config)]
    assert calls[::2] == windows  # every layer attends to two documents
    assert sum(layers for _, layers in work.windows) == 2


def test_only_pairs_within_the_window_count() -> None:
    work = Work(per_token=1e9, per_target=1e6, per_pair=1.0, windows=((None, 3), (4, 2)))
    pairs = sum(3 * (i + 1) + 2 * min(i + 1, 4) for n in (3, 4, 9) for i in range(n))
    assert step_flops(work, [3, 4, 9], 10) == 16e9 + 10e6 + pairs
    assert step_flops(work, [], 0) == 0.0


def test_costs_are_integers_in_proportion_to_flops(monkeypatch) -> None:
    work = Work(per_token=6e9, per_target=1e9, per_pair=400_000.0, windows=((None, 30), (512, 6)))
    lengths, targets = np.array([10, 1000, 30_000]), np.array([0, 500, 3])
    expected = np.array([step_flops(work, [n], t) for n, t in zip(lengths, targets, strict=True)])
    costs = work.costs(lengths, targets)
    assert costs.dtype == np.int64 and costs / costs[0] == pytest.approx(expected / expected[0], rel=1e-4)
    attention = expected - 6e9 * lengths - 1e9 * targets
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    weighed = document_costs(work)(lengths, targets)
    assert weighed / costs == pytest.approx((expected + 2 * attention) / expected, rel=1e-4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert document_costs(work)(lengths, targets).tolist() == costs.tolist()
    # A step of 64 documents of a million tokens on a 70B model: no sum overflows.
    huge = Work(per_token=4.2e11, per_target=6.3e9, per_pair=12.0 * 64 * 128, windows=((None, 80),))
    assert 0 < huge.costs(np.full(64, 10**6), np.full(64, 10**6), 3).sum() < 2**62


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181.05e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("A100-SXM4-40GB", 312e12),  # as drivers before 470 name it
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-32GB", None),  # has no bf16
    ],
)
def test_data_sheet_belongs_to_exactly_one_name(name, peak) -> None:
    assert data_sheet_peak(name) == peak


def test_unknown_gpu_is_measured(monkeypatch) -> None:
    monkeypatch.setattr(flops, "measured_flops", lambda *arguments: 5e12)
    monkeypatch.setattr(flops, "barrier", lambda ranks: None)
    monkeypatch.setattr(flops, "gather_objects", lambda value, ranks: [value, value])  # of two ranks
    for name, peak, source in (
        ("NVIDIA L40", 181.05e12, "data sheet of NVIDIA L40, dense bf16"),
        (
            "NVIDIA RTX A1000",
            5e12,
            "measured: 8192 x 8192 product in bfloat16, as no data sheet figure of NVIDIA RTX A1000 is known",
        ),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        ranks = SimpleNamespace(device=torch.device("cuda"))
        measured = find_peak(torch.bfloat16, ranks)
        assert (measured.flops, measured.source, measured.dtype) == (2 * peak, source, torch.bfloat16)
