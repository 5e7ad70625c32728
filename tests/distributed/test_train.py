"""train.py on 1, 2 and 4 gloo processes: the update does not depend on the number of ranks, nor on a stop and resume.

All runs at one world size share a launch. A run has 3 steps per epoch. Without packing a step has 4 rows of different
lengths: 4 micro-batches on 1 rank, 2 each on 2 ranks, 1 each on 4. The last step of an epoch has fewer rows, so that
one of 4 ranks gets an empty micro-batch.
"""

import gzip
import json
import platform
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.batches import plan_training
from tests.distributed.launch import (
    largest_difference,
    launch,
    relative_difference,
    rows,
    run_of,
    weights,
    workplace,
)
from tests.in_memory import load_documents, weighted

STEPS = 3
WEIGHTS = (0.0, 0.25, 1.0, 3.0)  # as in train_worker.py
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return workplace(
        tmp_path_factory.mktemp("train"), 11, 5, model={"layers": 1}, optimizer="epochs=1, max_grad_norm=1.0"
    )


SHORT = ("optimizer.max_steps=2",)
BF16 = ("model.compute_dtype=bf16", "run.stop_at=2")
LONG = ("optimizer.epochs=2", "run.save_every=2", "run.eval_every=2")  # 6 steps; steps 4 to 6 are the second epoch
WEIGHTED = (
    *SHORT,
    "data.sequence_length=96",
    "batch.global_examples=6",
    "data.validation=",
)  # 3 micro-batches on each rank
# The validation at the start has 3 forwards, and every step 2. Not finite from step 3 on.
NANS = ",".join(str(n) for n in range(3 + 2 * 2, 40))


@pytest.fixture(scope="module")
def two(folder) -> Path:
    """World size 2. `stopped-N` is stopped in step 4, the first of the second epoch, and resumed on N ranks.

    `r2-long` is traced, and the clock of its rank 1 is slow.
    """
    stop = "signal_at_micro_batch:12"  # 2 validations (steps 0, 2) of 3 forwards, 3 steps of 2: the first of step 4
    runs = folder / "runs"
    copies = f"first:for n in (1, 4): shutil.copytree('{runs}/stopped-2', f'{runs}/stopped-{{n}}')"
    seen = f"first:shutil.copy('{runs}/r2-full-disk/checkpoints/latest', '{folder}/full-disk-latest')"
    lost = f"first:Path('{runs}/r2/checkpoints/latest').write_text('step-999999')"
    first = [
        run_of(folder, "r2"),
        run_of(folder, "r2-packed", "data.packing=True"),
        run_of(folder, "r2-reduced-bf16", "sharding.reduce_dtype=bf16", "run.stop_at=2"),
        run_of(folder, "r2-means", plant="mean_of_means:1"),
        run_of(folder, "r2-division", "run.stop_at=1", plant="fsdp_division_on"),
        run_of(folder, "r2-long", *LONG, "run.profile=2:3", plant="slow_rank:1"),
        run_of(folder, "stopped-2", *LONG, plant=stop),
        run_of(folder, "stopped-validating", *SHORT, plant="signal_at_micro_batch:7"),  # in the last validation
        # In the second save: step 2.
        run_of(folder, "r2-full-disk", "run.save_every=1", plant="disk_full:2", expect=2),
        run_of(folder, "r2-nan", plant="not_finite:3"),
        run_of(folder, "r2-half-bf16", *BF16, plant="native_bf16:0"),
        run_of(folder, "r2-nans", "optimizer.epochs=3", "run.save_every=1", plant=f"not_finite:{NANS}", expect=2),
        run_of(folder, "weighted", *WEIGHTED, plant="weighted"),
        run_of(folder, "weighted-packed", *WEIGHTED, "data.packing=True", plant="weighted"),
        run_of(folder, "weighted-count", *WEIGHTED, "run.stop_at=1", plant="weighted_by_count"),
        run_of(folder, "stopped-2", *LONG, plant=copies),
        run_of(folder, "stopped-validating", *SHORT),
        run_of(folder, "r2-full-disk", plant=seen),
        run_of(folder, "r2", expect=2, plant=lost),  # only rank 0 looks, and every rank ends with exit code 2
    ]
    launch(folder, "two", 2, first)
    return runs


@pytest.fixture(scope="module")
def one(folder, two) -> Path:
    """Plain python: one process without torchrun."""
    checkpointing = (*BF16, "model.activation_checkpointing=full")
    runs = [
        run_of(folder, "r1"),
        run_of(folder, "r1-bf16", *BF16, plant="native_bf16:yes"),
        run_of(folder, "r1-bf16-checkpointing", *checkpointing, plant="native_bf16:yes"),
        run_of(folder, "r1-named", "model.layer_class=LlamaMLP", "run.stop_at=1"),
        run_of(folder, "stopped-1", *LONG),
    ]
    launch(folder, "one", 0, runs)
    return two


