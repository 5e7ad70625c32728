"""batch.micro_batch=auto: the counted memory and the chosen number. distributed/test_durable_runs.py tests that all ranks agree."""

import dataclasses
import json
import os

import pytest
import torch
from transformers import PretrainedConfig

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding, Source
from model import memory
from model.architectures import read_model_config
from model.language_model import build_on_meta
from model.memory import count_activations, full_memory, layout_of, shape_of
from tests.tiny import write_tiny_model
from training import micro_batch
from training.micro_batch import largest_useful, settle_micro_batch

CONFIG = Config(
    model=Model("m", compute_dtype="fp32"),
    data=Data(("a.jsonl",), sequence_length=100),
    batch=Batch(global_examples=64, micro_batch="auto"),
    optimizer=Optimizer(1e-5),
    run=Run("r"),
    sharding=Sharding(strategy="none"),
)


@pytest.fixture(scope="module")
def model_config(tmp_path_factory) -> PretrainedConfig:
    return read_model_config(str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")))


@pytest.fixture(scope="module")
def free_for(model_config):
    """Free memory that holds so many rows."""
    shape, layout = shape_of(build_on_meta(model_config), model_config), layout_of(CONFIG, 1, 1, "cpu")

    def free(rows: float) -> int:
        less, more = (full_memory(shape, CONFIG, layout, whole).tensors for whole in (int(rows), int(rows) + 1))
        return int((less + (rows - int(rows)) * (more - less)) / memory.USABLE["cpu"])

    return free


@pytest.fixture
def settle(model_config, tmp_path, monkeypatch):
    """Returns `batch.micro_batch` and the printed lines of a run in tmp_path with this much free memory."""

    def run(config: Config = CONFIG, free: int = 1 << 40) -> tuple[int | str, list[str]]:
        lines: list[str] = []
        monkeypatch.setattr(micro_batch, "free_bytes", lambda device, local_world: free)
        model = build_on_meta(model_config)
        settled = settle_micro_batch(config, model, model_config, tmp_path, 1, lines.append)
        return settled.batch.micro_batch, lines

    return run


def with_(**sections) -> Config:
    return dataclasses.replace(CONFIG, **sections)


def test_free_memory_decides_the_rows(settle, free_for) -> None:
    for rows in (1, 7, 63):
        settled, (line,) = settle(free=free_for(rows + 0.5))
        start = f"batch.micro_batch=auto: {rows} ({rows * 100:,} tokens at most), what memory holds; memory holds {rows}: 70% of"
        assert settled == rows and line.startswith(start)
    settled, (line,) = settle()
    assert settled == 64 and "64 (6,400 tokens at most), a rank's part of any step; memory holds " in line
    settled, (_, warning) = settle(free=free_for(1) // 2)
    assert settled == 1 and warning.startswith("warning: not even 100 tokens are expected to fit into memory: use")
    assert settle(with_(batch=Batch(global_examples=64, micro_batch=3))) == (3, [])  # a number stays as it is


def test_activations_are_fp32_without_native_bf16(settle, monkeypatch) -> None:
    counted = []

    def count(shape, settings, *rest) -> object:
        counted.append(settings.compute_dtype)
        return count_activations(shape, settings, *rest)

    monkeypatch.setattr(memory, "count_activations", count)
    for native in (True, False):
        monkeypatch.setattr(micro_batch, "has_native_bf16", lambda device, native=native: native)
        settle(with_(model=Model("m", compute_dtype="bf16")))
        assert set(counted) == {"bf16" if native else "fp32"}
        counted.clear()


def test_gpu_is_chosen_before_its_memory_is_read(model_config, tmp_path, monkeypatch) -> None:
    """CUDA's allocator reads its settings when CUDA starts."""
    for name, value in {"device_count": 1, "is_available": True, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that settings by the device are undone
        monkeypatch.delenv(name)
    calls = []

    def free_bytes(device: torch.device, local_world: int) -> int:
        calls.append((device, os.environ.get("PYTORCH_CUDA_ALLOC_CONF")))
        return 1 << 40

    monkeypatch.setattr(micro_batch, "free_bytes", free_bytes)
    monkeypatch.setattr(micro_batch, "has_native_bf16", lambda device: True)
    settled = settle_micro_batch(CONFIG, build_on_meta(model_config), model_config, tmp_path, 1, print)
    assert settled.batch.micro_batch == 64
    assert calls == [(torch.device("cuda", 0), "expandable_segments:True")]


def test_resume_reuses_the_recorded_micro_batch(settle, tmp_path, free_for) -> None:
    record = {"config": {"batch": {"micro_batch": 5}, "sharding": {"context": 1}}, "world_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert settle()[0] == 64  # nothing to resume
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    settled, (line,) = settle()
    assert settled == 5 and "auto: 5 (500 tokens at most), as at the last start; memory holds " in line
    settled, (line,) = settle(free=free_for(3.5))
    assert settled == 5 and "as at the last start; memory holds 3: 70% of" in line
    groups = {"config": record["config"] | {"sharding": {"context": 2}}}
    for config_json in ("{", json.dumps(record | {"world_size": 2}), json.dumps(record | groups)):
        (tmp_path / "config.json").write_text(config_json)
        assert settle()[0] == 64


def test_micro_batch_is_bounded_by_the_step() -> None:
    assert largest_useful(CONFIG, 8) == 8 and largest_useful(CONFIG, 100) == 1
    assert largest_useful(with_(sharding=Sharding(context=4)), 8) == 32
    mixed = with_(data=Data(("a",), mix=(Source("b", ("c",), 0.5),)))
    assert largest_useful(mixed, 8) == 16
    assert largest_useful(with_(batch=Batch(global_tokens=5, micro_batch="auto")), 8) > 10**6
