"""train.py on 1, 2 and 4 gloo processes: the update depends neither on the ranks and how they share the model, nor on a stop.

All runs at one world size share a launch. A run has 3 steps per epoch. Without packing a step has 4 rows of different
lengths: 4 micro-batches on 1 rank, 2 each on 2 ranks, 1 each on 4. The last step of an epoch has fewer rows, so that
one of 4 ranks gets an empty micro-batch. The model is untied and has biases and an odd vocabulary, so that the rows do not divide by
the ranks and embedding and head are separate FSDP units. (Tied models: test_vocabulary.py, test_survival.py, test_mixing.py.)
"""

import gzip
import json
import math
import platform
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.batches import plan_training
from distributed.checkpoint_directory import latest_checkpoint
from tests.distributed.launch import (
    assert_same_update,
    largest_difference,
    launch,
    relative_difference,
    rows,
    run_of,
    weights,
    workplace,
)
from tests.in_memory import load_documents, weighted
from tests.losses import eager
from tests.tiny import write_chat_file, write_tiny_model

STEPS, LAYERS = 3, 2
WEIGHTS = (0.0, 0.25, 1.0, 3.0)  # as in train_worker.py
MODEL = {"family": "qwen2", "tied": False, "vocab_size": 391, "layers": LAYERS}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Runs validate only if they say so: `validated`."""
    folder, optimizer = tmp_path_factory.mktemp("train"), "epochs=1, max_grad_norm=1.0"
    write_chat_file(folder / "validation.jsonl", 5, seed=1)
    write_tiny_model(folder / "tied", layers=1)
    return workplace(folder, 11, model=MODEL, optimizer=optimizer)


def validated(folder: Path) -> str:
    return f"data.validation={folder / 'validation.jsonl'}"


def long(folder: Path) -> tuple[str, ...]:
    """6 steps; steps 4 to 6 are the second epoch."""
    return validated(folder), "optimizer.epochs=2", "run.save_every=2", "run.eval_every=2"


SHORT = ("optimizer.max_steps=2",)
TWO = "run.stop_at=2"
BF16 = ("model.compute_dtype=bf16", TWO)
WEIGHTED = (*SHORT, "data.sequence_length=96", "batch.global_examples=6")  # 3 micro-batches on each rank
OFFLOAD, GRAD_OP, NONE = "sharding.cpu_offload=True", "sharding.strategy=grad_op", "sharding.strategy=none"
HYBRID = ("sharding.strategy=hybrid", "sharding.shard_size=2")
EIGHT = "batch.global_examples=8"  # 2 steps, of 8 and 3 examples: on 4 ranks 2 micro-batches, then 1
LORA = ("lora.rank=4", OFFLOAD)
# The ranks read each other's flags one micro-batch later: a stop inside of a step needs more than two. Each rank has 3.
NOISY = (*SHORT, "optimizer.memory=12N", "batch.global_examples=6")
NANS = ",".join(str(n) for n in range(2 * 2, 40))  # a step has 2 forwards: not finite from step 3 on


@pytest.fixture(scope="module")
def two(folder) -> Path:
    """World size 2. `stopped-N` is stopped in step 4, the first of the second epoch, and resumed on N ranks; `stopped-noisy` in step 2.

    `r2-long` is traced, and the clock of its rank 1 is slow.
    """
    stop = "signal_at_micro_batch:12"  # 2 validations (steps 0, 2) of 3 forwards, 3 steps of 2: the first of step 4
    runs, tied = folder / "runs", f"model.path={folder / 'tied'}"
    copy = f"first:shutil.copytree('{runs}/stopped-2', '{runs}/stopped-4')"
    full, lost = f"{runs}/r2-full-disk/checkpoints", f"{runs}/r2/checkpoints/step-{STEPS:06d}/manifest.json"
    seen = f"first:Path('{folder}/full-disk').write_text(str([path.name for path in Path('{full}').iterdir()]))"
    first = [
        run_of(folder, "r2", plant="count_collectives"),
        run_of(folder, "r2-grad-op", GRAD_OP, plant="count_collectives"),
        run_of(folder, "r2-none", NONE, plant="count_collectives"),
        run_of(folder, "r2-none-differs", NONE, plant="gradients_of_last_rank:1,nan,100", expect=2),
        run_of(folder, "r2-noisy", *NOISY, plant="dropout"),
        run_of(folder, "r2-not-noisy", *NOISY, "run.stop_at=1"),
        run_of(folder, "stopped-noisy", *NOISY, plant="dropout and signal_at_micro_batch:4"),
        run_of(folder, "stopped-noisy", *NOISY, plant="dropout"),
        run_of(folder, "r2-cpu-offload", OFFLOAD),
        run_of(folder, "r2-lora", *LORA),
        run_of(folder, "stopped-lora", *LORA, "run.stop_at=1"),
        run_of(folder, "stopped-lora", *LORA),
        run_of(folder, "r2-lora-grad-op", "lora.rank=4", GRAD_OP),
        run_of(folder, "r2-lora-none", "lora.rank=4", NONE),
        run_of(folder, "r2-reduced-bf16", "sharding.reduce_dtype=bf16", "run.stop_at=2"),
        run_of(folder, "r2-means", "run.stop_at=1", plant="mean_of_means:1"),
        run_of(folder, "r2-division", NONE, "run.stop_at=1", plant="fsdp_division_on"),
        run_of(folder, "r2-long", *long(folder), "run.profile=2:1", plant="slow_rank:1"),
        run_of(folder, "stopped-2", *long(folder), plant=stop),
        # In the last validation.
        run_of(folder, "stopped-validating", *SHORT, validated(folder), plant="signal_at_micro_batch:7"),
        # In the second save: step 2.
        run_of(folder, "r2-full-disk", "run.save_every=1", plant="disk_full:2", expect=2),
        run_of(folder, "r2-half-bf16", BF16[0], "run.stop_at=1", plant="native_bf16:0"),
        run_of(folder, "r2-nans", "optimizer.epochs=3", "run.save_every=1", plant=f"not_finite:{NANS}", expect=2),
        run_of(folder, "weighted", tied, *WEIGHTED, plant="weighted"),
        run_of(folder, "weighted-packed", tied, *WEIGHTED, "data.packing=True", plant="weighted"),
        run_of(folder, "weighted-count", tied, *WEIGHTED, "run.stop_at=1", plant="weighted_by_count"),
        run_of(folder, "stopped-2", *long(folder), plant=copy),
        run_of(folder, "stopped-validating", *SHORT, validated(folder)),
        run_of(folder, "r2-full-disk", plant=seen),
        # Only rank 0 reads it, and every rank ends with exit code 2.
        run_of(folder, "r2", expect=2, plant=f"first:Path('{lost}').unlink()"),
    ]
    launch(folder, "two", 2, first)
    return runs


@pytest.fixture(scope="module")
def one(folder, two) -> Path:
    """Plain python: one process without torchrun."""
    full = "model.activation_checkpointing=full"
    runs = [
        run_of(folder, "r1", validated(folder)),
        run_of(folder, "r1-eight", EIGHT),
        run_of(folder, "r1-bf16", *BF16, plant="native_bf16:yes"),
        run_of(folder, "r1-bf16-checkpointing", *BF16, full, plant="native_bf16:yes"),
        *(
            run_of(folder, f"r1-{mode}", f"model.activation_checkpointing={mode}", TWO)
            for mode in ("selective", "offload")
        ),
        run_of(folder, "r1-second", full, "model.checkpoint_every=2", TWO),
        run_of(folder, "r1-lora", "lora.rank=4", full, "run.eval_general=True"),
        run_of(folder, "r1-named", "model.layer_class=Qwen2MLP", "run.stop_at=1"),
    ]
    launch(folder, "one", 0, runs)
    return two


@pytest.fixture(scope="module")
def four(folder, two) -> Path:
    plan = [
        run_of(folder, "r4"),
        run_of(folder, "r4-hybrid", *HYBRID, EIGHT, plant="count_collectives"),
        run_of(folder, "stopped-4", *long(folder)[1:], *HYBRID),
    ]
    launch(folder, "four", 4, plan)
    return two


def first_steps(run: Path, reference: Path) -> tuple[dict, dict]:
    """Return the rows of a run that ended early, and another run's rows of the same steps."""
    rows_by_step = rows(run)
    return rows_by_step, {step: row for step, row in rows(reference).items() if step in rows_by_step}


