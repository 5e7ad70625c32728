"""The planner's bytes: equal to those of real tensors, and the peak of a real step. tests/planner/test_simulate.py compares it
with a simulated step of many GPUs."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from configs.config import Batch, Config, Data, Model, Optimizer, Run
from eval import forgetting, general_text
from model.architectures import read_model_config
from planner import memory as planner_memory
from planner.cluster import Cluster, Device
from planner.memory import device_memory, disk, full_lengths, host_memory, largest_rows, largest_that, save_seconds
from planner.shape import ModelShape, named_config, shape_of, shape_of_run
from planner.workload import Load
from tests.processes import run_ranks
from tests.tiny import write_tiny_model

HERE = Path(__file__).parent
STRATEGIES, MEMORIES = ("full", "grad_op", "hybrid", "none"), ("16N", "14N", "12N", "8N", "6N")
RANK = 3  # of LoRA, which no number of ranks divides
MODELS = {"untied": ("qwen2", False, 391), "tied": ("llama", True, 387)}  # rows that no number of ranks divides
CONFIG = Config(
    model=Model("m"),
    data=Data(("a.jsonl",), sequence_length=100),
    batch=Batch(global_examples=64),
    optimizer=Optimizer(1e-5),
    run=Run("r"),
)


def cluster_of(kind: str, ranks: int, nodes: int = 1, memory: int = 80 * 10**9) -> Cluster:
    return Cluster(Device("d", kind, memory, 1e15, 1e12, 1e11), ranks, nodes)


def with_(config: Config = CONFIG, **sections: dict) -> Config:
    """The config with keys changed in sections: with_(optimizer={"memory": "8N"})."""
    changed = {name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()}
    return dataclasses.replace(config, **changed)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: str(write_tiny_model(folder / name, family, tied=tied, vocab_size=vocabulary))
        for name, (family, tied, vocabulary) in MODELS.items()
    }


def cases_of(ranks: int, models: dict[str, str]) -> list[dict]:
    memories = MEMORIES if ranks > 1 else ("16N", "6N")  # on a single rank all strategies hold the same
    every = [("untied", *one, "none", [5, 3], False, 0) for one in itertools.product(STRATEGIES, memories)]
    every += [("untied", "full", memory, "none", [5, 3], False, RANK) for memory in memories]
    every += [
        ("tied", "full", memory, "none", [5, 3], False, 0)
        for memory in MEMORIES
        if ranks == 1 or memory in ("16N", "6N")
    ]
    if ranks == 1:  # without threads of gloo, which free at some later time
        lengths = [700, 400]  # two chunks of the head
        every += [
            (name, strategy, memory, mode, lengths, True, rank)
            for name, strategy, memory, mode, rank in (
                ("untied", "full", "16N", "none", 0),
                ("tied", "hybrid", "12N", "full", 0),
                ("untied", "full", "16N", "none", RANK),
                ("tied", "hybrid", "12N", "full", RANK),
            )
        ]
    return [
        {
            "model": models[name],
            "strategy": strategy,
            "shard_size": min(2, ranks),
            "memory": memory,
            "checkpointing": mode,
            "compute_dtype": "bf16",
            "lengths": lengths,
            "peak": peak,
            "rank": rank,
        }
        for name, strategy, memory, mode, lengths, peak, rank in every
    ]


@functools.cache
def shape_at(path: str, rank: int) -> ModelShape:
    return shape_of_run(with_(model={"path": path}, lora={"rank": rank}), read_model_config(path))


def predicted(case: dict, ranks: int) -> dict[str, int]:
    shape = shape_at(case["model"], case["rank"])
    config = with_(
        model={"activation_checkpointing": case["checkpointing"]},
        optimizer={"memory": case["memory"]},
        sharding={"strategy": case["strategy"], "shard_size": case["shard_size"]},
        lora={"rank": case["rank"]},
    )
    load, cluster = Load(tuple(case["lengths"]), sum(case["lengths"])), cluster_of("cpu", ranks)
    found = device_memory(shape, config, cluster, load)
    result = {key: getattr(found, key) for key in ("parameters", "gradients", "optimizer")}
    result["checkpoint"] = disk(shape, config).checkpoint
    for dtype in () if case["rank"] else ("fp32", "bf16"):
        with_ewc = with_(config, ewc={"strength": 1.0, "data": ("b",), "dtype": dtype})
        result[f"ewc {dtype}"] = device_memory(shape, with_ewc, cluster, load).ewc
    return result | ({"peak": found.tensors} if case["peak"] else {})


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bytes_equal_those_of_the_tensors(tmp_path, models, ranks) -> None:
    cases, result = cases_of(ranks, models), tmp_path / "result.json"
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = run_ranks(ranks, HERE / "memory_worker.py", tmp_path / "cases.json", result)
    assert done.returncode == 0, done.stderr
    for case, found in zip(cases, json.loads(result.read_text()), strict=True):
        expected = predicted(case, ranks)
        peak = expected.pop("peak", None)
        assert found.get("peak") == (peak and pytest.approx(peak, rel=0.03)), case
        found.pop("peak", None)
        assert found == expected, case


TINY = LlamaConfig(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1201,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def tiny() -> ModelShape:
    return shape_of("tiny", TINY)


def test_offload_moves_parameters_gradients_and_moments_to_the_host_of_a_gpu_only(tiny) -> None:
    load, config = Load((64,), 64), with_(sharding={"cpu_offload": True})
    gpu, cpu = (device_memory(tiny, config, cluster_of(kind, 4), load) for kind in ("cuda", "cpu"))
    assert (gpu.parameters, gpu.gradients, gpu.optimizer) == (0, 0, 0)
    assert cpu == device_memory(tiny, CONFIG, cluster_of("cpu", 4), load)
    count = sum(-(-size[0] // 4) * torch.Size(size[1:]).numel() for unit in tiny.units for size in unit.shapes)
    host = host_memory(tiny, config, cluster_of("cuda", 8, nodes=2), load).offload
    per_rank = device_memory(tiny, CONFIG, cluster_of("cuda", 8), load)
    exact = 4 * (per_rank.parameters + per_rank.gradients + per_rank.optimizer)
    assert exact <= host < 1.6 * exact  # pinned tensors are rounded up to a power of two
    assert cpu.parameters == 4 * count and host_memory(tiny, config, cluster_of("cpu", 4), load).total == 0


def test_what_is_kept_on_the_host(tiny) -> None:
    load = Load((64,), 64)
    host = host_memory(
        tiny,
        with_(
            model={"activation_checkpointing": "offload"},
            run={"async_save": True, "eval_general": True},
            ewc={"strength": 1.0, "data": ("b",), "device": "cpu"},
        ),
        cluster_of("cuda", 2),
        load,
    )
    assert host.activations == 2 * 3 * 64 * 256 * 2  # ranks, layers, tokens, hidden size in bf16
    assert host.async_save == pytest.approx(12 * tiny.num_parameters, rel=0.01)  # fp32 weights and moments
    assert host.ewc == pytest.approx(8 * tiny.num_parameters, rel=0.01)
    assert host.forgetting == 2048 * (2 * 1201 + 8)
    assert planner_memory.FORGETTING_BYTES == forgetting.TEXT_BYTES >= general_text.PIECE_BYTES


def test_disk_holds_what_is_kept_what_is_written_and_the_export(tiny) -> None:
    size = disk(tiny, with_(run={"keep_last": 3}, optimizer={"memory": "8N"}))
    assert size.checkpoint == 6 * tiny.num_parameters + 4 + len(torch.get_rng_state())
    assert size.export == 2 * tiny.num_parameters and size.run == 5 * size.checkpoint
    assert save_seconds(size, 1e6) == size.checkpoint / 1e6


def test_the_largest_micro_batch_is_the_last_that_fits(tiny) -> None:
    def total(rows: int) -> int:
        load = Load(full_lengths(CONFIG, cluster_of("cuda", 2), rows), 100 * rows)
        return device_memory(tiny, CONFIG, cluster_of("cuda", 2), load).total

    for rows in (1, 5):
        between = (total(rows) + total(rows + 1)) // 2
        assert largest_rows(tiny, CONFIG, cluster_of("cuda", 2, memory=between), at_most=64) == rows
    assert largest_rows(tiny, CONFIG, cluster_of("cuda", 2, memory=total(1) - 1), 64) == 0
    assert largest_rows(tiny, CONFIG, cluster_of("cuda", 2), 64) == 64
    large = largest_rows(tiny, CONFIG, cluster_of("cuda", 2, memory=4 * 2**30), 10**6)
    assert total(large) <= 4 * 2**30 < total(round(1.05 * large))  # extrapolated from a few rows
    assert [largest_that(lambda n, most=most: n <= most, 10) for most in (0, 1, 6, 10, 99)] == [0, 1, 6, 10, 10]


def test_documents_of_512_tokens_keep_most_on_a_cpu_in_bf16() -> None:
    config = with_(data={"sequence_length": 1300})
    assert full_lengths(config, cluster_of("cpu", 1), 2) == (512,) * 5 + (40,)
    assert full_lengths(config, cluster_of("cuda", 1), 2) == (1300, 1300)
    assert full_lengths(with_(config, model={"compute_dtype": "fp32"}), cluster_of("cpu", 1), 2) == (1300, 1300)


def test_known_figures_of_large_models() -> None:
    """7B is about 84 GB at 12N; checkpointing keeps the inputs of 32 layers; ranks hold ceil(rows / ranks)."""
    shape, load = shape_of("7B", named_config("7B")), Load((4096,), 4096)
    config = with_(optimizer={"memory": "12N"}, model={"activation_checkpointing": "full"})
    alone = device_memory(shape, config, cluster_of("cuda", 1), load)
    assert alone.parameters + alone.gradients + alone.optimizer == pytest.approx(12 * 6.738e9, rel=1e-3)
    four = device_memory(shape, config, cluster_of("cuda", 4), load)
    assert four.parameters == pytest.approx(2 * 6.738e9 / 4, rel=1e-3)
    assert four.activations > 32 * 4096 * 4096 * 2
    assert (
        four.total
        < 40e9
        < device_memory(shape, with_(config, optimizer={"memory": "16N"}), cluster_of("cuda", 2), load).total
    )


def test_lora_trains_two_percent_of_8b_and_keeps_the_rest_in_bf16() -> None:
    """Rank 64 on Llama 3.1 8B: 64 x (rows + columns) of 7 matrices in each of 32 layers; FLOPs 4 and 6 per weight."""
    config = with_(lora={"rank": 64}, model={"activation_checkpointing": "full"})
    shape, load = shape_of_run(config, named_config("8B")), Load((4096,), 4096)
    adapters = 32 * 64 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    base = shape.num_parameters - adapters
    assert (shape.num_trained, shape.num_exported) == (adapters, base) and base == pytest.approx(8.03e9, rel=1e-3)
    alone = device_memory(shape, config, cluster_of("cuda", 1), load)
    counters = 4 * 32 * 14  # AdamW's, one for each A and B
    assert alone.parameters == 2 * base + 4 * adapters
    assert (alone.gradients, alone.optimizer) == (4 * adapters, 8 * adapters + counters)
    size = disk(shape, config)
    assert (size.checkpoint, size.export) == (12 * adapters + 4 + len(torch.get_rng_state()), 2 * base)
    head = 128256 * 4096
    assert shape.work.per_token == 4 * (base - 2 * head - 65 * 4096) + 6 * adapters  # without embedding and norms
    assert shape.work.per_target == 4 * head
    full = device_memory(
        shape_of("8B", named_config("8B")), with_(config, lora={"rank": 0}), cluster_of("cuda", 1), load
    )
    assert alone.total < 30e9 < 128e9 < full.total


def test_nccl_buffers_count_for_each_communicator(tiny) -> None:
    load = Load((64,), 64)

    def other(ranks: int, **sharding: object) -> int:
        return device_memory(tiny, with_(sharding=sharding), cluster_of("cuda", ranks), load).other

    one = planner_memory.NCCL_COMMUNICATOR
    assert other(1) == planner_memory.CUDA_CONTEXT
    assert other(8) == other(1) + one
    assert other(8, strategy="none") == other(1) + 2 * one
    assert other(8, strategy="hybrid", shard_size=4) == other(1) + 3 * one