@pytest.fixture(scope="module")
def four(folder, two) -> Path:
    launch(folder, "four", 4, [run_of(folder, "r4"), run_of(folder, "stopped-4", *LONG)])
    return two


def first_steps(run: Path, reference: Path) -> tuple[dict, dict]:
    """The rows of a run that was ended early, and those of the same steps of another one."""
    found = rows(run)
    return found, {step: row for step, row in rows(reference).items() if step in found}


@pytest.mark.parametrize("other", ["r2", "r4"])
def test_the_update_does_not_depend_on_the_number_of_ranks(one, four, other) -> None:
    reference, run = one / "r1", one / other
    assert len(rows(reference)) == STEPS
    assert largest_difference(weights(reference), weights(run)) < 1e-5
    assert relative_difference(rows(reference), rows(run), "train/loss") < 1e-5
    assert relative_difference(rows(reference), rows(run), "train/grad_norm") < 1e-5


def test_averaging_micro_batch_means_is_detected(one) -> None:
    fault = one / "r2-means"
    assert largest_difference(weights(one / "r1"), weights(fault)) > 1e-3
    assert relative_difference(rows(one / "r1"), rows(fault), "train/loss") > 1e-3
    assert relative_difference(rows(one / "r1"), rows(fault), "train/grad_norm") > 1e-3


def test_fsdp_averaging_is_detected(one) -> None:
    """In the gradient norm: after clipping and AdamW the weights do not show the scale of a gradient."""
    first, right = (rows(one / name)[1]["train/grad_norm"] for name in ("r2-division", "r1"))
    assert first == pytest.approx(right / 2, rel=1e-4)


def test_gradients_reduced_in_bf16_differ_by_its_rounding(two) -> None:
    """bf16 has 8 bits: each gradient is rounded by up to 2^-9 = 2e-3 before it is added, and so is the sum."""
    rounded, exact = first_steps(two / "r2-reduced-bf16", two / "r2")
    assert 1e-6 < relative_difference(exact, rounded, "train/grad_norm") < 1e-3
    assert 0 < relative_difference(exact, rounded, "train/loss") < 1e-3


def test_packing_does_not_change_the_update(one) -> None:
    for right, packed in (("r1", "r2-packed"), ("weighted", "weighted-packed")):
        assert largest_difference(weights(one / right), weights(one / packed)) < 1e-5
        for key in ("train/loss", "train/grad_norm"):
            assert relative_difference(rows(one / right), rows(one / packed), key) < 1e-5


@pytest.fixture(scope="module")
def plain_loop(folder) -> tuple[float, float]:
    """Loss and gradient norm of the first weighted step: sum of w nll over sum of w, one document after the other."""
    source = weighted(WEIGHTS)
    items = plan_training(source, 1, 0, global_examples=6).batch(0).items
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager", dtype=torch.float32)
    total, divisor = torch.zeros(()), 0.0
    for ids, factors in (map(torch.from_numpy, source.get(item)) for item in items):
        nll = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total, divisor = total + (factors[1:] * nll).sum(), divisor + factors.double().sum().item()
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


def test_activation_checkpointing_is_bitwise_identical_in_bf16_and_weights_stay_fp32(one) -> None:
    """test_spread.py has every mode of it in fp32."""
    checkpointed, plain = first_steps(one / "r1-bf16-checkpointing", one / "r1-bf16")
    for key in ("train/loss", "train/grad_norm"):
        assert len(plain) == 2 and [r[key] for r in plain.values()] == [r[key] for r in checkpointed.values()]
    assert 0 < relative_difference(*first_steps(one / "r1-bf16", one / "r1"), "train/loss") < 2e-2


def test_if_one_of_two_ranks_has_no_native_bf16_both_compute_in_fp32(folder, two) -> None:
    assert "not every rank has native bf16: all ranks compute in fp32 instead" in (folder / "two.out").read_text()
    assert relative_difference(*first_steps(two / "r2-half-bf16", two / "r2"), "train/grad_norm") == 0


def test_a_lost_checkpoint_ends_both_ranks_with_the_same_sentence(folder, two) -> None:
    output = (folder / "two.out").read_text()
    assert "names 'step-999999', which does not exist" in output and "Connection closed" not in output


def test_layer_class_sets_the_sharding_unit(folder, one) -> None:
    assert "1 x LlamaMLP" in (folder / "one.out").read_text()
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
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 2 * STEPS + 1))
    assert [e.step for e in events.Scalars("validation/loss")] == [0, 2, 4, 6]


def test_a_signal_to_one_rank_in_the_middle_of_a_step_stops_all(folder, two) -> None:
    output = (folder / "two.out").read_text()
    assert "signal: stopped after step 3/6, saved" in output  # rank 0 prints it; another rank received the signal
    assert f"resumed from {two}/stopped-2/" in output