@pytest.mark.parametrize("other", ["r2", "r2-grad-op", "r2-none", "r2-cpu-offload", "r4"])
def test_update_is_independent_of_ranks_and_strategy(one, four, other) -> None:
    assert len(rows(one / "r1")) == STEPS
    assert_same_update(one / other, one / "r1")


def test_hybrid_with_micro_batches_gives_same_update(one, four) -> None:
    """Its copies of the model add up their gradients in the last backward of a step alone."""
    assert len(rows(one / "r1-eight")) == 2
    assert_same_update(four / "r4-hybrid", one / "r1-eight")


def test_averaging_micro_batch_means_is_detected(one) -> None:
    fault, right = first_steps(one / "r2-means", one / "r1")
    assert len(right) == 1 and relative_difference(right, fault, "train/loss") > 1e-3
    assert relative_difference(right, fault, "train/grad_norm") > 1e-3


def test_fsdp_averaging_is_detected(one) -> None:
    """In the gradient norm: after clipping and AdamW the weights do not show the scale of a gradient. Under `none` FSDP reduces all."""
    first, right = (rows(one / name)[1]["train/grad_norm"] for name in ("r2-division", "r1"))
    assert first == pytest.approx(right / 2, rel=1e-4)


def test_gradients_reduced_in_bf16_differ_by_its_rounding(two) -> None:
    """bf16 has 8 bits: each gradient is rounded by up to 2^-9 = 2e-3 before it is added, and so is the sum."""
    rounded, exact = first_steps(two / "r2-reduced-bf16", two / "r2")
    assert 1e-6 < relative_difference(exact, rounded, "train/grad_norm") < 1e-3
    assert 0 < relative_difference(exact, rounded, "train/loss") < 1e-3


