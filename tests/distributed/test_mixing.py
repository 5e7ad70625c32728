"""train.py on a mix of sources, including token stores, on 1 and 2 gloo processes: losses by source, stop and resume."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs.config import Source
from data.batches import TrainingPlan, plan_training
from data.encoding import ExampleEncoder
from data.reader import Reader
from data.token_store import build_store
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
from tests.tiny import SENTENCES, tiny_tokenizer

NAMES = ("main", "general", "law")
SHARES = (0.6, 0.3, 0.1)
STEPS = 10
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Write a tiny model, 20 chats, two text sources (short texts, and a long document that is cut), and token stores."""
    mix = """mix=(
        Source("general", (here + "/general.jsonl",), 0.3, (here + "/general_held_out.txt",)),
        Source("law", (here + "/law.txt",), 0.1),
    )"""
    folder = workplace(tmp_path_factory.mktemp("mixing"), 20, 5, model={"layers": 1}, data=mix, optimizer="epochs=2")
    texts = [sentence[: 20 + 10 * i] for i in range(8) for sentence in SENTENCES]
    (folder / "general.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "general_held_out.txt").write_text(" ".join(SENTENCES))
    (folder / "law.txt").write_text(" ".join(reversed(SENTENCES)) * 9)
    for name, file, shard_tokens in (
        ("store", "general.jsonl", 150),  # several shards
        ("store_held_out", "general_held_out.txt", 10**6),
    ):
        build_store([folder / file], tiny_tokenizer(), folder / name, shard_tokens)
    return folder


def store_is_main(folder: Path) -> tuple[str, ...]:
    """Return overrides for a token store as main source: windows of 64 tokens, 3 per step, with texts mixed in."""
    main = (f"data.train={folder}/store", f"data.validation={folder}/store_held_out", "data.sequence_length=64")
    return (*main, f"data.mix=law:0.25:{folder}/law.txt", "batch.global_examples=3")


@pytest.fixture(scope="module")
def plan(folder) -> TrainingPlan:
    """Make the plan of the runs in this process."""
    mix = (Source("general", (f"{folder}/general.jsonl",), 0.3), Source("law", (f"{folder}/law.txt",), 0.1))
    corpus = Reader(ExampleEncoder(tiny_tokenizer()), 384, 256, "drop").training((f"{folder}/train.jsonl",), mix)
    return plan_training(corpus, 2, 0, global_examples=4)


@pytest.fixture(scope="module")
def on_two_ranks(folder) -> Path:
    """Run on 2 ranks. `stopped` is stopped after the first epoch and resumed; its chats come from a URL that is gone by then."""
    elsewhere = shutil.copy(folder / "train.jsonl", folder / "elsewhere.jsonl")
    stopped, store = (f"data.train=file://{elsewhere}", "run.save_every=2"), store_is_main(folder)
    runs = [
        run_of(folder, "r2"),
        run_of(folder, "stopped", *stopped, "data.validation=", "run.stop_at=5"),
        run_of(folder, "stopped", *stopped, plant=f"first:Path('{elsewhere}').unlink()"),
        run_of(folder, "store2", *store),
        run_of(folder, "store-moved", *store, "data.validation=", "run.stop_at=3"),  # resumed at world size 1
    ]
    launch(folder, "two", 2, runs)
    return folder / "runs"


@pytest.fixture(scope="module")
def on_one_rank(folder, on_two_ranks) -> Path:
    """Run on 1 rank. `other` validates on the held-out text of `general`, as its main source."""
    other = (f"data.validation={folder}/general_held_out.txt", "data.mix=none", "optimizer.max_steps=1")
    runs = [
        run_of(folder, "r1"),
        run_of(folder, "r1-tokens", "batch.global_examples=None", "batch.global_tokens=120", "run.log_every=5"),
        run_of(folder, "plain", "data.mix=none", "optimizer.max_steps=1"),
        run_of(folder, "other", *other),
        run_of(folder, "store1", *store_is_main(folder)),
        run_of(folder, "store-moved", *store_is_main(folder)),
    ]
    launch(folder, "one", 1, runs)
    return folder / "runs"


def curves(run: Path, name: str) -> list[float]:
    """Return train/loss/NAME of every step, NaN if the step had no target token of the source."""
    return [row.get(f"train/loss/{name}", float("nan")) for row in rows(run).values()]


def test_mixed_run_is_independent_of_ranks(on_one_rank, on_two_ranks) -> None:
    assert len(rows(on_one_rank / "r1")) == STEPS
    assert_same_update(
        on_two_ranks / "r2", on_one_rank / "r1", keys=("train/loss", "train/grad_norm", "train/share/general")
    )
    for name in NAMES:
        np.testing.assert_allclose(curves(on_one_rank / "r1", name), curves(on_two_ranks / "r2", name), rtol=1e-5)


def test_resume_is_bitwise_for_weights_and_curves(folder, on_two_ranks) -> None:
    assert (folder / "two.out").read_text().count("run.stop_at: stopped after step 5/") == 1
    assert largest_difference(weights(on_two_ranks / "r2"), weights(on_two_ranks / "stopped")) == 0.0
    resumed = rows(on_two_ranks / "stopped")
    for number, row in rows(on_two_ranks / "r2").items():
        kinds = ("train/loss", "train/share", "train/grad", "train/epoch")
        same = {key: value for key, value in row.items() if key.startswith(kinds)}
        assert len(same) >= 7 and same == {key: resumed[number][key] for key in same}


def test_resume_needs_no_remote_source(folder, on_two_ranks) -> None:
    assert not (folder / "elsewhere.jsonl").exists()
    output = (folder / "two.out").read_text()
    [record] = (folder / "tokens" / "fetched").glob("*/source.json")
    assert json.loads(record.read_text())["source"] == f"file://{folder}/elsewhere.jsonl"
    assert len(re.findall(rf"fetched on [\d-]+ into {folder}/tokens/fetched/", output)) >= 2  # at both starts


def test_losses_by_source_add_up_to_the_loss(on_one_rank, on_two_ranks, plan) -> None:
    for run in (on_one_rank / "r1", on_two_ranks / "r2"):
        for step, row in rows(run).items():
            targets = plan.batch(step - 1).targets_by_source
            parts = [row.get(f"train/loss/{name}", 0.0) * n for name, n in zip(NAMES, targets, strict=True)]
            assert sum(parts) / sum(targets) == pytest.approx(row["train/loss"], rel=1e-5)
            assert all((f"train/loss/{name}" in row) == (n > 0) for name, n in zip(NAMES, targets, strict=True))
    assert len({round(loss, 3) for loss in (curves(on_one_rank / "r1", name)[0] for name in NAMES)}) == 3


def test_the_logged_share_is_the_realised_one(on_one_rank, plan) -> None:
    counts = np.cumsum([plan.batch(step).targets_by_source for step in range(STEPS)], axis=0)
    for step, row in rows(on_one_rank / "r1").items():
        logged = [row[f"train/share/{name}"] for name in NAMES]
        assert logged == pytest.approx(counts[step - 1] / counts[step - 1].sum())
    assert logged == pytest.approx(SHARES, abs=0.05)  # ten small steps, whole documents


def test_losses_by_source_average_steps_since_last_row(on_one_rank, plan) -> None:
    """With `global_tokens` and every fifth step logged, a row covers the targets of five steps."""
    logged = rows(on_one_rank / "r1-tokens")
    assert list(logged)[:2] == [5, 10]
    assert all(f"train/loss/{name}" in row for row in logged.values() for name in ("main", "general"))
    assert any("train/loss/law" in row for row in logged.values())  # it comes in windows of 255 targets
    for row in logged.values():
        parts = [row.get(f"train/loss/{name}", 0.0) * row[f"train/step_share/{name}"] for name in NAMES]
        assert row["train/loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert list(logged.values())[-1]["train/epoch"] == 2.0


def test_validation_by_source(on_one_rank, on_two_ranks) -> None:
    first = rows(on_one_rank / "r1", "validation/loss")[0]
    plain, general_only = (rows(on_one_rank / name, "validation/loss")[0] for name in ("plain", "other"))
    assert first["validation/loss"] == pytest.approx(plain["validation/loss"], rel=1e-5)  # the main source only
    assert first["validation/loss/general"] == pytest.approx(general_only["validation/loss"], rel=1e-5)
    assert "validation/loss/law" not in first and "validation/loss/general" not in plain
    assert (
        relative_difference(
            rows(on_one_rank / "r1", "validation/loss"),
            rows(on_two_ranks / "r2", "validation/loss"),
            "validation/loss/general",
        )
        < 1e-5
    )
    assert "train/loss/main" not in rows(on_one_rank / "plain")[1]


def test_training_on_store_is_independent_of_ranks(on_one_rank, on_two_ranks) -> None:
    assert len(rows(on_one_rank / "store1")) == 8
    assert_same_update(
        on_two_ranks / "store2", on_one_rank / "store1", keys=("train/loss", "train/grad_norm", "train/share/main")
    )
    np.testing.assert_allclose(curves(on_one_rank / "store1", "law"), curves(on_two_ranks / "store2", "law"), rtol=1e-5)
    # A store can also be validation data. Before the first step the models are equal.
    first = rows(on_one_rank / "store1", "validation/loss")[0]["validation/loss"]
    assert first == pytest.approx(rows(on_two_ranks / "store2", "validation/loss")[0]["validation/loss"], rel=1e-5)


def test_a_store_resumes_on_another_number_of_ranks(folder, on_one_rank) -> None:
    assert "resumed from" in (folder / "one.out").read_text()
    assert largest_difference(weights(on_one_rank / "store1"), weights(on_one_rank / "store-moved")) < 1e-5
