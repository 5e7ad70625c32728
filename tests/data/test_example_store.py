"""The arrays of encoded examples on disk: what a rank needs of them in memory, and single sequences."""

from pathlib import Path

import numpy as np
import pytest

from data.batches import collate, plan_training
from data.example_store import SPAN, ExampleWriter, Sequences, StoredSequence, open_entry
from data.examples import Documents
from tests.in_memory import micro_batches


def write_entry(folder: Path, count: int) -> Documents:
    """`count` sequences of 4 to 11 tokens, whose second half is targets."""
    folder.mkdir()
    writer = ExampleWriter(folder, np.dtype("<u2"))
    lengths = np.random.default_rng(0).integers(4, 12, count)
    spans = np.zeros(count, SPAN)
    spans["start"], spans["end"], spans["weight"] = lengths // 2, lengths, 1
    ids = (np.arange(lengths.sum()) % 50_000).astype(np.uint32)
    writer.add(Sequences(ids, lengths, spans, np.ones(count, dtype=np.int64)))
    store = writer.finish({})
    return Documents(
        StoredSequence(store, "ids"), StoredSequence(store, "weights"), store.lengths, store.targets, "", ""
    )


def test_each_sequence_is_read_by_itself(tmp_path) -> None:
    made = write_entry(tmp_path / "entry", 5000)
    starts = np.cumsum([0, *made.lengths[:-1]])
    for i in (0, 1, 2499, 4998, 4999, -1):
        length = made.lengths[i]
        ids, weights = made.get(i)
        assert ids.tolist() == ((starts[i] + np.arange(length)) % 50_000).tolist() and ids.dtype == np.int64
        assert weights.tolist() == (np.arange(length) >= length // 2).tolist() and weights.sum() == made.targets[i]
    with pytest.raises(IndexError):
        made.get(5000)
    assert [len(ids) for ids in made.ids[10:13]] == made.lengths[10:13].tolist()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="requires /proc")
def test_a_plan_over_many_examples_takes_no_more_memory_of_its_own_than_one_over_few(tmp_path) -> None:
    """Opens an entry, plans it and reads 5 steps. Mapped pages, which all ranks share, do not count."""

    def anonymous() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024

    growth = []
    for count in (10_000, 600_000):
        write_entry(tmp_path / str(count), count)
        before = anonymous()
        store = open_entry(tmp_path / str(count))
        ids, weights = StoredSequence(store, "ids"), StoredSequence(store, "weights")
        made = Documents(ids, weights, store.lengths, store.targets, "", "", store)
        plan = plan_training(made, 2, 0, global_examples=64)
        for step in range(5):
            for items in micro_batches(plan.batch(step).items, made, 512):
                collate(items, made)
        growth.append(anonymous() - before)
    assert growth[1] < growth[0] + 12 * 2**20  # as Python objects they would take 300 bytes each
