"""train.py on a mix of sources, including token stores, on 1 and 2 gloo processes: losses by source, stop and resume."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import model.loss
from configs.config import Source
from data.batches import Plan, plan_training
from data.dealing import Dealer, one_per_token
from data.reader import Reader
from data.sources import Corpus
from data.token_store import build_store
from model.loss import LossSums
from tests.distributed.launch import largest_difference, launch, relative_difference, rows, run_of, weights
from tests.losses import loss_sum
from tests.tiny import SENTENCES, tiny_tokenizer, write_chat_file, write_tiny_model

NAMES = ("main", "general", "law")
SHARES = (0.6, 0.3, 0.1)
STEPS = 10
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two tiny models, 20 chats, two text sources (short texts, and one long document that is cut), and token stores."""
    folder = tmp_path_factory.mktemp("mixing")
    write_tiny_model(folder / "model")
    write_tiny_model(folder / "untied", tied=False)
    write_chat_file(folder / "main.jsonl", 20, seed=0)
    write_chat_file(folder / "main_held_out.jsonl", 5, seed=1)
    texts = [sentence[: 20 + 10 * i] for i in range(8) for sentence in SENTENCES]
    (folder / "general.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "general_held_out.txt").write_text(" ".join(SENTENCES))
    (folder / "law.txt").write_text(" ".join(reversed(SENTENCES)) * 9)
    (folder / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:9]))
    for name, file, shard_tokens in (
        ("store", "general.jsonl", 150),  # several shards
        ("store_held_out", "general_held_out.txt", 10**6),
        ("few", "few.jsonl", 10**6),
    ):
        build_store([folder / file], tiny_tokenizer(), folder / name, shard_tokens)
    (folder / "config.py").write_text(f"""
from configs.config import *
here = {str(folder)!r}
config = Config(
    model=Model(here + "/model", compute_dtype="fp32"),
    data=Data(
        (here + "/main.jsonl",),
        (here + "/main_held_out.jsonl",),
        mix=(
            Source("general", (here + "/general.jsonl",), 0.3, (here + "/general_held_out.txt",)),
            Source("law", (here + "/law.txt",), 0.1),
        ),
        sequence_length=256,
        cache=here + "/tokens",
    ),
    batch=Batch(global_examples=4, micro_batch=1),
    optimizer=Optimizer(1e-3, epochs=2, warmup_steps=0),  # a high learning rate, so that a wrong gradient shows
    run=Run("base", directory=here + "/runs", keep_last=9),
)
""")
    return folder


def store_is_main(folder: Path) -> tuple[str, ...]:
    """Overrides: windows of 64 tokens, 3 per step, with texts mixed in."""
    main = (f"data.train={folder}/store", f"data.validation={folder}/store_held_out", "data.sequence_length=64")
    return (*main, f"data.mix=law:0.25:{folder}/law.txt", "batch.global_examples=3")


def store_is_mixed_in(folder: Path) -> tuple[str, ...]:
    """Overrides: chats, with a store that provides 60% of the target tokens."""
    return (
        f"data.mix=store:0.6:{folder}/store:{folder}/store_held_out",
        "data.sequence_length=128",
        "optimizer.epochs=1",
    )


def forwards(plan: Plan, corpus: Corpus, sequence_length: int, steps: int) -> int:
    """Forwards of one of two ranks in the first steps."""
    dealer = Dealer(sequence_length, one_per_token)
    return sum(len(dealer.deal(plan.batch(step).items, corpus, 2).items) for step in range(steps))


@pytest.fixture(scope="module")
def corpus(folder) -> Corpus:
    """The sources of the runs, read in this process."""
    reader = Reader(tiny_tokenizer(), 384, 256, "drop")
    mix = (Source("general", (f"{folder}/general.jsonl",), 0.3), Source("law", (f"{folder}/law.txt",), 0.1))
    return reader.training((f"{folder}/main.jsonl",), mix)


@pytest.fixture(scope="module")
def plan(corpus) -> Plan:
    """The plan of the runs."""
    return plan_training(corpus, 2, 0, global_examples=4)


