"""Compare ranks that share tokens with a single rank that has all tokens: the loss and every gradient, sharded as in train.py.

    torchrun --nproc_per_node=4 tests/distributed/context_worker.py FOLDER [FAMILY ...]

The worker writes a tiny model of each family (by default all of tests/tiny.py) and N.json to FOLDER; N is the number of ranks.
N.json has for each family: "loss" and "gradient" (largest differences, relative to the loss and to the largest element of each
tensor), "tensor" (the name of the tensor with the largest difference) and "isolation" (how far a document's states move when
another document changes). The worker also prints the table.
"""

import dataclasses
import json
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[2]
sys.path[0] = str(root)

import numpy as np
import torch
import torch.distributed as dist

from configs.config import Model
from data.batches import MicroBatch, collate
from data.dealing import Deal
from distributed.process_group import Ranks, barrier, process_group
from distributed.sharding import whole
from model.architectures import read_model_config
from model.language_model import PackedLanguageModel, build_on_meta, load_weights
from model.loss import chunked, negative_log_likelihood
from tests.in_memory import InMemory
from tests.sharded import shard_model
from tests.tiny import FAMILIES, OTHER_FAMILIES, write_tiny_model

# Micro-batches of documents, in tokens: 195 need filling, and in the second a document spans all ranks.
LENGTHS = (37, 5, 90, 2, 61, 3, 150, 7)
MICRO_BATCHES = ((0, 1, 2, 3, 4), (5, 6, 7))
MINUTES = 7.0  # run.timeout_minutes


def documents() -> InMemory:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 259, n) for n in LENGTHS]
    weights = [(rng.random(n) < 0.6).astype(np.float32) * rng.choice([0.5, 1.0, 2.0], n) for n in LENGTHS]
    for document_weights in weights:
        document_weights[0], document_weights[-1] = 0, 1
    return InMemory(ids, weights)


def losses(model: PackedLanguageModel, batches: list[MicroBatch]) -> torch.Tensor:
    """Return the sum of losses, and add their gradients to the parameters."""
    losses_of_batches = []
    for batch in batches:
        loss = chunked(model.head, model(batch), batch, negative_log_likelihood)
        loss.backward()
        losses_of_batches.append(loss.detach())
    return torch.stack(losses_of_batches).sum()


def compare(path: Path, ranks: Ranks, settings: Model | None = None, strategy: str = "full") -> dict:
    """Compare loss and gradients of the group with a computation on this rank alone."""
    source = documents()
    whole_batches = [collate(items, source) for items in MICRO_BATCHES]
    alone, model = (build_on_meta(read_model_config(str(path))) for _ in range(2))
    groups = {"shard_size": max(1, ranks.world_size // 2), "context": ranks.world_size}
    shard_model(model, ranks, strategy, settings, **groups)
    for model_to_load in (alone, model):
        load_weights(model_to_load, str(path), ranks.device)
    expected = losses(alone, whole_batches).item()

    deal = Deal(((MICRO_BATCHES[0],), (MICRO_BATCHES[1],)), np.ones((2, 1)), ranks.world_size)
    parts = [deal.part_of_rank(batch, ranks.rank) for batch in whole_batches]
    loss = losses(model, parts)
    dist.all_reduce(loss)
    worst = (0.0, "")
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        difference = (whole(ours.grad) - theirs.grad).abs().max().item()
        worst = max(worst, (difference / scale if scale else difference, name))
    return {
        "loss": abs(loss.item() - expected) / expected,
        "gradient": worst[0],
        "tensor": worst[1],
        "isolation": isolation(model, ranks) if strategy == "full" else {},
        "timeouts": timeouts(model),
    }


def timeouts(model: PackedLanguageModel) -> list[float]:
    """Return the timeouts in minutes of all groups that the model's collectives use."""
    groups = [model.context.exchange.args[0], *next(model.parameters()).device_mesh.get_all_groups()]
    options = [group._get_backend(torch.device("cpu")).options for group in groups]
    return [group_options._timeout.total_seconds() / 60 for group_options in options]


def isolation(model: PackedLanguageModel, ranks: Ranks) -> dict[str, float]:
    """Return how far hidden states move when the second of three documents changes.

    `edited` and `longer` are about the other documents, `moved` is about the second document itself.
    """
    states = {}
    for name, seed, length in (("base", 1, 60), ("edited", 2, 60), ("longer", 2, 71)):
        rng = np.random.default_rng(seed)
        unchanged = [np.random.default_rng(9).integers(0, 259, n) for n in (80, 33)]
        ids = [unchanged[0], rng.integers(0, 259, length), unchanged[1]]
        batch = collate((0, 1, 2), InMemory(ids, [np.arange(len(i)) > 0 for i in ids]))
        positions = torch.arange(sum(map(len, ids)))
        batch = dataclasses.replace(batch, target_positions=positions, target_ids=positions)
        deal = Deal(((MICRO_BATCHES[0],),), np.ones((1, 1)), ranks.world_size)
        part = deal.part_of_rank(batch, ranks.rank)
        with torch.no_grad():
            hidden = model(part)
        row = torch.zeros(len(positions), hidden.shape[1])
        row[part.target_ids] = hidden  # this rank's positions of the row; the sum over ranks is the whole row
        dist.all_reduce(row)
        states[name] = row.split([len(document) for document in ids])
    base = states["base"]

    def moved(name: str, index: int) -> float:
        return (states[name][index] - base[index]).abs().max().item()

    return {
        "edited": max(moved("edited", 0), moved("edited", 2)),
        "longer": max(moved("longer", 0), moved("longer", 2)),
        "moved": moved("edited", 1),
    }


def main() -> None:
    torch.set_num_threads(1)
    folder, families = Path(sys.argv[1]), sys.argv[2:] or list(FAMILIES | OTHER_FAMILIES)
    results = {}
    with process_group(MINUTES, device=torch.device("cpu")) as ranks:
        for family in families:
            path = folder / family
            if ranks.rank == 0 and not path.exists():
                write_tiny_model(path, family=family, tied=False)
            barrier(ranks)
            results[family] = compare(path, ranks)
        tiled = Model(path="", mlp_tiles=3, activation_checkpointing="full")
        results["tiled hybrid"] = compare(folder / families[0], ranks, tiled, "hybrid")
        results["none"] = compare(folder / families[0], ranks, strategy="none")
        if ranks.rank == 0:
            (folder / f"{ranks.world_size}.json").write_text(json.dumps(results))
            for name, result in results.items():
                distances = ", ".join(f"{edit} {distance:.1e}" for edit, distance in result["isolation"].items())
                print(
                    f"{name:18} {ranks.world_size} ranks: loss {result['loss']:.1e}, gradient {result['gradient']:.1e} "
                    f"({result['tensor']}), another document {distances}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
