"""train.py on models with experts: 1, 2 and 4 gloo processes train the same, balance the same and export what they trained.

So do ranks that share tokens, copies of a sharded model, and a run that is killed on 2 ranks and goes on on 4. Of the 3 experts of
qwen3_moe here, 4 ranks have one each and one rank none.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.distributed.launch import (
    ENVIRONMENT,
    WORKER,
    largest_difference,
    launch,
    relative_difference,
    rows,
    run_of,
    weights,
    write_plan,
)
from tests.processes import run_ranks
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
        experts = {"num_experts": 3} if family == "qwen3_moe" else {}
        write_tiny_model(folder / family, family=family, tied=False, **experts)
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
    def run(name: str, family: str, rows_of_rank: int, *settings: str, plant: str | None = None) -> dict:
        settings = (f"model.path={folder / family}", f"batch.micro_batch={rows_of_rank}", *settings)
        return run_of(folder, name, *settings, plant=plant)

    balanced = FAMILIES["qwen3_moe"]
    also = {
        1: [],
        2: [run("lora", "qwen3_moe", 2, "lora.rank=2"), run("6N-2", "qwen3_moe", 1, "optimizer.memory=6N")],
        4: [
            run("6N-4", "qwen3_moe", 1, "optimizer.memory=6N"),
            run("qwen3_moe-hybrid", "qwen3_moe", 1, *balanced, "sharding.strategy=hybrid", "sharding.shard_size=2"),
            run("qwen3_moe-shared", "qwen3_moe", 2, *balanced, "sharding.context=2", "model.mlp_tiles=2"),
            run("qwen3_moe-killed", "qwen3_moe", 1, *balanced),
        ],
    }
    killed = run("qwen3_moe-killed", "qwen3_moe", 2, *balanced, "run.save_every=1", plant="kill_at_micro_batch:3")
    run_ranks(2, WORKER, write_plan(folder, "killed", [killed]), **ENVIRONMENT)
    assert (folder / "runs" / "qwen3_moe-killed" / "checkpoints" / "latest").read_text().strip().endswith("step-000002")
    for world in (1, 2, 4):
        started = [
            run(f"{family}-{world}", family, 4 // world if family == "qwen3_moe" else 1, *settings)
            for family, settings in FAMILIES.items()
        ]
        launch(folder, f"world{world}", world, started + also[world])
    return folder / "runs"


@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_ranks_trains_the_same(folder, runs, family) -> None:
    """And any groups of them, and any kind of sharding, after a kill too."""
    one, others = runs / f"{family}-1", [path for path in runs.glob(f"{family}-*") if path.name != f"{family}-1"]
    first = rows(one)
    assert len(first) == STEPS and len(others) == (5 if family == "qwen3_moe" else 2)
    for other in others:
        assert relative_difference(first, rows(other), "train/loss") < 1e-5, other
        assert relative_difference(first, rows(other), "train/grad_norm") < 1e-5, other
        assert largest_difference(weights(one), weights(other)) < 1e-4, other
        for curve in ("router/largest_share/layers_00", "router/entropy/layers_01"):
            assert {step: row[curve] for step, row in first.items()} == {
                step: row[curve] for step, row in rows(other).items()
            }, other
    if family == "qwen3_moe":
        said = {world: (folder / f"world{world}.out").read_text() for world in (2, 4)}
        assert "4 ranks share the 3 experts of a layer" in said[4] and "ranks share the 3 experts" not in said[2]


def test_8_bit_moments_of_experts_do_not_depend_on_the_number_of_ranks(runs) -> None:
    assert relative_difference(rows(runs / "6N-2"), rows(runs / "6N-4"), "train/loss") < 3e-3


def test_lora_trains_attention_and_exports_experts_as_they_were(folder, runs) -> None:
    base, tuned = load_file(folder / "qwen3_moe" / "model.safetensors"), weights(runs / "lora")
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed and all(".self_attn." in name for name in changed)


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