@pytest.fixture(scope="module")
def store_corpus(folder) -> Corpus:
    """The sources of the runs whose main source is a store."""
    reader = Reader(tiny_tokenizer(), 384, 64, "drop")
    return reader.training((f"{folder}/store",), (Source("law", (f"{folder}/law.txt",), 0.25),))


@pytest.fixture(scope="module")
def store_plan(store_corpus) -> Plan:
    """The plan of these runs."""
    return plan_training(store_corpus, 2, 0, global_examples=3)


@pytest.fixture(scope="module")
def two(folder, corpus, plan, store_corpus, store_plan) -> Path:
    """World size 2. `stopped` is stopped in step 6, the first of the second epoch, and resumed."""
    # The validation at the start has one forward per rank; then come the forwards of five steps.
    signal = f"signal_at_micro_batch:{1 + forwards(plan, corpus, 256, 5)}"
    untied = (f"model.path={folder}/untied", "model.compute_dtype=bf16", "optimizer.max_steps=2")
    elsewhere = shutil.copy(folder / "main.jsonl", folder / "elsewhere.jsonl")
    fetched = f"data.train=file://{elsewhere}"
    store = store_is_main(folder)
    fourth = f"signal_at_micro_batch:{forwards(store_plan, store_corpus, 64, 3)}"
    launch(
        folder,
        "two",
        2,
        [
            run_of(folder, "r2"),
            run_of(folder, "stopped", "data.validation=", "run.save_every=2", plant=signal),
            run_of(
                folder, "stopped", f"data.mix=general:0.2:{folder}/general.jsonl;law:0.1:{folder}/law.txt", expect=2
            ),
            run_of(folder, "stopped", "run.save_every=2"),
            run_of(folder, "fetched", fetched, "data.validation=", plant=signal),
            run_of(folder, "fetched", fetched, "run.save_every=2", plant=f"gone:{elsewhere}"),
            run_of(folder, "r2-untied", *untied, plant="native_bf16:yes"),
            run_of(folder, "store2", *store),
            run_of(folder, "store-stopped", *store, "data.validation=", plant=fourth),
            run_of(folder, "store-stopped", *store),
            run_of(folder, "store-moved", *store, "data.validation=", plant=fourth),  # resumed at world size 1
            run_of(folder, "store-stopped", *store, f"data.train={folder}/few", expect=2),
            run_of(folder, "mixed2", *store_is_mixed_in(folder)),
        ],
    )
    return folder / "runs"


@pytest.fixture(scope="module")
def one(folder, two) -> Path:
    """World size 1. `other` validates on the held-out text of `general`, as its main source."""
    other = (f"data.validation={folder}/general_held_out.txt", "data.mix=none", "optimizer.max_steps=1")
    few = ("data.validation=", "data.mix=none", "data.sequence_length=512", "optimizer.epochs=1")
    launch(
        folder,
        "one",
        1,
        [
            run_of(folder, "r1"),
            run_of(folder, "r1-tokens", "batch.global_examples=None", "batch.global_tokens=120", "run.log_every=5"),
            run_of(folder, "plain", "data.mix=none", "optimizer.max_steps=1"),
            run_of(folder, "other", *other),
            run_of(folder, "store1", *store_is_main(folder)),
            run_of(folder, "store-moved", *store_is_main(folder)),
            run_of(folder, "mixed1", *store_is_mixed_in(folder)),
            run_of(folder, "few-store", *few, f"data.train={folder}/few", "batch.global_examples=1"),
            run_of(folder, "few-file", *few, f"data.train={folder}/few.jsonl", "batch.global_examples=9"),
        ],
    )
    return folder / "runs"


def curves(run: Path, name: str) -> list[float]:
    """train/loss/NAME of every step; NaN if the step had no target token from that source."""
    return [row.get(f"train/loss/{name}", float("nan")) for row in rows(run).values()]


