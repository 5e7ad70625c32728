"""What the base predicts for anchored sources, in one process: each target gets its own row, also with weights; a signal."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.batches import collate
from data.dealing import Dealer, length_as_cost
from data.sources import Corpus
from model.loss import kl_to_base, visit_logits
from tests.in_memory import texts, weighted
from tests.model.ewc.tiny_ewc import signal_is
from tests.model.test_equivalence import load
from tests.tiny import write_tiny_model
from training.anchor import planned_bytes, with_base

IDENTITY = {"the weights": {"model": "1"}, "config.json": {}}
CORPUS = Corpus(
    (texts([9, 12]), weighted((0.0, 0.25, 1.0), 6), texts([5, 20])), ("main", "a", "b"), (0.5, 0.3, 0.2), ("a",)
)
ITEMS = (0, 3, 4, 8, 2)  # of main, a, a, b, a


@dataclass(frozen=True)
class Data:
    """What `with_base` takes of the inputs of a run."""

    train = CORPUS
    dealer = Dealer(64, length_as_cost)
    total_steps = 2
    plan = SimpleNamespace(items=(ITEMS[:2], ITEMS[1:]).__getitem__)
    add_base: Any = None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_tiny_model(tmp_path_factory.mktemp("model")))


def test_each_target_has_its_base_predictions(model, ranks, tmp_path) -> None:
    lines = []
    first = with_base(Data(), model, IDENTITY, tmp_path / "anchor", signal_is(False, ranks), lines.append)
    again = with_base(Data(), model, IDENTITY, tmp_path / "anchor", signal_is(False, ranks), lines.append)
    written = sum(file.stat().st_size for file in (tmp_path / "anchor").iterdir())
    assert 0 < written - planned_bytes(Data()) < 512  # of a header and the settings
    assert "the base predicts the targets of 3 documents of a" in lines[0] and len(lines) == 3 and lines[1] == lines[2]
    for data in (first, again):
        batch = data.add_base(collate(ITEMS, CORPUS), ITEMS)
        sources = batch.target_sources.numpy()
        assert ((batch.base_rows >= 0) == (sources == 1)).all() and (np.diff(batch.base_rows[sources == 1]) == 1).all()
        logits = []
        with torch.no_grad():
            visit_logits(model.head, model(batch), lambda chunk, start, to=logits: to.append(chunk))
        logits = torch.cat(logits)[torch.from_numpy(sources == 1)]
        assert len(logits) == len(batch.base_log_p) == sum(np.count_nonzero(CORPUS.get(i)[1]) for i in (3, 4, 2)) > 30
        assert kl_to_base(logits, batch.base_log_p, batch.base_ids.long()).abs().max() < 1e-5
        assert kl_to_base(logits.roll(1, 0), batch.base_log_p, batch.base_ids.long()).min() > 1e-3  # of another target
        assert data.add_base(collate((0, 8), CORPUS), (0, 8)).base_rows is None
        assert data.add_base(collate((), CORPUS), ()).base_rows is None


def test_other_base_or_data_is_predicted_again(model, ranks, tmp_path) -> None:
    other, lines = Data(), list[str]()
    object.__setattr__(other, "train", Corpus(CORPUS.sources, CORPUS.names, CORPUS.shares, ("a", "b")))
    others = [(Data(), IDENTITY | {part: {"model": "2"}}) for part in IDENTITY]
    for data, identity in [(Data(), IDENTITY), (Data(), IDENTITY), *others, (other, IDENTITY)]:
        with_base(data, model, identity, tmp_path / "anchor", signal_is(False, ranks), lines.append)
    assert [line.count("predicts the targets of") for line in lines] == [1, 0, 0, 1, 0, 1, 0, 1, 0]


def test_a_signal_leaves_nothing(model, ranks, tmp_path) -> None:
    data = Data()
    assert with_base(data, model, IDENTITY, tmp_path / "anchor", signal_is(True, ranks), lambda line: None) is data
    assert not (tmp_path / "anchor").exists()
