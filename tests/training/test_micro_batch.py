"""batch.micro_batch=auto: what is counted, which number is taken, and that all ranks take the same."""

import dataclasses
import json
from pathlib import Path

import pytest

from configs.config import Batch, Config, Data, Model, Optimizer, Run, Sharding, Source
from model import memory
from model.architectures import read_model_config
from model.language_model import build_on_meta
from model.memory import ModelShape, count_activations, full_memory, layout_of, shape_of
from tests.processes import run_ranks
from tests.tiny import write_tiny_model
from training import micro_batch
from training.micro_batch import largest_useful, settle_micro_batch

HERE = Path(__file__).parent
CONFIG = Config(
    model=Model("m", compute_dtype="fp32"),
    data=Data(("a.jsonl",), sequence_length=100),
    batch=Batch(global_examples=64, micro_batch="auto"),
    optimizer=Optimizer(1e-5),
    run=Run("r"),
    sharding=Sharding(strategy="none"),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


def settled(tmp_path, path: str, config: Config = CONFIG) -> tuple[Config, list[str]]:
    said: list[str] = []
    shape = read_model_config(path)
    return settle_micro_batch(config, build_on_meta(shape), shape, tmp_path, 1, said.append), said


def model_shape(path: str) -> ModelShape:
    config = read_model_config(path)
    return shape_of(build_on_meta(config), config)


def with_(**sections) -> Config:
    return dataclasses.replace(CONFIG, **sections)


def tensors(shape: ModelShape, rows: int, config: Config = CONFIG, ranks: int = 1) -> int:
    """Bytes that the planner expects of a micro-batch of so many rows."""
    return full_memory(shape, config, layout_of(config, ranks, ranks, "cpu"), rows).tensors


def free_for(shape: ModelShape, rows: float) -> int:
    """Free memory that holds so many rows."""
    whole = int(rows)
    part = rows - whole
    size = (1 - part) * tensors(shape, whole) + part * tensors(shape, whole + 1)
    return int(size / micro_batch.USABLE["cpu"])


def test_a_number_stays_as_it_is(tmp_path, path) -> None:
    config = with_(batch=Batch(global_examples=64, micro_batch=3))
    assert settled(tmp_path, path, config) == (config, [])


def test_memory_that_is_left_is_filled_with_rows(tmp_path, path, monkeypatch) -> None:
    shape = model_shape(path)
    for rows in (1, 7, 63):
        free = free_for(shape, rows + 0.5)
        monkeypatch.setattr(micro_batch, "free_bytes", lambda device, local_world, free=free: free)
        config, said = settled(tmp_path, path)
        assert config.batch.micro_batch == rows and len(said) == 1
        start = f"batch.micro_batch=auto: {rows} ({rows * 100:,} tokens at most), what memory holds; memory holds {rows}: 70% of"
        assert said[0].startswith(start)
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device, local_world: 1 << 40)
    config, (line,) = settled(tmp_path, path)
    assert (
        config.batch.micro_batch == 64 and "64 (6,400 tokens at most), a rank's part of any step; memory holds " in line
    )
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device, local_world: tensors(shape, 1) - 1)
    config, said = settled(tmp_path, path)
    assert config.batch.micro_batch == 1 and said[1].startswith(
        "warning: not even 100 tokens are expected to fit into memory: use"
    )


def test_without_native_bf16_the_activations_are_those_of_fp32(tmp_path, path, monkeypatch) -> None:
    counted = []

    def count(shape, settings, *rest) -> object:  # noqa: ANN001
        counted.append(settings.compute_dtype)
        return count_activations(shape, settings, *rest)

    monkeypatch.setattr(memory, "count_activations", count)
    for native in (True, False):
        monkeypatch.setattr(micro_batch, "has_native_bf16", lambda device, native=native: native)
        settled(tmp_path, path, with_(model=Model("m", compute_dtype="bf16")))
        assert set(counted) == {"bf16" if native else "fp32"}
        counted.clear()


def test_a_resume_at_the_same_number_of_ranks_takes_the_number_of_the_last_start(tmp_path, path, monkeypatch) -> None:
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device, local_world: 1 << 40)
    record = {"config": {"batch": {"micro_batch": 5}, "sharding": {}}, "world_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert settled(tmp_path, path)[0].batch.micro_batch == 64  # nothing to resume
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-000001")
    config, (line,) = settled(tmp_path, path)
    assert config.batch.micro_batch == 5 and "auto: 5 (500 tokens at most), as at the last start; memory holds " in line
    free = free_for(model_shape(path), 3.5)
    with monkeypatch.context() as less:
        less.setattr(micro_batch, "free_bytes", lambda device, local_world: free)
        config, (line,) = settled(tmp_path, path)
    assert config.batch.micro_batch == 5 and "as at the last start; memory holds 3: 70% of" in line
    groups = {"config": record["config"] | {"sharding": {"context": 2}}}
    for other in ("{", json.dumps(record | {"world_size": 2}), json.dumps(record | groups)):
        (tmp_path / "config.json").write_text(other)
        assert settled(tmp_path, path)[0].batch.micro_batch == 64


def test_a_micro_batch_need_not_hold_more_than_a_ranks_part_of_a_step() -> None:
    assert largest_useful(CONFIG, 8) == 8 and largest_useful(CONFIG, 100) == 1
    mixed = with_(data=Data(("a",), mix=(Source("b", ("c",), 0.5),)))
    assert largest_useful(mixed, 8) == 16
    assert largest_useful(with_(batch=Batch(global_tokens=5, micro_batch="auto")), 8) > 10**6


def test_all_ranks_take_the_smallest_number(tmp_path) -> None:
    done = run_ranks(2, HERE / "micro_batch_worker.py", tmp_path / "model", tmp_path / "result")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"result.rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second == {"rows": 3, "resumed": 4}
