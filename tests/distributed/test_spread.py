"""Sharding strategies, offload, activation checkpointing and optimizer memory must not change the update.

As in test_train.py, all runs at one world size share a launch. The model is untied and has biases and an odd vocabulary, so
that the rows do not divide by the ranks and embedding and head are separate FSDP units.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from tests.distributed.launch import largest_difference, launch, relative_difference, rows, run_of, weights, workplace

STEPS, LAYERS = 3, 2
pytestmark = pytest.mark.slow
LOW = "optimizer.memory=6N"
LORA = ("lora.rank=4", "sharding.cpu_offload=True")
NOISY = ("optimizer.memory=12N", "optimizer.max_steps=2")
HYBRID = ("sharding.strategy=hybrid", "sharding.shard_size=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model = {"family": "qwen2", "tied": False, "vocab_size": 391, "layers": LAYERS}
    return workplace(tmp_path_factory.mktemp("spread"), 24, model=model, batch="global_examples=8")


@pytest.fixture(scope="module")
def two(folder) -> Path:
    """World size 2: 2 micro-batches per rank and step. `stopped-N` is stopped in step 2 and resumed on N ranks."""
    two, grad_op = "batch.micro_batch=2", "sharding.strategy=grad_op"
    validated = ("run.eval_every=1", f"data.validation={folder / 'train.jsonl'}")
    # The ranks read each other's flags one micro-batch later: a stop inside of a step needs more than two.
    one, stop, runs = "batch.micro_batch=1", "signal_at_micro_batch:5", folder / "runs"
    copies = f"first:for n in (1, 4): shutil.copytree('{runs}/stopped', f'{runs}/stopped-{{n}}')"
    plan = [
        run_of(folder, "r2-full", two, "sharding.strategy=full", plant="count_collectives"),
        run_of(folder, "r2-grad-op", two, grad_op, plant="count_collectives"),
        run_of(folder, "r2-none", two, "sharding.strategy=none", plant="count_collectives"),
        run_of(folder, "r2-cpu-offload", two, "sharding.cpu_offload=True"),
        run_of(folder, "r2-6N", two, LOW),
        run_of(folder, "r2-lora", two, *LORA),
        run_of(folder, "r2-lora-grad-op", two, "lora.rank=4", *validated, grad_op),
        run_of(folder, "r2-none-differs", two, "sharding.strategy=none", plant="gradients_of_last_rank:1,nan,100"),
        run_of(folder, "r2-noisy", one, *NOISY, plant="dropout"),
        run_of(folder, "stopped", one, plant=stop),
        run_of(folder, "stopped-noisy", one, *NOISY, plant=f"dropout and {stop}"),
        run_of(folder, "stopped-lora", two, *LORA, "run.stop_at=1"),
        run_of(folder, "stopped-noisy", one, *NOISY, plant="dropout"),
        run_of(folder, "stopped-lora", "lora.rank=8", plant=copies, expect=2),
        run_of(folder, "stopped-lora", two, *LORA),
    ]
    launch(folder, "two", 2, plan)
    return runs


@pytest.fixture(scope="module")
def one(folder, two) -> Path:
    four, modes = "batch.micro_batch=4", ("selective", "offload")
    plan = [
        run_of(folder, "r1", four),
        *(run_of(folder, f"r1-{mode}", four, f"model.activation_checkpointing={mode}") for mode in modes),
        run_of(folder, "r1-second", four, "model.activation_checkpointing=full", "model.checkpoint_every=2"),
        run_of(folder, "r1-6N", four, LOW),
        run_of(folder, "stopped-1", four),
        run_of(folder, "r1-lora", four, "lora.rank=4", "model.activation_checkpointing=full", "run.eval_general=True"),
    ]
    launch(folder, "one", 1, plan)
    return two


@pytest.fixture(scope="module")
def four(folder, two) -> Path:
    """`r4-hybrid` has 2 micro-batches in a step, the others have 1."""
    plan = [
        run_of(folder, "r4-hybrid", *HYBRID, plant="count_collectives"),
        run_of(folder, "stopped-4", "batch.micro_batch=2", *HYBRID),
        run_of(folder, "r4-lora-hybrid", "batch.micro_batch=2", "lora.rank=4", *HYBRID),
    ]
    launch(folder, "four", 4, plan)
    return two


@pytest.mark.parametrize("name", ["r2-full", "r2-grad-op", "r2-none", "r2-cpu-offload", "r4-hybrid"])
def test_every_strategy_gives_the_same_update(one, four, name) -> None:
    reference, run = one / "r1", one / name
    assert len(rows(reference)) == STEPS
    assert largest_difference(weights(reference), weights(run)) < 1e-5
    assert relative_difference(rows(reference), rows(run), "train/loss") < 1e-5
    assert relative_difference(rows(reference), rows(run), "train/grad_norm") < 1e-5


def test_copies_whose_gradients_differ_clip_and_skip_alike(folder, two) -> None:
    """The last rank's gradients are NaN in step 2 and too long in step 3: two copies, and one decision of both ranks."""
    notes = [json.loads((folder / f"r2-none-differs.gradients.{rank}.json").read_text()) for rank in range(2)]
    for step, (first, second) in enumerate(zip(*notes, strict=True), 1):
        assert first["norm"] == pytest.approx(second["norm"], rel=0, abs=0, nan_ok=True), step
        assert first["clipped"] == second["clipped"], step
        if step == 2:
            assert math.isnan(second["own"]) and math.isfinite(first["own"])
            assert math.isnan(first["norm"]) and first["clipped"] is None
        else:  # the mean of both copies
            assert (
                first["norm"]
                == first["clipped"]
                == pytest.approx(math.sqrt((first["own"] + second["own"]) / 2), rel=1e-5)
            )
            assert second["own"] / first["own"] > (1000 if step == 3 else 0.999)
    assert [row["train/skipped_steps"] for row in rows(two / "r2-none-differs").values()] == [0, 1, 1]


