"""Runs that are continued with other settings, stopped at the wrong moment or damaged: none ends with a wrong result."""

import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distributed.checkpoint_directory import latest_checkpoint
from model.weights import tensors_of_checkpoint
from tests.distributed.launch import flip_bit, largest_difference, launch, rows, run_of, weights, workplace
from tests.tiny import write_chat_file
from training.checkpointer import Record
from training.ending import sums_of
from training.identity import fingerprint
from training.owner import own_directory

pytestmark = pytest.mark.slow
EVERY_STEP = ("run.save_every=1", "run.eval_every=1")
# The forwards of a run on 2 ranks: 2 rows of validation on each rank at step 0, then 2 rows per step.
HIGH, DIVERGES = ("optimizer.learning_rate=1e30", "run.log_every=10"), ("optimizer.learning_rate=1e39",)
SEVEN = ("optimizer.epochs=2", "optimizer.max_steps=7", "data.validation=")
BY_RANK = ("optimizer.max_steps=3", "run.stop_after_no_gain=1", "run.export=best", "run.timeout_minutes=5")
SPIKES = ("optimizer.skip_spikes=3", *EVERY_STEP, "optimizer.max_steps=3")
OTHER = ("optimizer.learning_rate=1e-5", "optimizer.weight_decay=0.0")
# The weights get worse from step to step, so that the best is the first that is evaluated, and saved for that alone.
WORSE = ("run.eval_every=2", "run.eval_general=True", "optimizer.max_steps=3")
WORSE += ("optimizer.learning_rate=0.3", "optimizer.min_lr_ratio=1")
SHORT = "import distributed.gradients as room; set_attribute(room, 'MIN_HISTORY', 2)"
SPIKE = f"first:{SHORT} and last:{SHORT} and gradients_of_last_rank:1,1,100"  # in step 3
LITTLE_MEMORY = "import training.micro_batch as room; set_attribute(room, 'free_bytes', lambda *of: 1)"
NO_WAIT = (
    "set_attribute(training.start, 'own_directory', functools.partial(training.start.own_directory, wait_seconds=0))"
)
ALONE_ON_ITS_NODE = "first:os.environ['LOCAL_WORLD_SIZE'] = '1'"  # rank 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, data and the config: 5 steps in an epoch."""
    folder = workplace(tmp_path_factory.mktemp("durable"), 20, 4, model={"layers": 1})
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "fewer.jsonl").write_text("".join(lines[:16]))
    write_chat_file(folder / "validation-2.jsonl", 4, seed=2)
    return folder


@pytest.fixture(scope="module")
def first(folder, ranks) -> str:
    """The first starts of all runs, on 2 ranks. This process owns the directory of `owned`."""
    plan = [
        run_of(folder, "straight", *EVERY_STEP),
        run_of(folder, "longer", "optimizer.max_steps=3", "data.validation="),
        run_of(folder, "export", *WORSE, "run.keep_last=1", plant="gradients_of_last_rank:1,nan,1"),
        run_of(
            folder, "worse", "optimizer.learning_rate=3", "optimizer.max_steps=2", "run.export=best", "run.best_by=nll"
        ),
        run_of(folder, "judged", *EVERY_STEP, "optimizer.max_steps=3"),
        run_of(folder, "high", *HIGH, *SEVEN, "run.save_every=1", expect=2),
        run_of(folder, "high-later", *EVERY_STEP, plant="signal_at_micro_batch:12"),
        run_of(folder, "last-step", *DIVERGES, "optimizer.max_steps=1", "data.validation=", expect=2),
        run_of(folder, "last-batch", "data.validation=", plant="bad_batch:4"),
        run_of(folder, "by-rank", *EVERY_STEP, *BY_RANK, plant="figures_by_rank"),
        run_of(folder, "disagree", plant=f"last:sys.argv.append('data.train={folder / 'fewer.jsonl'}')", expect=2),
        run_of(folder, "auto", "batch.micro_batch=auto", "optimizer.max_steps=1", plant=f"last:{LITTLE_MEMORY}"),
        run_of(folder, "auto-on-one", plant="last:sys.argv.append('batch.micro_batch=auto')", expect=2),
        run_of(folder, "owned", plant=f"first:{NO_WAIT}", expect=2),
        run_of(folder, "nowhere", f"run.directory={folder / 'train.jsonl'}", expect=2),
        run_of(folder, "spikes", *SPIKES, plant=SPIKE),
        run_of(folder, "unlike", "sharding.strategy=hybrid", plant=ALONE_ON_ITS_NODE, expect=2),
    ]
    with own_directory(folder / "runs" / "owned", ranks):
        return launch(folder, "first", 2, plan)


