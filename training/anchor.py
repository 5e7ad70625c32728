"""The base's predictions for the targets of anchored sources (`Source.anchor`), computed once and kept in runs/NAME/anchor.

Each target of a document that the run's steps take has 386 bytes: the log-probabilities of the base's `TOKENS` most probable
tokens, their ids, and the log-probability of all other tokens together. model/loss.py (`anchored`) trains by KL to them. A
resume reads them after the record has compared the files. If it has more steps, all predictions are computed again: the model
has the base's weights until a checkpoint is loaded.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common.durable_files import publish, start_directory, temporary_path, write_json
from data.batches import MicroBatch, collate
from data.sources import Corpus
from distributed.process_group import StopSignal, read_on_first
from distributed.sharding import evaluating
from model.language_model import PackedLanguageModel
from model.loss import bucket_log_probabilities, visit_logits
from training.identity import Identity, fingerprint
from training.inputs import Inputs

TOKENS = 64
ROW = np.dtype([("log_p", "<f2", TOKENS + 1), ("ids", "<i4", TOKENS)])
DEALT = 64  # documents that are dealt to the ranks together
ROWS, DOCUMENTS, SETTINGS = "rows", "documents.npy", "settings.json"  # the files


@dataclass(frozen=True)
class BasePredictions:
    """Predictions on disk.

    documents: int64 `(items of the corpus, 2)`, first and end ROW of each item in `rows`; 0, 0: none.
    """

    corpus: Corpus
    rows: Path
    documents: np.ndarray

    def added_to(self, micro_batch: MicroBatch, items: tuple[int, ...]) -> MicroBatch:
        """Return the micro-batch that `collate` has made of `items`, with the base's predictions for its anchored targets."""
        spans = [(first, end) for first, end in self.documents[list(items)] if end]
        if not spans:
            return micro_batch
        parts = [np.fromfile(self.rows, ROW, end - first, offset=first * ROW.itemsize) for first, end in spans]
        rows, numbers = np.concatenate(parts), [self.corpus.names.index(name) for name in self.corpus.anchored]
        assert micro_batch.target_sources is not None  # a corpus with an anchored source has two or more
        anchored = np.isin(micro_batch.target_sources.numpy(), numbers)
        log_p, ids = (torch.from_numpy(rows[name].copy()) for name in ("log_p", "ids"))
        return replace(
            micro_batch, base_rows=np.where(anchored, np.cumsum(anchored) - 1, -1), base_log_p=log_p, base_ids=ids
        )


def with_base(
    data: Inputs,
    model: PackedLanguageModel,
    identity: Identity,
    directory: Path,
    stop: StopSignal,
    say: Callable[[str], None],
) -> Inputs:
    """Return the data of a run with the base's predictions for anchored targets added to its steps. Every rank must call this.

    The model must hold the base's weights. If `directory` lacks predictions that the steps need, or was made with another base
    or other data, all predictions are computed. After a signal, return the data unchanged.
    """
    corpus, ranks, temporary = data.train, stop.ranks, temporary_path(directory)
    origin = fingerprint(
        {part: identity[part] for part in ("the weights", "config.json")}
        | {"data": [corpus.sources[0].fingerprint, corpus.mixture()]}
    )
    items = _anchored_items(data)
    # Rank 0 reads for all ranks: another node may see the disk a moment later.
    documents = read_on_first(lambda: _documents_in(directory, origin), ranks)
    if documents is None or not documents[np.array(items, np.int64)].any(1).all():
        say(f"anchor: the base predicts the targets of {len(items):,} documents of {', '.join(corpus.anchored)}")
        table = np.zeros((len(corpus), 2), np.int64)
        by_rank: list = [None] * ranks.world_size  # on rank 0: (item, its rows) of each rank

        def append() -> None:
            with (temporary / ROWS).open("ab") as file:
                for item, rows in itertools.chain(*by_rank):
                    table[item] = file.tell() // ROW.itemsize + np.array([0, len(rows)])
                    file.write(rows.tobytes())

        def finish() -> np.ndarray:
            np.save(temporary / DOCUMENTS, table)
            write_json(temporary / SETTINGS, {"made": origin})
            publish(directory)
            return table

        read_on_first(lambda: start_directory(directory), ranks)
        with evaluating(model):
            for first in range(0, len(items), DEALT):
                dealt, own = data.dealer.deal(items[first : first + DEALT], corpus, ranks.world_size), []
                for of_rank in dealt.of_rank(ranks.rank):  # the same number on every rank
                    if stop.agreed():
                        return data
                    own += _predicted(model, of_rank, corpus, ranks.device)
                dist.gather_object(own, by_rank if ranks.rank == 0 else None, group=ranks.flags)
                read_on_first(append, ranks)
        documents = read_on_first(finish, ranks)
    count = int(documents.max())
    say(
        f"anchor: {count:,} targets with predictions of the base: {count * ROW.itemsize / 2**20:.1f} MiB in {directory}"
    )
    return replace(data, add_base=BasePredictions(corpus, directory / ROWS, documents).added_to)


def planned_bytes(data: Inputs) -> int:
    """Return the approximate bytes of the files that `with_base` writes; 0 without an anchored source. Not a collective."""
    rows = sum(int(np.count_nonzero(data.train.get(item)[1])) for item in _anchored_items(data))
    return ROW.itemsize * rows + 16 * len(data.train) if data.train.anchored else 0


def _anchored_items(data: Inputs) -> list[int]:
    """Return the items of anchored sources that the run's steps take, each once."""
    corpus = data.train
    numbers = [corpus.names.index(name) for name in corpus.anchored]
    spans = [range(corpus.offsets[number], corpus.offsets[number + 1]) for number in numbers]
    every = itertools.chain.from_iterable(map(data.plan.items, range(data.total_steps))) if numbers else ()
    return list(dict.fromkeys(item for item in every if any(item in span for span in spans)))


def _documents_in(directory: Path, origin: str) -> np.ndarray | None:
    """Return `BasePredictions.documents` if the directory was made with this base and these data, else None."""
    if not directory.is_dir() or json.loads((directory / SETTINGS).read_text(encoding="utf-8"))["made"] != origin:
        return None
    return np.load(directory / DOCUMENTS)


def _predicted(
    model: PackedLanguageModel, items: tuple[int, ...], corpus: Corpus, device: torch.device
) -> list[tuple[int, np.ndarray]]:
    """Return (item, its rows) for each of `items`, which may be empty, from one forward. Every rank must call this."""
    micro_batch = collate(items, corpus).to(device)
    rows = np.zeros(len(micro_batch.target_ids), ROW)

    def visit(logits: torch.Tensor, start: int) -> None:
        ids, chunk = logits.topk(TOKENS).indices, rows[start : start + len(logits)]
        chunk["log_p"], chunk["ids"] = bucket_log_probabilities(logits, ids).half().cpu(), ids.cpu()

    visit_logits(model.head, model(micro_batch), visit)
    ends = np.cumsum([np.count_nonzero(corpus.get(item)[1]) for item in items], dtype=np.int64)
    return list(zip(items, np.split(rows, ends[:-1]), strict=True)) if items else []
