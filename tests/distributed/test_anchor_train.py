"""train.py with an anchored source on 1 and 2 gloo processes: ranks, stop and resume, more steps, what is refused, less KL."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed.launch import largest_difference, launch, relative_difference, rows, run_of, weights
from tests.tiny import SENTENCES, write_chat_file, write_tiny_model
from training.anchor import ROW

pytestmark = pytest.mark.slow
STEPS = 6
WEIGHT = 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("anchor_train")
    write_tiny_model(folder / "model")
    write_chat_file(folder / "train.jsonl", 12, seed=0)
    texts = [sentence[10 * i :] for i in range(6) for sentence in SENTENCES]
    (folder / "base.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "config.py").write_text(f"""
from configs.config import *
here = {str(folder)!r}
config = Config(
    model=Model(here + "/model", compute_dtype="fp32"),
    data=Data(
        (here + "/train.jsonl",),
        mix=(Source("base", (here + "/base.jsonl",), 0.4, anchor=True),),
        sequence_length=256,
        cache=here + "/tokens",
    ),
    batch=Batch(global_examples=2, micro_batch=1),
    optimizer=Optimizer(3e-3, epochs=1, warmup_steps=0),
    forgetting=Forgetting(anchor_weight={WEIGHT}),
    run=Run("base", directory=here + "/runs", save_every=2, keep_last=9),
)
""")
    return folder


@pytest.fixture(scope="module")
def two(folder) -> Path:
    replay = (f"data.mix=base:0.4:{folder}/base.jsonl", "forgetting.anchor_weight=1")
    again = ("run.resume=changed", "forgetting.anchor_weight=2")
    launch(
        folder,
        "two",
        2,
        [
            run_of(folder, "r2", "run.eval_general=True"),
            run_of(folder, "replay", *replay, "run.eval_general=True"),
            run_of(folder, "short", "optimizer.max_steps=2"),
        ],
    )
    runs = folder / "runs"
    for name in ("longer", "damaged", "other"):
        shutil.copytree(runs / "short", runs / name)
    shutil.rmtree(runs / "r2" / "export")
    shutil.copytree(runs / "r2", runs / "resumed")
    (runs / "resumed" / "checkpoints" / "latest").write_text("step-000004")
    rows_file = runs / "damaged" / "anchor" / "rows"
    content = bytearray(rows_file.read_bytes())
    content[-1] ^= 1
    rows_file.write_bytes(content)
    settings = runs / "other" / "anchor" / "settings.json"
    made = json.loads(settings.read_text())
    made["made"]["another base"] = "0" * 64
    settings.write_text(json.dumps(made))
    launch(
        folder,
        "two-again",
        2,
        [
            run_of(folder, "resumed", "run.eval_general=True"),
            run_of(folder, "r2", "run.eval_general=True"),  # the export again
            run_of(folder, "longer"),
            run_of(folder, "damaged", expect=2),
            run_of(folder, "other", expect=2),
            run_of(folder, "short", "forgetting.anchor_weight=2", expect=2),
            run_of(folder, "short", *replay, expect=2),
            run_of(folder, "short", *again, "optimizer.max_steps=3"),
        ],
    )
    return runs


@pytest.fixture(scope="module")
def one(folder, two) -> Path:
    launch(folder, "one", 1, [run_of(folder, "r1")])
    return folder / "runs"


def test_ranks_and_a_resume_change_nothing(one, two) -> None:
    assert largest_difference(weights(two / "r2"), weights(one / "r1")) < 1e-4
    for key in ("train/loss", "train/loss/base", "train/grad_norm"):
        assert relative_difference(rows(two / "r2"), rows(one / "r1"), key) < 1e-3
    assert largest_difference(weights(two / "r2"), weights(two / "resumed")) == 0.0
    assert [row["train/loss"] for row in rows(two / "resumed").values()] == [
        row["train/loss"] for row in rows(two / "r2").values()
    ]
