"""Ranks that share the tokens of a micro-batch (sharding.context) compute the same as a single rank.

To compare all supported architectures, on as many ranks as their heads allow:

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=4 tests/distributed/context_worker.py FOLDER
"""

import json
from pathlib import Path

import pytest

from distributed.checkpoint_directory import latest_checkpoint, step_of
from scripts.verify import replay as replaying
from scripts.verify.files import check_files, read_record
from scripts.verify.replay import EXACT, replay
from scripts.verify.seen import seen
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
from tests.distributed.workload import write_workload
from tests.processes import run_ranks

pytestmark = pytest.mark.slow
FAMILIES = ("gemma2", "gpt_oss")  # softcaps, sliding windows, biases, sinks; with 4 ranks, keys are repeated
STEPS = 3
KILLED_AT = 20  # number of the forward, counted from the Fisher diagonal and the first validation on: it is in step 3
CURVES = (
    "train/loss",
    "train/grad_norm",
    "validation/loss",
    "validation/loss/general",
    "validation/nll",
    "ewc/penalty",
)


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("context")
    process = run_ranks(4, Path(__file__).with_name("context_worker.py"), folder, *FAMILIES, **ENVIRONMENT)
    assert process.returncode == 0, (process.stdout + process.stderr)[-4000:]
    return json.loads((folder / "4.json").read_text())


def test_loss_and_gradients_equal_one_rank(compared) -> None:
    assert set(compared) == {*FAMILIES, "tiled hybrid", "none"}
    for name, result in compared.items():
        assert result["loss"] < 1e-6 and result["gradient"] < 1e-5, (name, result)
        assert set(result["timeouts"]) == {7.0}, (name, result)  # run.timeout_minutes bounds every collective


def test_documents_stay_isolated_across_cuts_of_ranks(compared) -> None:
    for name in FAMILIES:
        distances = compared[name]["isolation"]
        assert distances["edited"] == 0.0 and distances["longer"] < 1e-6 and distances["moved"] > 0.1, (name, distances)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("context-runs")
    write_workload(folder, STEPS)
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> Path:
    """Run on 1 rank, on a pair of ranks, and for two steps on two pairs. Kill a run of a pair and resume it on 4 sharing ranks."""
    settings = (f"run.eval_every={STEPS}", "data.sequence_length=160", "ewc.documents=8", "optimizer.warmup_steps=0")
    general = ("run.eval_general=True", *settings)
    launch(folder, "one", 1, [run_of(folder, "r1", *general)])
    killed = run_of(folder, "killed", *settings, "sharding.context=2", plant=f"kill_at_micro_batch:{KILLED_AT}")
    plan = write_plan(
        folder, "two", [run_of(folder, "pair", *general, "sharding.context=2", "model.mlp_tiles=2"), killed]
    )
    process = run_ranks(2, WORKER, plan, **ENVIRONMENT)
    assert (folder / "two.0.rank1.exit").is_file(), process.stdout + process.stderr
    assert process.returncode, "the kill came too late"
    assert 0 < step_of(latest_checkpoint(folder / "runs" / "killed" / "checkpoints")) < STEPS
    four = [
        run_of(folder, "refused", "sharding.context=3", expect=2),
        run_of(
            folder, "pairs", *settings, "sharding.context=2", "model.activation_checkpointing=full", "run.stop_at=2"
        ),
        run_of(folder, "killed", *settings, "sharding.context=4"),
    ]
    output = launch(folder, "four", 4, four)
    assert "sharding.context=3: groups of 3 ranks share a micro-batch, and 4 is not a multiple of 3" in output
    assert "step 1 is dealt to 2 groups of 2 ranks" in output and "sharding.context: 2 -> 4" in output
    return folder / "runs"


@pytest.mark.parametrize("name", ["pair", "pairs", "killed"])
def test_run_equals_one_rank_after_kill_and_regrouping(runs, name) -> None:
    for curve in CURVES:
        # The penalty is computed from small differences of weights.
        limit = 1e-3 if curve.startswith("ewc") else 1e-5
        before = {step: row for step, row in rows(runs / "r1", curve).items() if row[curve]}
        after = {step: row for step, row in rows(runs / name, curve).items() if step in before}
        if name == "pairs":
            before = {step: row for step, row in before.items() if step < STEPS}
        assert relative_difference(before, after, curve) < limit, curve
    assert name == "pairs" or largest_difference(weights(runs / "r1"), weights(runs / name)) < 1e-5


def test_forgetting_is_measured_on_all_tokens_once(runs) -> None:
    (_, alone), (_, shared) = (sorted(rows(runs / name, "forgetting/kl").items())[-1] for name in ("r1", "pair"))
    assert alone["step"] == shared["step"] == STEPS and alone["forgetting/kl"] > 1e-3
    for curve in ("forgetting/kl", "forgetting/perplexity_per_byte", "forgetting/agreement", "forgetting/questions"):
        assert shared[curve] == pytest.approx(alone[curve], rel=1e-4), curve


def test_replay_of_context_groups_is_bitwise(folder, runs, monkeypatch) -> None:
    messages, entries = list[str](), read_record(runs / "pairs")
    assert list(check_files(runs / "killed", read_record(runs / "killed"), None))  # continued by other groups
    lines = [line for line in seen(entries, str(folder / "train.jsonl")) if "| steps " in line]
    assert {line.rpartition("(")[2] for line in lines} == {"ranks 0 to 1)", "ranks 2 to 3)"}

    def train(command: list[str], *_: object) -> tuple[int, str]:
        return 0, launch(folder, "replay", 2, [{"arguments": command[-1:]}])

    monkeypatch.setattr(replaying, "run_train", train)
    assert replay(runs / "pair", read_record(runs / "pair"), 2, messages.append) == EXACT
    assert any(line.startswith("steps 3 to 3") for line in messages)
