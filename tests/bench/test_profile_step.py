"""The profile of a step: every second is in one category, and none of the important categories is empty."""

import argparse

import pytest
import torch
import torch.distributed as dist

from bench import profile_step
from distributed.process_group import Ranks
from tests.tiny import write_tiny_model


@pytest.fixture
def ranks():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_categories_add_up_to_the_step(tmp_path, ranks, dtype) -> None:
    arguments = argparse.Namespace(
        model=str(write_tiny_model(tmp_path / "model")),
        **{"tokens": 500, "micro_batches": 2, "strategy": "full", "memory": "16N"},
        **{"dtype": dtype, "compile": False, "reduce_dtype": "fp32"},
    )
    run, flops = profile_step.prepare(arguments, ranks)
    assert sum(int(batch.input_ids.numel()) for batch in run.micro_batches) == 500 and flops > 0
    assert sum(batch.target_ids.numel() for batch in run.micro_batches) == run.targets
    run.step()
    found, seconds = profile_step.shares(run, steps=1)
    assert sum(found.values()) == pytest.approx(seconds)
    assert set(found) <= set(profile_step.ORDER)
    filled = {kind for kind, value in found.items() if value > 0}
    assert {"matrix products", "attention", "casts and copies", "elementwise", "loss", "optimizer"} <= filled


def test_documents_have_as_many_tokens_as_asked_for() -> None:
    documents = profile_step.random_documents(1234, vocabulary=50)
    assert documents.lengths.sum() == 1234 and max(documents.lengths) < 400
    assert documents.targets.sum() == pytest.approx(1234 / 3, rel=0.02)