def test_a_clean_start_prints_six_lines_before_its_first_step(folder, two) -> None:
    lines = (folder / "two.out").read_text().partition("step 1/")[0].splitlines()
    printed = [line for line in lines if "tokenise" not in line and not line.startswith("step 0/")]
    first = [line.split()[0] for line in printed]
    assert first[:6] == ["run", "model", "data:", "step:", "schedule:", "memory:"], printed
    assert all(line.startswith("warning: ") for line in printed[6:]), printed
    recorded = (two / "r2-packed" / "start.txt").read_text()
    assert printed[1] in recorded and "a save writes" in recorded and "messages (messages)" in recorded


def test_a_slow_rank_is_named_once_and_its_time_is_a_curve(folder, two) -> None:
    said = f"warning: rank 1 on host {platform.node()} takes 30.0 times as long as the median rank for its part of forward, in 5"
    assert (folder / "two.out").read_text().count(said) == 1
    slowest = rows(two / "r2-long", "time/slowest_rank_seconds")
    assert list(slowest) == list(range(2, 2 * STEPS + 1))  # each row has the times of the row before
    for row in slowest.values():  # 2 micro-batches of 1 layer
        assert (row["time/slowest_rank_seconds"], row["time/median_rank_seconds"]) == (60.0, 2.0)


def test_every_rank_writes_a_trace_of_the_steps_of_run_profile(folder, two) -> None:
    traces = sorted((two / "r2-long" / "profile").iterdir())
    assert [trace.name for trace in traces] == [f"steps-2-4-rank-{rank}.json.gz" for rank in range(2)]
    for trace in traces:
        names = [event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
        assert "aten::mm" in names and names.count("gloo:all_reduce") + names.count("c10d::allreduce_") >= 3
    output = (folder / "two.out").read_text()
    assert "the trace of steps 2 to 4 is in " in output and "profiler_st" not in output  # the library is silent


def test_a_validation_interrupted_by_a_signal_is_done_after_the_resume(two) -> None:
    """Step 2 was saved before its validation. After the resume it is validated once, and is the best."""
    checkpoints = two / "stopped-validating" / "checkpoints"
    state = json.loads((checkpoints / "step-000002" / "manifest.json").read_text())["state"]
    assert state["evaluated"] == {"validation": 2} and state["best_step"] == 2
    assert sorted(rows(two / "stopped-validating", "validation/loss")) == [0, 2]


@pytest.mark.parametrize("ranks", [1, 4])
def test_resume_on_another_number_of_ranks(one, four, ranks) -> None:
    resumed = one / f"stopped-{ranks}"
    assert len(rows(resumed)) == 2 * STEPS
    assert largest_difference(weights(one / "r2-long"), weights(resumed)) < 1e-5


def test_a_non_finite_loss_skips_the_step_on_all_ranks(one, two) -> None:
    curve = rows(two / "r2-nan")
    assert [curve[step]["train/skipped_steps"] for step in range(1, STEPS + 1)] == [1] * STEPS
    assert curve[1]["train/loss"] != curve[1]["train/loss"]  # NaN is logged unchanged
    # The skipped step changed no weight: the second step starts from the pretrained weights.
    assert all(torch.isfinite(tensor).all() for tensor in weights(two / "r2-nan").values())
    assert largest_difference(weights(one / "r1"), weights(two / "r2-nan")) > 1e-4


def test_five_bad_steps_in_a_row_stop_the_run_with_a_good_checkpoint(folder, two) -> None:
    output = (folder / "two.out").read_text()
    assert "error: loss or gradient norm was not finite in 5 steps in a row, up to step 7" in output
    checkpoints = two / "r2-nans" / "checkpoints"
    # Saved at every good step. Step 2 is good: the losses that are not finite come from elsewhere, but who can know?
    assert (checkpoints / "latest").read_text() == "step-000001"
    state = json.loads((checkpoints / "step-000002.bad" / "manifest.json").read_text())["state"]
    assert (state["step"], state["loop"]["skipped_steps"], state["proven_step"]) == (2, 0, 1)


def test_a_full_disk_on_rank_0_stops_all_ranks_and_the_run_resumes_from_its_last_checkpoint(folder, two) -> None:
    assert "the checkpoint of step 2 needs" in (folder / "two.out").read_text()
    assert (folder / "full-disk-latest").read_text() == "step-000001"
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
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    # The same logits: the exported model reproduces the last validation loss of the run, document by document.
    made = load_documents((str(folder / "validation.jsonl"),), exported, 256, "error")
    total = 0.0
    for ids, flags in map(made.get, range(len(made))):
        log_p = model(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
        total -= sum(log_p[t - 1, ids[t]].item() for t in flags.nonzero()[0])
    assert rows(one / "r1", "validation/loss")[STEPS]["validation/loss"] == pytest.approx(
        total / made.targets.sum(), rel=1e-5
    )
    assert model.config.use_cache and model.config.architectures == ["LlamaForCausalLM"]
