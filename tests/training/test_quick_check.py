"""The quick check passes sound data and models once, and stops a run with planted faults. A growing loss stops a warm-up."""

import dataclasses
import gc
import json
import sys

import pytest

from common.errors import UserError
from configs.config import Optimizer
from data.encoding import ExampleEncoder, Span
from tests.distributed.launch import launch, rows, run_of, workplace
from tests.scripts.check.tiny_run import read, tiny_config
from training.check_result import FAILS, OK
from training.inputs import warm_up
from training.launch import before_imports
from training.quick_check import check_labels, with_loss


@pytest.mark.parametrize(
    ("steps", "ratio", "warmup_steps", "expected"),
    [
        (6, 0.05, None, (3, 0.75)),
        (1, 0.05, None, (1, 0.25)),
        (30, 0.05, None, (4, 1.0)),
        (68, 0.05, None, (4, 1.0)),
        (612, 0.05, None, (31, 1.0)),
        (6, 0.05, 1, (1, 1.0)),
        (6, 0.05, 0, (0, 1.0)),
        (6, 0.0, None, (0, 1.0)),
    ],
)
def test_short_runs_stay_below_the_peak(steps, ratio, warmup_steps, expected) -> None:
    assert warm_up(Optimizer(1e-3, warmup_ratio=ratio, warmup_steps=warmup_steps), steps) == expected


def after(losses: list[float], warmup_steps: int = 4) -> list[float]:
    kept: list[float] = []
    for step, loss in enumerate(losses, 1):
        kept = with_loss(kept, loss, step, warmup_steps)
    return kept


def test_a_doubled_loss_stops_the_warm_up() -> None:
    with pytest.raises(
        UserError,
        match=r"the loss grows at the peak learning rate: 8.19, 7.1, 6.3 up to step 5, after 2.57 at the start",
    ):
        after([2.57, 3.04, 8.19, 7.1, 6.3])
    with pytest.raises(UserError, match="up to step 4"):
        after([2.95, 9.18, 12.7, 12.0])  # the first update was too large
    after([2.57, 3.04, 8.19, 7.1, 3.0, 7.0])  # noisy batches: one of three is low
    after([0.8, 2.6, 2.7, 2.7])  # an easy first batch
    after([0.02, 0.03, 0.3, 0.4, 0.5])  # below two nats
    after([2.5, 3.0, float("nan"), 8.0, 8.0])  # train.py counts steps that are not finite
    assert len(after([2.5] * 6 + [2.4] * 4 + [9.0] * 4)) == 4  # after the warm-up


def test_labels_are_those_of_transformers(tmp_path, monkeypatch) -> None:
    run = read(tiny_config(tmp_path))
    result = check_labels(run.config, run.tokenizer)
    assert result.status == OK and "the first 20 examples" in result.text, result.text
    exact = ExampleEncoder._sequences

    def late(self, turns):
        for sequence in exact(self, turns):
            yield type(sequence)(sequence.ids, tuple(Span(a + 2, b, weight) for a, b, weight in sequence.spans))

    monkeypatch.setattr(ExampleEncoder, "_sequences", lambda self, turns: list(late(self, turns)))
    assert check_labels(run.config, run.tokenizer).status == FAILS
    monkeypatch.undo()
    text = tmp_path / "texts.jsonl"
    text.write_text(
        json.dumps({"text": "the bank shall"}) + "\n" + json.dumps({"prompt": "the", "completion": " bank"}) + "\n"
    )
    config = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, train=(str(text),)))
    assert "the first 2 examples" in check_labels(config, run.tokenizer).text


def test_the_option_checks_and_ends(tmp_path, monkeypatch) -> None:
    config = workplace(tmp_path, train=1) / "config.py"
    monkeypatch.setattr(sys, "argv", ["train.py", str(config), "--quick-check"])
    before_imports("train.py", None)
    gc.enable()
    assert sys.argv[1:] == [str(config), "run.check=only"]


@pytest.mark.slow
def test_new_data_is_checked_once_on_two_ranks(tmp_path) -> None:
    """The sharded model is checked before the first step; a check that passes is not repeated with the same data and model."""
    folder = workplace(tmp_path, train=8, validation=4, check="auto", optimizer="epochs=1, max_steps=2")
    runs = [
        run_of(folder, "only", "run.check=only"),
        run_of(folder, "same", "run.seed=1"),
        run_of(folder, "leaky", "data.max_samples=6", plant="leak", expect=2),
        run_of(folder, "other", "data.max_samples=6"),
        run_of(folder, "ids", f"data.train={folder / 'ids.jsonl'}"),
    ]
    own_ids = [json.dumps({"input_ids": [5, 6, 7, first]}) for first in range(8, 16)]
    (folder / "ids.jsonl").write_text("\n".join(own_ids))  # the user's own tokens, without an end
    output = launch(folder, "quick", 2, runs)
    assert "warning  ends    8 of 8 documents of the first steps" in output
    assert output.count("quick check in ") == 3 and output.count("keep their bits") == 1, output
    assert not {"config.json", "record.jsonl"} & {path.name for path in (folder / "runs/only").iterdir()}
    assert len(rows(folder / "runs/same")) == 2
    assert "error: quick check, masks on rank 0: documents see each other" in output and "run.check=off" in output


@pytest.mark.slow
def test_rates_and_losses_of_first_steps(tmp_path) -> None:
    """A short run stays below the peak; a loss that grows ends both ranks, and a resume in between does not forget the first."""
    folder = workplace(tmp_path, train=8, check="auto", optimizer="epochs=4")
    grows = "optimizer.learning_rate=30"
    runs = [
        run_of(folder, "short", "optimizer.warmup_steps=none", "optimizer.max_steps=2"),
        run_of(folder, "off", grows, "run.check=off"),
        run_of(folder, "grows", grows, "run.stop_at=3"),
        run_of(folder, "grows", grows, expect=2),
    ]
    output = launch(folder, "first", 2, runs)
    rates = {step: row["train/learning_rate"] for step, row in rows(folder / "runs/short").items()}
    assert rates == pytest.approx({1: 2.5e-4, 2: 2.5e-4})
    first, *_, last = rows(folder / "runs/off").values()
    assert output.count("the loss grows at the peak learning rate: ") == 1
    assert f"up to step 4, after {first['train/loss']:.3g} at the start" in output and last["step"] == 8
