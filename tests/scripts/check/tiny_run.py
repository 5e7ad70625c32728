"""The config and the inputs of a run of a tiny model."""

import dataclasses
import json
from pathlib import Path

import torch

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Source
from scripts.check.data import RunInputs, read_run
from tests.processes import ROOT
from tests.tiny import write_chat_file, write_tiny_model


def write_examples(path: Path, examples: list[tuple[str, str]], **keys: object) -> str:
    """Write (question, answer) pairs as a file of chats, and return its path."""
    lines = [
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], **keys})
        for q, a in examples
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def tiny_config(tmp_path: Path, data: dict | None = None, optimizer: dict | None = None, **model: object) -> Config:
    """Return a config with 20 training and 6 validation chats in fp32. `data` and `optimizer` replace settings."""
    path = tmp_path / "model"
    if not path.is_dir():
        write_tiny_model(path)
    settings = {
        "train": (str(write_chat_file(tmp_path / "train.jsonl", 20)),),
        "validation": (str(write_chat_file(tmp_path / "validation.jsonl", 6, seed=1)),),
        "sequence_length": 256,
        "cache": None,
    } | (data or {})
    return Config(
        Model(str(path), **({"compute_dtype": "fp32"} | model)),
        Data(**settings),
        Batch(global_examples=6, micro_batch=2),
        Optimizer(**({"learning_rate": 1e-3, "epochs": 2} | (optimizer or {}))),
        Run("trial", directory=str(tmp_path / "runs")),
    )


def read(config: Config, ranks: int = 1) -> RunInputs:
    """Read the run of a config."""
    return read_run(config, ranks, torch.device("cpu"), ROOT / "train.py")


def with_mix(config: Config, path: str, share: float = 0.2) -> Config:
    """Add a second source to a config."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, mix=(Source("other", (path,), share),)))