def test_packing_does_not_change_the_update(two) -> None:
    assert_same_update(two / "weighted-packed", two / "weighted")


@pytest.fixture(scope="module")
def plain_loop(folder) -> tuple[float, float]:
    """Loss and gradient norm of the first weighted step: sum of w nll over sum of w, one document after the other."""
    source = weighted(WEIGHTS)
    items = plan_training(source, 1, 0, global_examples=6).batch(0).items
    ids, factors = zip(*map(source.get, items), strict=True)
    model, total = eager(folder / "tied", ids, factors)
    divisor = sum(float(of_document.sum(dtype=float)) for of_document in factors)
    (total / divisor).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return total.item() / divisor, norm.item()


def test_a_weighted_step_equals_the_plain_loop(two, plain_loop) -> None:
    """On 2 ranks, some targets of weight 0. tests/test_reference_loop.py has weights on 1 rank."""
    for name in ("weighted", "weighted-packed"):
        first = rows(two / name)[1]
        assert first["train/loss"] == pytest.approx(plain_loop[0], rel=1e-6)
        assert first["train/grad_norm"] == pytest.approx(plain_loop[1], rel=1e-5)


def test_dividing_by_the_number_of_targets_is_detected(two, plain_loop) -> None:
    first = rows(two / "weighted-count")[1]
    assert abs(first["train/loss"] / plain_loop[0] - 1) > 1e-2
    assert abs(first["train/grad_norm"] / plain_loop[1] - 1) > 1e-2


def test_activation_checkpointing_is_bitwise_in_bf16(one) -> None:
    checkpointed, plain = first_steps(one / "r1-bf16-checkpointing", one / "r1-bf16")
    for key in ("train/loss", "train/grad_norm"):
        assert len(plain) == 2 and [r[key] for r in plain.values()] == [r[key] for r in checkpointed.values()]
    assert 0 < relative_difference(*first_steps(one / "r1-bf16", one / "r1"), "train/loss") < 2e-2