@pytest.fixture(scope="module")
def second(folder, first) -> str:
    """The second starts, and some third ones."""
    runs = folder / "runs"
    (folder / "steps-high").write_text("\n".join(p.name for p in (runs / "high" / "checkpoints").iterdir()))
    flip_bit(runs / "spikes" / "export" / "model.safetensors")
    longer = ("optimizer.max_steps=5", "data.validation=")
    later, diverges = runs / "high-later" / "checkpoints", (*EVERY_STEP, *DIVERGES, "optimizer.epochs=2")
    names = f"first:Path('{folder}/later').write_text(str(sorted(path.name for path in Path('{later}').iterdir())))"
    plan = [
        # Stopped by a signal in the check of the last weights, after the fifth step: 2 steps of 2 forwards.
        run_of(folder, "longer", *longer, plant="signal_at_micro_batch:4"),
        run_of(folder, "longer", *longer),
        run_of(folder, "longer", *longer),
        run_of(folder, "export", *WORSE, "run.export=best"),
        run_of(folder, "judged", *EVERY_STEP, f"data.validation={folder / 'validation-2.jsonl'}"),
        run_of(folder, "high", *SEVEN),
        run_of(folder, "high-later", *diverges, "run.resume=changed", expect=2),
        run_of(folder, "high-later", *EVERY_STEP, plant=names),
        run_of(folder, "spikes", *SPIKES),
        run_of(folder, "spikes", *SPIKES),
        run_of(folder, "spikes", *SPIKES, *OTHER, expect=2),
        run_of(folder, "spikes", *SPIKES, *OTHER, "run.resume=changed", expect=2),
        run_of(folder, "straight", *EVERY_STEP, "run.resume=never", expect=2),
    ]
    return launch(folder, "second", 2, plan)


def record(run: Path) -> dict:
    return json.loads((run / "export" / "export.json").read_text())


def manifest(run: Path, step: int) -> dict:
    return json.loads((run / "checkpoints" / f"step-{step:06d}" / "manifest.json").read_text())


def test_finished_run_with_more_steps_continues(folder, second) -> None:
    """It was stopped after its last save, when the export still held the shorter run's weights."""
    assert "optimizer.max_steps: 3 -> 5" in second and "steps in total: 3 -> 5" in second
    assert "signal: stopped after step 5/5, saved" in second
    assert "exported the last weights (step 5, float32)" in second
    assert record(folder / "runs" / "longer")["step"] == 5
    assert second.count("already finished: 5 steps; ") == 1


def test_changed_run_export_exports_again(folder, first, second) -> None:
    run = folder / "runs" / "export"
    losses = {step: row["validation/loss"] for step, row in rows(run, "validation/loss").items() if step}
    best = min(losses, key=losses.get)
    assert best < 3
    assert f"the lowest validation loss, {losses[best]:.4g}, was that of step {best}: start again with" in first
    exported = record(run)
    weights_file = run / "export" / "model.safetensors"
    assert exported["files"]["model.safetensors"] == hashlib.sha256(weights_file.read_bytes()).hexdigest()
    keys = ("weights", "step", "steps_in_total", "validation_loss", "dtype")
    assert [exported[key] for key in keys] == ["best", best, 3, losses[best], "float32"]
    assert f"exported the best weights (step {best}, validation loss {losses[best]:.4g}, float32)" in second
    assert "run.export: last -> best" in second


def test_base_model_as_best_gives_a_warning(folder, first) -> None:
    run = folder / "runs" / "worse"
    base = rows(run, "validation/loss")[0]["validation/loss"]
    assert base < record(run)["validation_loss"] and record(run)["weights"] == "best"
    assert "warning: no trained checkpoint is better than the base model on data.validation" in first
    nll = rows(run, "validation/nll")[2]["validation/nll"]
    assert (record(run)["best_by"], record(run)["best_value"]) == ("validation/nll:min", nll)


def test_new_validation_data_forgets_the_best(folder, second) -> None:
    run = folder / "runs" / "judged"
    assert "data.validation has changed: the next evaluation is the first that counts" in second
    state = manifest(run, 5)["state"]
    assert state["best_step"] == 5 and state["best_loss"] == rows(run, "validation/loss")[5]["validation/loss"]
    assert state["base_loss"] is None


def test_ranks_with_other_data_do_not_start(folder, first) -> None:
    """Four examples fewer on one rank: it would wait for a step that the others never take."""
    assert "rank 1 on host" in first and "fewer.jsonl" in first and "steps in total (4 instead of 5)" in first
    assert not (folder / "runs" / "disagree").exists()


def test_all_ranks_take_the_smallest_micro_batch(folder, first) -> None:
    """And a rank whose config has a number does not wait for one whose config says auto."""
    assert "batch.micro_batch=auto: 1 (1 examples at most), what memory holds; memory holds 0: 70% of" in first
    assert "rank 0 has come to the start, but rank 1 to the size of the micro-batch: give all nodes the same" in first


def test_refused_directory_is_one_sentence_on_all_ranks(folder, first) -> None:
    owned = folder / "runs" / "owned"
    assert first.count(f"{owned} belongs to a run that has not ended: process {os.getpid()} on host") == 1
    assert [path.name for path in owned.iterdir()] == ["run.lock"]
    assert first.count("train.jsonl/nowhere: Not a directory; run.directory must be on a disk that can be") == 1


