"""Shard a model as train.py does, for workers that do not run train.py."""

import torch

from configs.config import Model, Sharding
from distributed.process_group import Ranks
from distributed.sharding import decoder_layers, make_mesh, parallelize
from model.language_model import PackedLanguageModel


def shard_model(
    model: PackedLanguageModel,
    ranks: Ranks,
    strategy: str = "full",
    shard_size: int | None = None,
    offload: bool = False,
) -> None:
    sharding = Sharding(strategy=strategy, shard_size=shard_size, cpu_offload=offload)
    mesh = make_mesh(ranks.device.type, ranks.world_size, ranks.world_size, sharding)
    units = model.extra_fsdp_units()
    parallelize(model, decoder_layers(model), units, mesh, torch.float32, Model(path=""), sharding)
