"""train.py on models with experts: 1, 2 and 4 gloo processes train the same, balance the same and export what they trained."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.distributed.launch import largest_difference, launch, relative_difference, rows, run_of, weights
from tests.tiny import write_chat_file, write_tiny_model

STEPS = 4
# With the auxiliary loss every rank has one micro-batch of a step, because its shares are those of the micro-batches so far.
FAMILIES = {
    "qwen3_moe": ("model.activation_checkpointing=full", "model.router_aux=0.1"),
    "gpt_oss": ("model.activation_checkpointing=selective",),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    for family in FAMILIES:
        write_tiny_model(folder / family, family=family, tied=False)
    write_chat_file(folder / "train.jsonl", 15, seed=0)
    write_chat_file(folder / "validation.jsonl", 4, seed=1)
    (folder / "config.py").write_text(f"""
from configs.config import *
config = Config(
    model=Model({str(folder / "qwen3_moe")!r}, compute_dtype="fp32"),
    data=Data(
        ({str(folder / "train.jsonl")!r},), ({str(folder / "validation.jsonl")!r},), sequence_length=256, packing=False,
        cache={str(folder / "tokens")!r},
    ),
    # The last step has fewer examples, so that one of 4 ranks gets an empty micro-batch, which no router counts.
    batch=Batch(global_examples=4, micro_batch=1),
    optimizer=Optimizer(1e-3, epochs=1, warmup_steps=0, max_grad_norm=1.0),
    run=Run("base", directory={str(folder / "runs")!r}, keep_last=9, log_every=1, eval_every={STEPS}),
)
""")
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> Path:
    for world in (1, 2, 4):
        names = {family: f"{family}-{world}" for family in FAMILIES}
        started = []
        for family, settings in FAMILIES.items():
            rows_of_rank = 4 // world if len(settings) > 1 else 1
            settings += (f"model.path={folder / family}", f"batch.micro_batch={rows_of_rank}")
            started.append(run_of(folder, names[family], *settings))
        launch(folder, f"world{world}", world, started)
    return folder / "runs"


@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_ranks_trains_the_same(runs, family) -> None:
    one = runs / f"{family}-1"
    first = rows(one)
    assert len(first) == STEPS
    for world in (2, 4):
        other = runs / f"{family}-{world}"
        assert relative_difference(first, rows(other), "train/loss") < 1e-5
        assert relative_difference(first, rows(other), "train/grad_norm") < 1e-5
        assert largest_difference(weights(one), weights(other)) < 1e-4
        for curve in ("router/largest_share/layers_00", "router/entropy/layers_01"):
            assert {step: row[curve] for step, row in first.items()} == {
                step: row[curve] for step, row in rows(other).items()
            }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_is_a_model_of_transformers_with_experts_in_its_own_names(folder, runs, family) -> None:
    export = runs / f"{family}-2" / "export"
    base, tuned = load_file(folder / family / "model.safetensors"), weights(runs / f"{family}-2")
    assert base.keys() == tuned.keys() and {n: t.shape for n, t in base.items()} == {
        n: t.shape for n, t in tuned.items()
    }
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert any("experts" in name for name in changed) and any("gate.weight" in n or "router" in n for n in changed)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    scores = model(torch.arange(3, 40)[None]).logits
    again = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, experts_implementation="eager")
    assert torch.allclose(scores, again(torch.arange(3, 40)[None]).logits, atol=1e-4)
    report = (runs / f"{family}-2" / "metrics.jsonl").read_text()
    assert "validation/loss" in report