def test_hybrid_needs_equal_nodes(folder, first) -> None:
    """One of them would make another mesh, whose collectives the others do not have."""
    assert "rank 1 on host" in first and "in sharding.shard_size (2 instead of 1); give all ranks the same" in first
    assert not (folder / "runs" / "unlike").exists()


def test_nothing_bad_is_saved_over_good_checkpoints(folder, first, second) -> None:
    """The only good weights are the base's: step 1 has a finite loss and leaves weights of 1e30."""
    assert "not finite in 5 steps in a row, up to step 6; step-000001.bad in" in first
    assert "the run continues from the base model" in first
    assert (folder / "steps-high").read_text().split() == ["step-000001.bad"]
    base = load_file(folder / "model" / "model.safetensors")
    assert largest_difference(base, weights(folder / "runs" / "high")) < 0.1
    assert len(rows(folder / "runs" / "high")) == 7  # with the usual learning rate it has all its steps, once each


def test_diverging_resume_keeps_its_good_checkpoint(folder, second) -> None:
    warning = "step-000003 was made with optimizer.learning_rate=0.001, now it is 1e+39; run.resume=changed continues"
    assert warning in second
    assert "start again with run.resume=changed: the run continues from the checkpoint of step 3" in second
    assert "which is good" in second
    assert "'step-000003', 'step-000004.bad'" in (folder / "later").read_text()
    assert largest_difference(weights(folder / "runs" / "straight"), weights(folder / "runs" / "high-later")) == 0.0


def test_bad_final_weights_are_an_error(folder, first) -> None:
    assert "the loss of the last steps is not finite with the weights after step 1; lower" in first
    run = folder / "runs" / "last-step"
    assert not (run / "export").exists() and latest_checkpoint(run / "checkpoints") is None


def test_bad_last_batch_keeps_good_weights(folder, first) -> None:
    """The last step was skipped, so the weights of step 4 remain. The batch of step 4 proves them."""
    run = folder / "runs" / "last-batch"
    assert [row["train/skipped_steps"] for row in rows(run).values()] == [0, 0, 0, 0, 1]
    assert math.isnan(rows(run)[5]["train/loss"]) and record(run)["step"] == 5
    step_4 = tensors_of_checkpoint(folder / "runs" / "straight" / "checkpoints" / "step-000004")
    for name, tensor in weights(run).items():
        assert torch.equal(step_4.read(name)[: len(tensor)], tensor), name


def test_all_ranks_follow_rank_0_figures(folder, first) -> None:
    """By its own figures rank 1 would have ended the run after step 2, and saved nothing as the best."""
    run = folder / "runs" / "by-rank"
    losses = {step: row["validation/loss"] for step, row in rows(run, "validation/loss").items()}
    assert losses == {0: 9.0, 1: 8.0, 2: 7.0, 3: 6.0}
    assert (record(run)["weights"], record(run)["step"], record(run)["validation_loss"]) == ("best", 3, 6.0)


def test_spike_is_skipped_and_counted(folder, first) -> None:
    loop = manifest(folder / "runs" / "spikes", 3)["state"]["loop"]
    assert [loop[key] for key in ("step", "updates", "skipped_steps", "bad_steps_in_a_row")] == [3, 2, 1, 0]
    assert len(loop["norms"]) == 3 and "SKIPPED, a spike of the gradient norm (1 so far)" in first
    logged = [row["train/grad_norm"] for row in rows(folder / "runs" / "spikes").values()]
    assert logged == loop["norms"] and logged[2] > 10 * logged[1]  # the norm of the skipped step, unclipped


def test_flipped_bit_in_finished_export_is_mended(folder, second) -> None:
    run = folder / "runs" / "spikes"
    damaged = f"{run / 'export' / 'model.safetensors'} has changed: its SHA-256 is not that of export.json"
    assert second.count(f"warning: {damaged}; the weights of step 3 are exported again") == 1
    assert f"already finished: 3 steps; {run / 'export'} holds the last weights" in second  # the start after that one
    exported = record(run)
    assert exported["files"] == sums_of(run / "export") and exported["files"].keys() > {"config.json", "tokenizer.json"}
    assert exported["identity"] == fingerprint(manifest(run, 3)["state"]["identity"])


def test_finished_run_with_other_settings_is_refused(folder, second) -> None:
    what = "spikes/checkpoints/step-000003 was made with optimizer.learning_rate=0.001, now it is 1e-05; "
    what += "optimizer.weight_decay=0.1, now it is 0.0; "
    assert f"{what}set it back, start a new run with another run.name, or continue with what is set now" in second
    assert "spikes has taken all of its 3 steps before it was changed" in second  # with run.resume=changed


def test_resume_never_refuses_an_existing_run(folder, second) -> None:
    run = folder / "runs" / "straight"
    assert second.count(f"{run} exists and run.resume=never; choose another run.name or remove it") == 1


def test_only_starts_that_train_are_recorded(folder, second) -> None:
    starts = [entry.content for entry in Record(folder / "runs" / "longer").read() if entry.kind == "start"]
    assert [start["start_step"] for start in starts] == [0, 3, 5]
    assert [start["config"]["optimizer"]["max_steps"] for start in starts] == [3, 5, 5]
