"""train.py on models with experts: 1, 2 and 4 gloo processes give the same updates, router curves and exports.

So do copies of a sharded model whose ranks share tokens, and a run that is stopped on 2 ranks and resumed on 4 ranks. The models
have 3 experts: 2 ranks have whole experts, 4 ranks have a part of every expert. A router has 3 rows, so 1 of 4 ranks has no row.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data.tokens import load_tokenizer
from tests.distributed.launch import assert_same_update, largest_difference, launch, rows, run_of, weights, workplace
from tests.tiny import encode_one, write_tiny_model

STEPS = 3
# With the auxiliary loss every rank has a single micro-batch per step, because the loss depends on the micro-batches so far.
FAMILIES = {
    "model": ("model.activation_checkpointing=full", "model.router_aux=0.1"),  # qwen3_moe
    "gpt_oss": ("model.activation_checkpointing=selective",),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write the workplace. The last step has fewer examples, so 1 of 4 ranks has an empty micro-batch, which no router counts."""
    folder = tmp_path_factory.mktemp("experts")
    model = {"family": "qwen3_moe", "tied": False, "num_experts": 3}
    workplace(
        folder, 11, 4, model=model, optimizer="epochs=1, max_grad_norm=1.0", run=f"keep_last=9, eval_every={STEPS}"
    )
    write_tiny_model(folder / "gpt_oss", family="gpt_oss", tied=False, num_local_experts=3)
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> Path:
    def run(name: str, examples: int, *settings: str, plant: str | None = None, family: str = "model") -> dict:
        settings = (f"model.path={folder / family}", f"batch.micro_batch={examples}", *settings)
        return run_of(folder, name, *settings, plant=plant)

    balanced, hybrid = FAMILIES["model"], ("sharding.strategy=hybrid", "sharding.shard_size=2")
    ewc = ("ewc.strength=100", f"ewc.data={folder / 'validation.jsonl'}", "ewc.documents=4")
    for world, runs_of_world in {
        1: [run("model-1", 4, *balanced), run("gpt_oss-1", 1, *FAMILIES["gpt_oss"], family="gpt_oss")],
        2: [
            run("model-2", 2, *balanced),
            run("ewc-2", 2, *ewc),
            run("lora", 2, "lora.rank=2", "data.validation="),
            # The first forward is of the validation, the second of a step.
            run("model-stopped", 2, *balanced, plant="signal_at_micro_batch:2"),
        ],
        4: [
            run("gpt_oss-4", 1, *FAMILIES["gpt_oss"], family="gpt_oss"),
            # Copies of a sharded model, whose ranks share tokens.
            run("model-shared", 2, *balanced, *hybrid, "data.packing=True", "sharding.context=2", "model.mlp_tiles=2"),
            run("model-stopped", 1, *balanced),  # the steps after the first
            run("ewc-4", 1, *ewc),
            run("ewc-read", 1, "ewc.strength=100", f"ewc.fisher={folder / 'runs' / 'ewc-2' / 'ewc'}", "run.stop_at=2"),
        ],
    }.items():
        launch(folder, f"world{world}", world, runs_of_world)
    assert "stopped after step" in (folder / "world2.out").read_text()
    return folder / "runs"


@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_ranks_trains_the_same(runs, family) -> None:
    """Also with context groups, with another kind of sharding, and after a stop."""
    reference, runs_to_compare = (
        runs / f"{family}-1",
        [path for path in runs.glob(f"{family}-*") if path.name != f"{family}-1"],
    )
    first = rows(reference)
    assert len(first) == STEPS and len(runs_to_compare) == (3 if family == "model" else 1)
    for run in runs_to_compare:
        assert_same_update(run, reference)
        for curve in ("router/largest_share/layers_00", "router/entropy/layers_01"):
            assert {step: row[curve] for step, row in first.items()} == {
                step: row[curve] for step, row in rows(run).items()
            }, run
    if family == "model":
        # The loss of the first step is the base's loss, without the auxiliary loss (about 0.1), which the LoRA run does not have.
        assert rows(runs / "lora")[1]["train/loss"] == pytest.approx(first[1]["train/loss"], rel=1e-6)


def test_penalty_on_experts_is_independent_of_ranks(folder, runs) -> None:
    """4 ranks, which have parts of experts, also read the anchor that 2 ranks with whole experts have saved."""
    first = rows(runs / "ewc-2")
    assert first[STEPS]["ewc/penalty"] > first[2]["ewc/penalty"] > 1e-6
    for name in ("ewc-4", "ewc-read"):
        for step, row in rows(runs / name).items():
            for curve in ("train/loss", "ewc/penalty", "ewc/drift"):
                assert row[curve] == pytest.approx(first[step][curve], rel=1e-4), (name, step, curve)
    fisher = load_file(runs / "ewc-2" / "ewc" / "fisher-00001.safetensors")
    assert largest_difference(fisher, load_file(runs / "ewc-4" / "ewc" / "fisher-00001.safetensors")) < 1e-5


def test_lora_exports_experts_unchanged(folder, runs) -> None:
    base, tuned = load_file(folder / "model" / "model.safetensors"), weights(runs / "lora")
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed and all(".self_attn." in name for name in changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_with_experts_loads_in_transformers(folder, runs, family) -> None:
    run = runs / ("model-2" if family == "model" else "gpt_oss-4")
    export, base, tuned = run / "export", load_file(folder / family / "model.safetensors"), weights(run)
    assert base.keys() == tuned.keys() and {n: t.shape for n, t in base.items()} == {
        n: t.shape for n, t in tuned.items()
    }
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert any("experts" in name for name in changed) and any("gate.weight" in n or "router" in n for n in changed)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    scores = model(torch.arange(3, 40)[None]).logits
    again = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, experts_implementation="eager")
    assert torch.allclose(scores, again(torch.arange(3, 40)[None]).logits, atol=1e-4)
    tokenizer, losses = load_tokenizer(str(export)), []
    for line in (folder / "validation.jsonl").read_text().splitlines():
        ids, targets = encode_one(tokenizer, json.loads(line))
        losses.append(again(torch.tensor([ids])).logits[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]][targets[1:]])
    *_, last = rows(run, "validation/loss").values()
    assert last["validation/loss"] == pytest.approx(-torch.cat(losses).mean().item(), rel=1e-5)