def test_the_random_numbers_of_a_step_that_a_signal_has_discarded_are_drawn_again(folder, two) -> None:
    """And bf16 weights, which round by random numbers of their own, resume to the bit."""
    assert (folder / "two.out").read_text().count("signal: stopped after step 1/") == 2
    straight, stopped = two / "r2-noisy", two / "stopped-noisy"
    assert largest_difference(weights(straight), weights(stopped)) == 0.0
    for key in ("train/loss", "train/grad_norm"):
        assert {step: row[key] for step, row in rows(straight).items()} == {
            step: row[key] for step, row in rows(stopped).items()
        }
    # Random numbers were drawn: `r2-6N` begins with the same weights in bf16.
    first, without = (rows(two / name)[1]["train/grad_norm"] for name in ("r2-noisy", "r2-6N"))
    assert abs(first / without - 1) > 5e-3
    assert "optimizer memory 12N: 12." in (straight / "start.txt").read_text()


def test_the_number_of_collectives_per_step(folder, two, four) -> None:
    """2 micro-batches, on 2 ranks or, with hybrid, on 4."""
    units, per_step = LAYERS + 3, {}  # embedding, head, root
    for name in ("r2-full", "r2-grad-op", "r2-none", "r4-hybrid"):
        counts = json.loads((folder / f"{name}.collectives.json").read_text())
        # The check of the last weights is one more forward of a step: 2 micro-batches. Root and head stay gathered; with
        # grad_op everything does.
        counts["all_gather"] -= {"r2-full": 2 * (LAYERS + 1) + 2, "r2-grad-op": units}.get(name, 0)
        per_step[name] = {kind: count / STEPS for kind, count in counts.items()}
    assert per_step["r2-grad-op"] == {"all_gather": units, "reduce_scatter": 2 * units, "all_reduce": 0}
    assert per_step["r2-none"] == {"all_gather": 0, "reduce_scatter": 0, "all_reduce": units}
    assert per_step["r4-hybrid"]["all_reduce"] == units
    assert per_step["r4-hybrid"]["reduce_scatter"] == 2 * units
    # FSDP gathers in forward and again in backward, except for root and head, with which backward begins, and the embedding,
    # whose backward does not need the weights.
    assert per_step["r2-full"] == {"all_gather": 2 * (units + LAYERS), "reduce_scatter": 2 * units, "all_reduce": 0}