def test_ranks_compute_in_fp32_without_common_bf16(folder, two) -> None:
    assert "not every rank has native bf16: all ranks compute in fp32 instead" in (folder / "two.out").read_text()
    assert relative_difference(*first_steps(two / "r2-half-bf16", two / "r2"), "train/grad_norm") == 0


def test_lost_checkpoint_is_one_sentence_on_both_ranks(folder, two) -> None:
    output = (folder / "two.out").read_text()
    assert f"step-{STEPS:06d}/manifest.json is missing" in output and "Connection closed" not in output


def test_layer_class_sets_the_sharding_unit(folder, one) -> None:
    assert "2 x Qwen2MLP" in (folder / "one.out").read_text()
    assert relative_difference(*first_steps(one / "r1-named", one / "r1"), "train/grad_norm") < 1e-6


def test_resume_is_bitwise_across_an_epoch_boundary(two) -> None:
    straight, stopped = two / "r2-long", two / "stopped-2"
    assert largest_difference(weights(straight), weights(stopped)) == 0.0
    for key in ("train/loss", "train/grad_norm", "train/learning_rate", "train/tokens", "validation/loss"):
        curve = {step: row[key] for step, row in rows(straight, key).items()}
        assert curve == {step: row[key] for step, row in rows(stopped, key).items()}, key
    started = rows(stopped, "start/total")  # the first row of every start says how long the start took
    assert list(started) == [1, STEPS + 1] and min(row["start/total"] for row in started.values()) > 0
    events = EventAccumulator(str(stopped / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("Loss/train")] == list(range(1, 2 * STEPS + 1))
    assert [e.step for e in events.Scalars("Loss/validation")] == [0, 2, 4, 6]


def test_signal_to_one_rank_stops_all(folder, two) -> None:
    output = (folder / "two.out").read_text()
    assert "signal: stopped after step 3/6, saved" in output  # rank 0 prints it; another rank received the signal
    assert f"resumed from {two}/stopped-2/" in output


def test_clean_start_prints_six_lines(folder, two) -> None:
    lines = (folder / "two.out").read_text().partition("step 1/")[0].splitlines()
    printed = [line for line in lines if "tokenise" not in line and not line.startswith("step 0/")]
    first = [line.split()[0] for line in printed]
    assert first[:6] == ["run", "model", "data:", "step:", "schedule:", "memory:"], printed
    assert all(line.startswith("warning: ") for line in printed[6:]), printed
    recorded = (two / "r2-grad-op" / "start.txt").read_text()
    assert printed[1] in recorded and "a save writes" in recorded and "messages (messages)" in recorded


def test_slow_rank_is_named_once(folder, two) -> None:
    warning = f"warning: rank 1 on host {platform.node()} takes 30.0 times as long as the median rank for its part of forward, in 5"
    assert (folder / "two.out").read_text().count(warning) == 1
    slowest = rows(two / "r2-long", "time/slowest_rank_seconds")
    assert list(slowest) == list(range(2, 2 * STEPS + 1))  # each row has the times of the row before
    for row in slowest.values():  # 2 micro-batches
        assert (row["time/slowest_rank_seconds"], row["time/median_rank_seconds"]) == (60.0 * LAYERS, 2.0 * LAYERS)


def test_every_rank_writes_a_profile(folder, two) -> None:
    traces = sorted((two / "r2-long" / "profile").iterdir())
    assert [trace.name for trace in traces] == [f"steps-2-2-rank-{rank}.json.gz" for rank in range(2)]
    for trace in traces:
        names = [event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
        assert "aten::mm" in names and names.count("gloo:all_reduce") + names.count("c10d::allreduce_") >= 3
    output = (folder / "two.out").read_text()
    assert "the trace of steps 2 to 2 is in " in output and "profiler_st" not in output  # the library is silent


def test_interrupted_validation_is_repeated_after_resume(two) -> None:
    """Step 2 was saved before its validation. After the resume it is validated once, and is the best."""
    checkpoints = two / "stopped-validating" / "checkpoints"
    state = json.loads((checkpoints / "step-000002" / "manifest.json").read_text())["state"]
    assert state["evaluated"] == {"validation": 2} and state["best_step"] == 2
    assert sorted(rows(two / "stopped-validating", "validation/loss")) == [0, 2]


def test_resume_on_another_number_of_ranks(two, four) -> None:
    """The strategy changes too, from full to hybrid. On fewer ranks: test_mixing.py, test_vocabulary.py."""
    assert len(rows(four / "stopped-4")) == 2 * STEPS
    assert largest_difference(weights(two / "r2-long"), weights(four / "stopped-4")) < 1e-5


def test_copies_whose_gradients_differ_clip_and_skip_alike(folder, two) -> None:
    """The last rank's gradients are NaN in step 2 and too long in step 3: two copies, and one decision of both ranks.

    No checkpoint says which of the two copies it has.
    """
    words = "step 3 is not saved: the copies of the model differ in"
    assert words in (folder / "two.out").read_text() and not list((two / "r2-none-differs/checkpoints").glob("step-*"))
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


def test_discarded_step_draws_its_random_numbers_again(folder, two) -> None:
    """And bf16 weights, which round by random numbers of their own, resume to the bit."""
    assert (folder / "two.out").read_text().count("signal: stopped after step 1/") == 1
    straight, stopped = two / "r2-noisy", two / "stopped-noisy"
    assert largest_difference(weights(straight), weights(stopped)) == 0.0
    for key in ("train/loss", "train/grad_norm"):
        assert {step: row[key] for step, row in rows(straight).items()} == {
            step: row[key] for step, row in rows(stopped).items()
        }
    first, without = (rows(two / name)[1]["train/grad_norm"] for name in ("r2-noisy", "r2-not-noisy"))
    assert abs(first / without - 1) > 2e-2  # dropout draws random numbers
    assert "keeps 12N bytes for N parameters" in (straight / "start.txt").read_text()


def test_number_of_collectives_per_step(folder, two, four) -> None:
    """2 micro-batches on 2 ranks. With hybrid on 4, the first step has 2 and the second has 1."""
    units, per_step = LAYERS + 3, {}  # embedding, head, root
    for name in ("r2", "r2-grad-op", "r2-none"):
        counts = json.loads((folder / f"{name}.collectives.json").read_text())
        # The check of the last weights is one more forward of a step: 2 micro-batches. Root and head stay gathered; with
        # grad_op everything does.
        counts["all_gather"] -= {"r2": 2 * (LAYERS + 1) + 2, "r2-grad-op": units}.get(name, 0)
        per_step[name] = {kind: count / STEPS for kind, count in counts.items()}
    assert per_step["r2-grad-op"] == {"all_gather": units, "reduce_scatter": 2 * units, "all_reduce": 0}
    # Only the last backward reduces.
    assert per_step["r2-none"] == {"all_gather": 0, "reduce_scatter": 0, "all_reduce": units}
    hybrid = json.loads((folder / "r4-hybrid.collectives.json").read_text())
    assert (hybrid["all_reduce"], hybrid["reduce_scatter"]) == (2 * units, (2 + 1) * units)
    # FSDP gathers in forward and again in backward, except for root and head, with which backward begins, and the embedding,
    # whose backward does not need the weights.
    assert per_step["r2"] == {"all_gather": 2 * (units + LAYERS), "reduce_scatter": 2 * units, "all_reduce": 0}


@pytest.mark.parametrize("mode", ["selective", "offload", "second"])
def test_activation_checkpointing_is_bitwise_identical(one, mode) -> None:
    checkpointed, plain = first_steps(one / f"r1-{mode}", one / "r1")
    for key in ("train/loss", "train/grad_norm"):  # the rows of step 2 show the update of step 1
        assert len(plain) == 2 and relative_difference(plain, checkpointed, key) == 0


def adapters(run: Path) -> dict:
    """The tensors that peft reads."""
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["r2-lora", "r2-lora-grad-op", "r2-lora-none"])
def test_lora_update_is_independent_of_sharding(one, name) -> None:
    """Against one rank with recomputed activations: the same A at the start, the same adapters at the end."""
    assert_same_update(one / name, one / "r1-lora")
    assert largest_difference(adapters(one / "r1-lora"), adapters(one / name)) < 1e-5


def test_lora_resumes_bitwise(two) -> None:
    assert largest_difference(adapters(two / "r2-lora"), adapters(two / "stopped-lora")) == 0.0
    assert largest_difference(weights(two / "r2-lora"), weights(two / "stopped-lora")) == 0.0


def test_lora_exports_adapters_merged_and_alone(folder, one) -> None:
    """The export is base + alpha / rank x B A: the adapter in peft on the base has its logits, and the run had its loss."""
    base, merged, exported = (
        load_file(folder / "model" / "model.safetensors"),
        weights(one / "r1-lora"),
        adapters(one / "r1-lora"),
    )
    changed = 0
    assert merged.keys() == base.keys()
    for name, weight in merged.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (exported.get(f"{prefix}.lora_{side}.weight") for side in "AB")
        expected = base[name] if a is None or b is None else base[name] + 2.0 * b @ a
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-6)
        changed += not torch.equal(weight, base[name])
    assert changed == LAYERS * 7 and len(exported) == 2 * changed
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
    assert len(stored) == 4 * len(exported) + 1 and not any("base_layer" in name for name in stored)
    forgetting = [row["forgetting/kl"] for row in rows(one / "r1-lora", "forgetting/kl").values()]
    assert forgetting[0] == pytest.approx(0, abs=1e-6) and forgetting[-1] > 1e-4