def test_a_mixed_run_does_not_depend_on_the_number_of_ranks(one, two) -> None:
    assert len(rows(one / "r1")) == STEPS
    assert largest_difference(weights(one / "r1"), weights(two / "r2")) < 1e-5
    for key in ("train/loss", "train/grad_norm", "train/share/general"):
        assert relative_difference(rows(one / "r1"), rows(two / "r2"), key) < 1e-5
    for name in NAMES:
        np.testing.assert_allclose(curves(one / "r1", name), curves(two / "r2", name), rtol=1e-5)


def test_resume_is_bitwise_for_weights_and_curves(folder, two) -> None:
    assert "signal: stopped after step 5/10, saved" in (folder / "two.out").read_text()
    assert largest_difference(weights(two / "r2"), weights(two / "stopped")) == 0.0
    straight, stopped = rows(two / "r2"), rows(two / "stopped")
    for step, row in straight.items():
        same = {
            k: v for k, v in row.items() if k.startswith(("train/loss", "train/share", "train/grad", "train/epoch"))
        }
        assert len(same) >= 2 + len(NAMES) + 2
        assert same == {key: stopped[step][key] for key in same}


def test_a_source_from_elsewhere_trains_two_ranks_and_their_resume_after_it_is_gone(folder, two) -> None:
    assert not (folder / "elsewhere.jsonl").exists()
    said = (folder / "two.out").read_text()
    [record] = (folder / "tokens" / "fetched").glob("*/source.json")
    assert json.loads(record.read_text())["source"] == f"file://{folder}/elsewhere.jsonl"
    assert len(re.findall(rf"fetched on [\d-]+ into {folder}/tokens/fetched/", said)) >= 2  # at both starts
    assert largest_difference(weights(two / "fetched"), weights(two / "r2")) == 0


def test_a_resume_with_another_share_is_refused(folder, two) -> None:
    assert "was made with another data.mix; it may come from data.mix: " in (folder / "two.out").read_text()


def test_losses_by_source_add_up_to_the_loss(one, two, plan) -> None:
    for run, precision in ((one / "r1", 1e-5), (two / "r2", 1e-5), (two / "r2-untied", 1e-5)):
        for step, row in rows(run).items():
            targets = plan.batch(step - 1).targets_by_source
            parts = [row.get(f"train/loss/{name}", 0.0) * n for name, n in zip(NAMES, targets, strict=True)]
            assert sum(parts) / sum(targets) == pytest.approx(row["train/loss"], rel=precision)
            assert all((f"train/loss/{name}" in row) == (n > 0) for name, n in zip(NAMES, targets, strict=True))
    assert len({round(loss, 3) for loss in (curves(one / "r1", name)[0] for name in NAMES)}) == 3


def test_the_logged_share_is_the_realised_one(one, plan) -> None:
    counts = np.cumsum([plan.batch(step).targets_by_source for step in range(STEPS)], axis=0)
    for step, row in rows(one / "r1").items():
        logged = [row[f"train/share/{name}"] for name in NAMES]
        assert logged == pytest.approx(counts[step - 1] / counts[step - 1].sum())
    assert logged == pytest.approx(SHARES, abs=0.05)  # ten small steps, whole documents


def test_losses_by_source_are_means_over_all_steps_since_the_last_row(one, plan) -> None:
    """With `global_tokens` and every fifth step logged, a row covers the targets of five steps."""
    logged = rows(one / "r1-tokens")
    assert list(logged)[:2] == [5, 10]
    assert all(f"train/loss/{name}" in row for row in logged.values() for name in ("main", "general"))
    assert any("train/loss/law" in row for row in logged.values())  # it comes in windows of 255 targets
    for row in logged.values():
        parts = [row.get(f"train/loss/{name}", 0.0) * row[f"train/step_share/{name}"] for name in NAMES]
        assert row["train/loss"] == pytest.approx(sum(parts), rel=1e-5)
    assert list(logged.values())[-1]["train/epoch"] == 2.0


def test_validation_by_source(one, two) -> None:
    first = rows(one / "r1", "validation/loss")[0]
    plain, other = (rows(one / name, "validation/loss")[0] for name in ("plain", "other"))
    assert first["validation/loss"] == pytest.approx(plain["validation/loss"], rel=1e-5)  # the main source only
    assert first["validation/loss/general"] == pytest.approx(other["validation/loss"], rel=1e-5)
    assert "validation/loss/law" not in first and "validation/loss/general" not in plain
    assert (
        relative_difference(
            rows(one / "r1", "validation/loss"), rows(two / "r2", "validation/loss"), "validation/loss/general"
        )
        < 1e-5
    )
    assert "train/loss/main" not in rows(one / "plain")[1]