@pytest.mark.parametrize("mode", ["selective", "offload", "second"])
def test_activation_checkpointing_is_bitwise_identical(one, mode) -> None:
    assert [r["train/loss"] for r in rows(one / "r1").values()] == [
        r["train/loss"] for r in rows(one / f"r1-{mode}").values()
    ]
    assert largest_difference(weights(one / "r1"), weights(one / f"r1-{mode}")) == 0.0


@pytest.mark.parametrize("ranks", [1, 4])
def test_an_odd_untied_biased_model_resumes_on_another_number_of_ranks(one, four, ranks) -> None:
    """On 4 ranks the strategy changes too, from full to hybrid."""
    resumed = one / f"stopped-{ranks}"
    assert len(rows(resumed)) == STEPS
    assert largest_difference(weights(one / "r1"), weights(resumed)) < 1e-5


@pytest.mark.parametrize("name", ["r2-lora", "r2-lora-grad-op", "r4-lora-hybrid"])
def test_lora_gives_the_same_update_under_every_sharding(one, four, name) -> None:
    """Against one rank with recomputed activations: the same A at the start, the same adapters at the end."""
    reference, run = one / "r1-lora", one / name
    assert len(rows(run)) == STEPS
    assert largest_difference(adapters(reference), adapters(run)) < 1e-5
    assert largest_difference(weights(reference), weights(run)) < 1e-5
    for key in ("train/loss", "train/grad_norm"):
        assert relative_difference(rows(reference), rows(run), key) < 1e-5


def test_lora_resumes_bitwise_and_only_with_its_own_settings(folder, two) -> None:
    straight, resumed = adapters(two / "r2-lora"), adapters(two / "stopped-lora")
    assert largest_difference(straight, resumed) == 0.0
    assert largest_difference(weights(two / "r2-lora"), weights(two / "stopped-lora")) == 0.0
    output = (folder / "two.out").read_text()
    assert "was made with lora.alpha=8.0, now it is 16.0; lora.rank=4, now it is 8; set it back" in output


def test_lora_saves_adapters_and_exports_them_merged_and_alone(folder, one) -> None:
    """The export is base + alpha / rank x B A: the adapter in peft on the base has its logits, and the run had its loss."""
    base, merged, found = (
        load_file(folder / "model" / "model.safetensors"),
        weights(one / "r1-lora"),
        adapters(one / "r1-lora"),
    )
    changed = 0
    assert merged.keys() == base.keys()
    for name, weight in merged.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (found.get(f"{prefix}.lora_{side}.weight") for side in "AB")
        expected = base[name] if a is None or b is None else base[name] + 2.0 * b @ a
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
        changed += not torch.equal(weight, base[name])
    assert changed == LAYERS * 7 and len(found) == 2 * changed
    from peft import PeftModel  # slow to import

    ids = torch.arange(40)[None] % 300
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        before = model(ids).logits
        alone = PeftModel.from_pretrained(model, one / "r1-lora" / "adapter")(ids).logits
        together = AutoModelForCausalLM.from_pretrained(one / "r1-lora" / "export")(ids).logits
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)
    assert (before - together).abs().max() > 0.01
    # In the checkpoint: A and B, two moments of each, the step, the random state of the rank.
    stored = FileSystemReader(one / "r1-lora" / "checkpoints" / "step-000003").read_metadata().state_dict_metadata
    assert len(stored) == 4 * len(found) + 1 and not any("base_layer" in name for name in stored)
    forgetting = [row["forgetting/kl"] for row in rows(one / "r1-lora", "forgetting/kl").values()]
    assert forgetting[0] == pytest.approx(0, abs=1e-6) and forgetting[-1] > 1e-4


def adapters(run: Path) -> dict:
    """The tensors that peft reads."""
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_the_rounding_noise_does_not_depend_on_ranks(one) -> None:
    """Few weights differ. The order in which gradients are summed (in bf16 with 6N) changes the rounding of a few; noise
    that depends on the rank would change most. With equal gradients test_optimizer.py expects no difference."""
    a, b = weights(one / "r1-6N"), weights(one / "r2-6N")
    unequal = sum(int((a[name] != b[name]).sum()) for name in a) / sum(t.numel() for t in a.values())
    assert unequal < 0.15
    assert "optimizer memory 6N: 6." in (one / "r1-6N" / "start.txt").read_text()
    assert largest_difference(weights(one / "r1"), b) < 2e-2