def test_non_finite_loss_skips_step_on_all_ranks(two) -> None:
    """That of the last rank. That such a step changes no weight is in test_durable_runs.py."""
    curve = rows(two / "r2-nans")
    assert [row["train/skipped_steps"] for row in curve.values()] == [0, 0, 1, 2, 3, 4, 5]
    for key in ("train/loss", "train/grad_norm"):  # logged unchanged
        assert all(math.isnan(row[key]) == (step > 2) for step, row in curve.items()), key


def test_five_bad_steps_stop_the_run(folder, two) -> None:
    output = (folder / "two.out").read_text()
    assert "error: loss or gradient norm was not finite in 5 steps in a row, up to step 7" in output
    checkpoints = two / "r2-nans" / "checkpoints"
    # Saved at every good step. Step 2 is good: the losses that are not finite come from elsewhere, but who can know?
    assert latest_checkpoint(checkpoints).name == "step-000001"
    state = json.loads((checkpoints / "step-000002.bad" / "manifest.json").read_text())["state"]
    assert (state["step"], state["loop"]["skipped_steps"], state["proven_step"]) == (2, 0, 1)


def test_full_disk_stops_all_ranks(folder, two) -> None:
    assert "the checkpoint of step 2 needs" in (folder / "two.out").read_text()
    assert (folder / "full-disk").read_text() == "['step-000001']"
    assert largest_difference(weights(two / "r2"), weights(two / "r2-full-disk")) == 0.0


def test_the_export_is_a_hugging_face_directory(folder, one) -> None:
    model, load = AutoModelForCausalLM.from_pretrained(one / "r1" / "export", output_loading_info=True)
    assert not load["missing_keys"] and not load["unexpected_keys"]
    exported, original = (
        AutoTokenizer.from_pretrained(one / "r1" / "export"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    text = "The LCR is 97.3%.\n\tC 03.00 r0010 <|im_end|>"
    assert exported.encode(text) == original.encode(text)
    messages = [{"role": "user", "content": "q"}]
    assert exported.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(
        messages, tokenize=False
    )
    # The same logits: the exported model reproduces the last validation loss of the run, document by document.
    documents = load_documents((str(folder / "validation.jsonl"),), exported, 256, "error")
    total = 0.0
    for ids, flags in map(documents.get, range(len(documents))):
        log_p = model(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
        total -= sum(log_p[t - 1, ids[t]].item() for t in flags.nonzero()[0])
    assert rows(one / "r1", "validation/loss")[STEPS]["validation/loss"] == pytest.approx(
        total / documents.targets.sum(), rel=1e-5
    )
    assert model.config.use_cache and model.config.architectures == ["Qwen2ForCausalLM"]
