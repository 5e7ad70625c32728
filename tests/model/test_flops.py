"""The FLOPs that MFU is computed from, against torch's own counter."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.batches import collate
from model.flops import flops_per_unit, step_flops
from model.language_model import build_on_meta, load_weights, read_model_config
from tests.model.test_equivalence import documents
from tests.tiny import write_tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_matrix_products_are_counted_as_torch_counts_them(tmp_path, family) -> None:
    path = write_tiny_model(tmp_path / "model", family=family, tied=False)
    config = read_model_config(str(path))
    packed = build_on_meta(config)
    load_weights(packed, str(path), torch.device("cpu"))
    made = documents([30, 50])
    with FlopCounterMode(display=False) as counter:
        packed(collate((0, 1), made)).backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    products = sum(n for op, n in counted.items() if op in ("aten.mm", "aten.addmm", "aten.bmm"))
    per_token, per_target, per_pair = flops_per_unit(config)
    assert per_token * 80 + per_target * made.targets.sum() == products
    # Attention within each document, over its causal half.
    pairs = (30 * 31 + 50 * 51) / 2
    assert per_pair == 12 * 2 * 4 * 16
    assert step_flops(config, np.array([30, 50]), 10) == per_token * 80 + per_target * 10 + per_pair * pairs