def test_training_on_a_store_does_not_depend_on_the_number_of_ranks(one, two, store_plan) -> None:
    assert len(rows(one / "store1")) == store_plan.num_steps == 8
    for name, other, source in (("store1", "store2", "law"), ("mixed1", "mixed2", "store")):
        assert largest_difference(weights(one / name), weights(two / other)) < 1e-5
        for key in ("train/loss", "train/grad_norm", "train/share/main"):
            assert relative_difference(rows(one / name), rows(two / other), key) < 1e-5
        np.testing.assert_allclose(curves(one / name, source), curves(two / other, source), rtol=1e-5)
    counts = np.sum([store_plan.batch(step).targets_by_source for step in range(store_plan.num_steps)], axis=0)
    assert list(rows(one / "store1").values())[-1]["train/share/main"] == pytest.approx(counts[0] / counts.sum())
    assert list(rows(one / "mixed1").values())[-1]["train/share/store"] == pytest.approx(0.6, abs=0.1)
    # A store can be the validation data of the main source or of a mixed-in one. Before the first step the models are equal.
    first = rows(one / "store1", "validation/loss")[0]["validation/loss"]
    assert first == pytest.approx(rows(two / "store2", "validation/loss")[0]["validation/loss"], rel=1e-5)
    assert rows(one / "mixed1", "validation/loss")[0]["validation/loss/store"] > 0


def test_a_store_resumes_bitwise_and_on_another_number_of_ranks(folder, one, two) -> None:
    assert (folder / "two.out").read_text().count("signal: stopped after step 3/") == 2
    assert "resumed from" in (folder / "one.out").read_text()
    assert largest_difference(weights(two / "store2"), weights(two / "store-stopped")) == 0.0
    for step, row in rows(two / "store2").items():
        same = {key: value for key, value in row.items() if key.startswith(("train/loss", "train/share", "train/grad"))}
        assert same == {key: rows(two / "store-stopped")[step][key] for key in same}
    assert largest_difference(weights(one / "store1"), weights(one / "store-moved")) < 1e-5


def test_a_resume_with_another_store_is_refused(folder, two) -> None:
    assert "was made with other data in data.train; it may" in (folder / "two.out").read_text()


def test_a_window_of_whole_documents_trains_like_the_separate_documents(one) -> None:
    """EOS follows each document, attention does not cross it, and the first token of each document is no target."""
    assert rows(one / "few-store")[1]["train/loss"] == pytest.approx(rows(one / "few-file")[1]["train/loss"], rel=1e-6)
    assert largest_difference(weights(one / "few-store"), weights(one / "few-file")) < 1e-5


@pytest.mark.parametrize("chunk", [3, 1024])
def test_losses_by_source_do_not_change_the_loss_or_the_gradients(monkeypatch, chunk) -> None:
    monkeypatch.setattr(model.loss, "CHUNK_TOKENS", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 8, generator=generator) for n in (10, 20))
    ids = torch.randint(20, (10,), generator=generator)
    sources = torch.tensor([0, 2, 2, 0, 1, 0, 2, 1, 1, 0])
    found = []
    for sums in (None, LossSums(3, torch.device("cpu"))):
        inputs = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss = loss_sum(*inputs, ids, sources=sources, loss_sums=sums)
        loss.backward()
        found.append((loss.item(), inputs[0].grad, inputs[1].grad))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, ids, reduction="none")
    expected = torch.stack([expected[sources == source].sum() for source in range(3)])
    torch.testing.assert_close(sums.by_source, expected)
    with torch.no_grad():  # the path of validation
        loss_sum(hidden, head, ids, sources=sources, loss_sums=sums)
    torch.testing.assert_close(sums.by_source, 2 * expected)
    assert sums.total == 0.0  # the training loop adds the total
