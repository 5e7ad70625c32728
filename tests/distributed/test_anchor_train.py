"""train.py with an anchored source on 1 and 2 gloo processes: equal updates, stop and resume, more steps, smaller KL."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.launch import largest_difference, launch, relative_difference, rows, run_of, weights, workplace
from tests.tiny import SENTENCES
from training.anchor import ROW

pytestmark = pytest.mark.slow
STEPS, WEIGHT = 6, 3.0
KL = "train/loss/base"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("anchor_train")
    texts = [sentence[10 * i :] for i in range(6) for sentence in SENTENCES]
    (folder / "base.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return workplace(
        folder,
        2 * STEPS,
        data='mix=(Source("base", (here + "/base.jsonl",), 0.4, anchor=True),)',
        batch="global_examples=2",
        rate=3e-3,
        run="save_every=2, log_to=()",
        more=f"forgetting=Forgetting(anchor_weight={WEIGHT}),",
    )


@pytest.fixture(scope="module")
def runs(folder) -> Path:
    runs, replay = folder / "runs", (f"data.mix=base:0.4:{folder}/base.jsonl", "forgetting.anchor_weight=1")
    constant = "optimizer.min_lr_ratio=1"
    all_runs = [
        run_of(folder, "r2", "run.eval_general=True"),
        run_of(folder, "replay", *replay, "run.eval_general=True"),
        run_of(folder, "stopped", plant="signal_at_micro_batch:4"),
        run_of(folder, "stopped"),
        run_of(folder, "short", "optimizer.max_steps=2", constant),
        run_of(folder, "short", constant),
    ]
    assert "signal: stopped after step 3/6, saved" in launch(folder, "two", 2, all_runs)
    launch(folder, "one", 1, [run_of(folder, "r1")])
    return runs


def test_the_number_of_ranks_does_not_matter(runs) -> None:
    assert largest_difference(weights(runs / "r2"), weights(runs / "r1")) < 1e-4
    for key in ("train/loss", "train/grad_norm"):
        assert relative_difference(rows(runs / "r2"), rows(runs / "r1"), key) < 1e-3


def test_a_stop_changes_no_bit(runs) -> None:
    assert largest_difference(weights(runs / "r2"), weights(runs / "stopped")) == 0.0
    assert (runs / "r2" / "anchor" / "rows").read_bytes() == (runs / "stopped" / "anchor" / "rows").read_bytes()


def test_the_curves(runs) -> None:
    """The source's curve is its KL, which begins at 0. The step's loss has weight x KL, with one divisor for all targets."""
    curve = rows(runs / "r2")
    assert len(curve) == STEPS and abs(curve[1][KL]) < 1e-5 and curve[STEPS][KL] > 1e-3
    for row in curve.values():
        share = row["train/step_share/base"]
        total = (1 - share) * row["train/loss/main"] + share * WEIGHT * row[KL]
        assert row["train/loss"] == pytest.approx(total, rel=1e-5) and 0 < share < 1


def test_anchor_stays_nearer_to_base_than_replay(runs) -> None:
    anchored, replayed = (rows(runs / name, "forgetting/kl")[STEPS]["forgetting/kl"] for name in ("r2", "replay"))
    assert 0 < anchored < 0.8 * replayed
    assert rows(runs / "replay")[1][KL] > 1  # cross-entropy
    assert not (runs / "replay" / "anchor").exists()
    assert rows(runs / "replay")[1]["train/loss/main"] == rows(runs / "r2")[1]["train/loss/main"]


def test_with_more_steps_the_base_predicts_again(folder, runs) -> None:
    """The base's rows equal the rows of a run that computed all of them at its start, although training has begun."""
    output = (folder / "two.out").read_text()
    assert output.count("the base predicts the targets of 2 documents of base") == 1
    # r2, stopped, and short with all steps.
    assert output.count("the base predicts the targets of 8 documents of base") == 3
    log_probabilities = {}
    for name in ("short", "r2"):
        table = np.fromfile(runs / name / "anchor" / "rows", ROW)
        documents = np.load(runs / name / "anchor" / "documents.npy")
        log_probabilities[name] = np.concatenate([table[first:end] for first, end in documents if end])["log_p"].astype(
            float
        )
    np.testing.assert_allclose(log_probabilities["short"], log_probabilities["r2"], rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(np.exp(log_probabilities["r2"]).sum(1), 1, atol=5e-3)
