"""A context group's micro-batch is cut so that every token and every target belongs to exactly one rank."""

import dataclasses

import numpy as np
import pytest
import torch

from common.errors import UserError
from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding, Source
from configs.load import check_config, check_world
from data.batches import collate
from data.dealing import Dealer, length_as_cost
from data.sources import Corpus
from distributed.activation_checkpointing import tile_mlps
from model.architectures import read_model_config
from model.build import build_to_train
from tests.in_memory import InMemory
from tests.tiny import write_tiny_model


def documents(lengths: tuple[int, ...]) -> InMemory:
    ids = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    weights = [np.where(np.arange(n) % 3 == 1, 0.5, 0.0).astype(np.float32) for n in lengths]
    return InMemory(ids, weights)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("lengths", [(37, 5, 90), (1, 1), ()])
def test_each_token_and_target_is_on_one_rank(ranks, lengths) -> None:
    corpus = Corpus((documents(lengths or (4,)), documents((6,))), ("main", "other"), (0.5, 0.5))
    deal = Dealer(256, length_as_cost, context=ranks).deal(range(len(lengths)), corpus, 2 * ranks)
    assert len(deal.items[0]) == 2  # groups
    assert deal.ranks_of(1) == f"ranks {ranks} to {2 * ranks - 1}"
    whole = collate(tuple(range(len(lengths))), corpus)
    parts = [deal.part_of_rank(whole, ranks + rank) for rank in range(ranks)]  # of the second group
    tokens = whole.input_ids.shape[1]
    ids, positions = (torch.cat([getattr(part, name)[0] for part in parts]) for name in ("input_ids", "position_ids"))
    assert torch.equal(ids[:tokens], whole.input_ids[0]) and torch.equal(positions[:tokens], whole.position_ids[0])
    assert len({part.input_ids.shape for part in parts}) == 1 and len(ids) - tokens < ranks
    assert whole.filling == (0 if lengths else 2)  # no loss and no router counts these tokens
    assert sum(part.filling for part in parts) == whole.filling + len(ids) - tokens
    for part in parts:  # attention sees the whole row; the tokens that fill it up are a document of their own
        filling = (len(ids) - tokens,) * (len(ids) > tokens)
        assert part.document_lengths == (*whole.document_lengths, *filling)
        assert part.cu_seq_lens.tolist() == np.cumsum([0, *part.document_lengths]).tolist()
    size = parts[0].input_ids.shape[1]
    where = [part.target_positions + rank * size for rank, part in enumerate(parts)]
    assert torch.equal(torch.cat(where), whole.target_positions)
    for name in ("target_ids", "target_weights", "target_sources"):
        every = [getattr(part, name) for part in parts if getattr(part, name) is not None]
        assert (getattr(whole, name) is None and not every) or torch.equal(torch.cat(every), getattr(whole, name))


def config(model: Model, **sharding) -> Config:
    return Config(model, Data(("-",)), Batch(8), Optimizer(1e-3), Run("name"), Sharding(**sharding))


def test_impossible_context_is_one_sentence(tmp_path) -> None:
    with pytest.raises(
        UserError, match="sharding.context=4: groups of 4 ranks share a micro-batch, and 6 is not a mul"
    ):
        check_world(config(Model("-"), context=4), 6, 6)
    path = str(write_tiny_model(tmp_path / "model"))
    with pytest.raises(UserError, match="sharding.context=3: .* has 4 attention heads, which 3 ranks cannot share equ"):
        build_to_train(config(Model(path), context=3), read_model_config(path))
    for key, needed in (("activation_checkpointing", "selective"), ("compile", True)):
        with pytest.raises(UserError, match=f"model.mlp_tiles=2 needs model.{key}="):
            check_config(config(Model("-", mlp_tiles=2, **{key: needed})))
    mix = (Source("general", ("-",), 0.2, anchor=True),)
    with pytest.raises(UserError, match="sharding.context=2 needs a data.mix without anchor"):
        check_config(dataclasses.replace(config(Model("-"), context=2), data=Data(("-",), mix=mix)))
    with pytest.raises(UserError, match="model.mlp_tiles=2: a Linear has no module `mlp`"):
        tile_mlps([torch.nn.Linear(1, 1)], 2)
