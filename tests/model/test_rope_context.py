"""A model that is trained with RoPE scaling learns to use twice the context in a few steps."""

import dataclasses

import numpy as np
import torch

from data.batches import MicroBatch, collate
from model.architectures import read_model_config
from model.language_model import PackedLanguageModel
from model.rope import STRETCHING, scaled_config
from tests.losses import loss_of
from tests.model.test_rope import documents, load
from tests.tiny import write_tiny_model


def first_key_task(count: int, length: int, seed: int, start: int = 0) -> MicroBatch:
    """A task that needs long context: the target at every position from `start` on is the document's first token.

    Documents consist of noise (ids 8-15) and keys (ids 0-7, one token in eight); the first token is a key. A model with one
    layer can distinguish it from later keys only by its distance, so it must attend at distances up to the document's
    length.
    """
    rng = np.random.default_rng(seed)
    is_key = rng.random((count, length)) < 1 / 8
    is_key[:, 0] = True
    ids = np.where(is_key, rng.integers(0, 8, is_key.shape), rng.integers(8, 16, is_key.shape))
    batch = collate(tuple(range(count)), documents(*ids))
    where = np.arange(count * length).reshape(count, length)[:, start:]
    return dataclasses.replace(
        batch,
        target_positions=torch.from_numpy(where.ravel()),
        target_ids=torch.from_numpy(np.repeat(ids[:, 0], length - start)),
    )


def train(packed: PackedLanguageModel, steps: int, count: int, length: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(packed.parameters(), weight_decay=0.0)
    for step in range(steps):
        batch = first_key_task(count, length, seed=length + step)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20)
        (loss_of(packed, batch) / len(batch.target_ids)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_scaled_model_doubles_its_context_after_a_few_steps(tmp_path) -> None:
    """Train at 128 tokens, then 10 steps at 256, with scaling or without; compare the loss at 128-255 (chance: 2.08)."""
    path = write_tiny_model(tmp_path / "model", layers=1)
    config = read_model_config(str(path))
    config.max_position_embeddings = 128
    packed = load(path, config)
    train(packed, steps=150, count=12, length=128, rate=6e-3)
    packed.causal_lm.save_pretrained(path)
    within, beyond = first_key_task(32, 128, seed=1), first_key_task(32, 256, seed=1, start=128)
    loss = {}
    for kind in ("unscaled", *STRETCHING):
        packed = load(path, config if kind == "unscaled" else scaled_config(config, kind, 2.0))
        train(packed, steps=10, count=8, length=256, rate=1e-3)
        with torch.no_grad():
            loss[kind] = [loss_of(packed, batch).item() / len(batch.target_ids) for batch in (within, beyond)]
    assert loss["unscaled"][0] < 0.8 and loss["unscaled"][1] > 2.5
    for kind in STRETCHING:
        assert loss[kind][0] < 0.9 and loss[kind][1] < 1.7, kind
