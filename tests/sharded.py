"""Shard a model like train.py, for workers that do not run train.py."""

import torch

from configs.config import Model, Sharding
from distributed.process_group import Ranks
from distributed.sharding import decoder_layers, make_mesh, parallelize
from model.language_model import PackedLanguageModel


def shard_model(
    model: PackedLanguageModel, ranks: Ranks, strategy: str = "full", settings: Model | None = None, **options: object
) -> None:
    """Shard `model` in place. `options` are further fields of `Sharding`. A collective."""
    sharding = Sharding(strategy=strategy, **options)  # pyright: ignore[reportArgumentType]
    mesh = make_mesh(ranks.device.type, ranks.world_size, sharding)
    units = model.extra_fsdp_units()
    parallelize(model, decoder_layers(model), units, mesh, torch.float32, settings or Model(path=""), sharding)
