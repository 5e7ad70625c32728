"""train.py on weighted targets, some of weight 0, on 2 gloo processes, packed and not, against a plain loop over transformers.

Without packing a step has 6 rows: 3 micro-batches on each rank. tests/test_reference_loop.py has weights on 1 rank.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from data.batches import plan_training
from tests.distributed.launch import largest_difference, launch, relative_difference, rows, run_of, weights
from tests.in_memory import weighted
from tests.tiny import write_chat_file, write_tiny_model

WEIGHTS = (0.0, 0.25, 1.0, 3.0)  # as in train_worker.py
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_tiny_model(folder / "model")
    write_chat_file(folder / "train.jsonl", 1)  # must exist, but the worker trains on other data
    (folder / "config.py").write_text(f"""
from configs.config import *
config = Config(
    model=Model({str(folder / "model")!r}, compute_dtype="fp32"),
    data=Data(({str(folder / "train.jsonl")!r},), sequence_length=96, packing=False, cache=None),
    batch=Batch(global_examples=6, micro_batch=1),
    optimizer=Optimizer(1e-3, epochs=1, warmup_steps=0),
    run=Run("base", directory={str(folder / "runs")!r}),
)
""")
    runs = [
        run_of(folder, "alone", plant="weighted"),
        run_of(folder, "packed", "data.packing=True", plant="weighted"),
        run_of(folder, "count", plant="weighted_by_count"),
    ]
    launch(folder, "two", 2, runs)
    return folder


@pytest.fixture(scope="module")
def reference(folder) -> tuple[float, float]:
    """Loss and gradient norm of the first step: sum of w nll over sum of w, one document after the other."""
    source = weighted(WEIGHTS)
    items = plan_training(source, 1, 0, global_examples=6).batch(0).items
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager", dtype=torch.float32)
    total, divisor = torch.zeros(()), 0.0
    for ids, factors in (map(torch.from_numpy, source.get(item)) for item in items):
        nll = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total, divisor = total + (factors[1:] * nll).sum(), divisor + factors.double().sum().item()
    (total / divisor).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return total.item() / divisor, norm.item()


@pytest.mark.parametrize("name", ["alone", "packed"])
def test_a_weighted_step_equals_the_plain_loop(folder, reference, name) -> None:
    first = rows(folder / "runs" / name)[1]
    assert first["train/loss"] == pytest.approx(reference[0], rel=1e-6)
    assert first["train/grad_norm"] == pytest.approx(reference[1], rel=1e-5)


def test_weighted_updates_do_not_depend_on_packing(folder) -> None:
    one, other = folder / "runs" / "alone", folder / "runs" / "packed"
    assert len(rows(one)) == 3
    assert largest_difference(weights(one), weights(other)) < 1e-5
    for key in ("train/loss", "train/grad_norm"):
        assert relative_difference(rows(one), rows(other), key) < 1e-5


def test_dividing_by_the_number_of_targets_is_detected(folder, reference) -> None:
    first = rows(folder / "runs" / "count")[1]
    assert abs(first["train/loss"] / reference[0] - 1) > 1e-2
    assert abs(first["train/grad_norm"] / reference[1] - 1) > 1e-2
